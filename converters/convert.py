"""``convert``: any checkpoint that an importer knows, to qformat or to anything that an exporter writes."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from qformat import checkpoint, sources
from qformat.errors import QformatError

from . import exporters
from .importers import read
from .proof import prove
from .report import inspect, summary
from .write import Progress, account, timed, write


def convert(
    source: str | Path,
    target: str | Path,
    to: str = "qformat",
    *,
    dtype: str | None = None,
    scheme: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``source`` to the folder ``target`` in the format ``to``; ``scheme`` overrides what the source looks like.

    Returns the report that ``qformat convert --json`` prints.
    """
    started = time.perf_counter()
    opened = sources.open(source)
    files = [file._asdict() for file in opened.files()]
    plan, found, reason = read(opened, scheme)
    coverage = account(opened, plan)
    exporter = exporters.get(to)
    target = Path(target)
    try:
        exported = exporter.plan(plan, dtype)
        written = write(
            opened,
            exported,
            target,
            coverage,
            packed=exporter.PACKED,
            overwrite=overwrite,
            progress=progress,
            prove=partial(prove, opened, plan, found, exporter.NAME),
        )
    except QformatError as error:
        raise error.located(file=opened.path) from None
    return {
        **(summary(checkpoint.open(target)) if exporter.PACKED else inspect(target)),
        "coverage": coverage,
        "from": found,
        "because": reason,
        "notes": list(exported.notes),
        "files": files,
        "resumed": written.resumed,
        "proof": written.proof,
        "seconds": timed(started),
    }
