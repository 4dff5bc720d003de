"""``staged``: a folder is written beside its target and moved into place at the end: there is the old or the new."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import SurroundingsError, UsageError


@contextlib.contextmanager
def staged(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place when the block ends well, and goes when it does not.

    Raises :class:`UsageError` where the target exists and ``overwrite`` is not given, :class:`SurroundingsError` for
    what the system refuses within the block.
    """
    if target.exists() and not overwrite:
        raise UsageError("a target that does not exist", "one that does", file=target, hint="--overwrite replaces it")
    folder = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        folder.mkdir(parents=True)
        try:
            yield folder
            _replace(target, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        where, why = error.filename or target, error.strerror or str(error)
        raise SurroundingsError("files that can be read and written", why, file=where) from None


def _replace(target: Path, folder: Path) -> None:
    """``folder`` takes the place of ``target``; where that fails the old target is put back."""
    if not target.exists():
        folder.rename(target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(old)
    try:
        folder.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old) if old.is_dir() else old.unlink()
