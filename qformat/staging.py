"""``staged``: a folder is written beside its target and moved into place at the end: there is the old or the new.

    .TARGET.partial/
    ├── journal   which job this is, then a line for each thing finished; locked while a process is at work
    ├── model/    what becomes TARGET
    └── old       what TARGET was, for the moment of the exchange

A job that is killed or interrupted, or that its surroundings fail, leaves this folder, and the same job goes on from
there. A job that fails otherwise would fail again: it leaves nothing, as does one that has finished nothing yet.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from .errors import SurroundingsError, UsageError

try:
    import fcntl
except ImportError:  # not on every system; two processes are then not kept apart
    fcntl = None  # type: ignore[assignment]

LASTING = (KeyboardInterrupt, MemoryError, OSError, SurroundingsError)  # what the same job can outlive
GO_ON = "run the same command again to go on; to give up delete"


class Journal:
    """``done``: checksums of what is finished, by name, of an interrupted run and of this one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.done = file, dict[str, str]()

    def resume(self, job: str) -> bool:
        """Whether the file is the journal of ``job``, a line; then ``done`` is what it says."""
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind(b"\n") + 1]  # the last line may have been cut short
        self._file.truncate(len(whole))
        first, *lines = whole.splitlines() or [b""]
        try:
            for line in lines:
                self.done.update(json.loads(line))
        except (TypeError, ValueError):
            return False
        return bool(job) and first == job.encode()

    def start(self, job: str) -> None:
        self.done.clear()
        self._file.truncate(0)
        self._file.write(job.encode() + b"\n")
        self._file.flush()

    def note(self, sums: Mapping[str, str]) -> None:
        """These are finished: the process may be killed at any moment from here on."""
        self.done.update(sums)
        self._file.write(json.dumps(sums).encode() + b"\n")
        self._file.flush()


@contextlib.contextmanager
def staged(target: Path, overwrite: bool, job: str = "") -> Iterator[tuple[Path, Journal]]:
    """A folder beside ``target`` that takes its place when the block ends well, and the journal of it.

    ``job``: a line that says all that the result depends on. What an interrupted run of the same job has left is in
    the folder and in the journal; what one of another job has left, or one without a name, is removed.

    Raises :class:`UsageError` where the target exists and ``overwrite`` is not given, :class:`SurroundingsError` where
    another process is at work on it, and for what the system refuses within the block.
    """
    _check_free(target, overwrite)
    work = target.with_name(f".{target.name}.partial")
    folder, old, keep = work / "model", work / "old", False
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _locked(work / "journal") as file:
            journal = Journal(file)
            try:
                if old.exists() and folder.exists() and not target.exists():  # killed between the moves of an exchange
                    old.rename(target)
                _check_free(target, overwrite)  # again: another process may have finished it meanwhile
                if not (folder.is_dir() and journal.resume(job)):
                    _clear(work)
                    journal.start(job)
                    folder.mkdir()
                yield folder, journal
                _exchange(target, folder, old)
            except LASTING as error:
                keep = bool(job and journal.done)
                if keep and isinstance(error, KeyboardInterrupt):
                    raise KeyboardInterrupt(f"{GO_ON} {work}") from None
                if keep and isinstance(error, SurroundingsError):
                    error.hint = error.hint or f"{GO_ON} {work}"
                raise
            finally:
                if not keep:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        where, why = error.filename or target, error.strerror or str(error)
        hint = f"{GO_ON} {work}" if keep else ""
        raise SurroundingsError("files that can be read and written", why, file=where, hint=hint) from None


def _check_free(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise UsageError("a target that does not exist", "one that does", file=target, hint="--overwrite replaces it")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file, made where there is none, while no other process has it; :class:`SurroundingsError` while one has."""
    with path.open("a+b") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            theirs = not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat())
        except BlockingIOError:
            theirs = True
        except OSError:  # a file system without locks
            theirs = False
        if theirs:
            raise SurroundingsError("no other process at work on the same target", "one", file=path.parent)
        yield file


def _clear(work: Path) -> None:
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "journal":
            path.unlink()


def _exchange(target: Path, folder: Path, old: Path) -> None:
    """``folder`` takes the place of ``target``, which becomes ``old``; where that fails the target is put back."""
    if not target.exists():
        folder.rename(target)
        return
    target.rename(old)
    try:
        folder.rename(target)
    except BaseException:
        old.rename(target)
        raise
