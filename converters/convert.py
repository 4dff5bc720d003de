"""``convert``: any checkpoint that an importer knows, to qformat or to anything that an exporter writes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from qformat import checkpoint
from qformat.errors import QformatError

from . import exporters, importers
from .plan import Plan
from .report import summary
from .write import Progress, timed, write


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
    opened = checkpoint.open(source)
    plan, reason = read(opened, scheme)
    exporter = exporters.get(to)
    target = Path(target)
    coverage = write(
        opened, exporter.plan(plan, dtype), target, packed=exporter.PACKED, overwrite=overwrite, progress=progress
    )
    done = checkpoint.open(target)
    return {
        **summary(done, coverage),
        "from": plan.scheme,
        "because": reason,
        "notes": list(plan.notes),
        "files": [file._asdict() for file in opened.files()],
        "seconds": timed(started),
    }


def read(opened: checkpoint.Checkpoint, scheme: str | None = None) -> tuple[Plan, str]:
    """The plan of a source and why that importer was taken."""
    importer, reason = (importers.get(scheme), "--from") if scheme else importers.find(opened)
    try:
        return importer.plan(opened), reason
    except QformatError as error:
        raise error.located(file=opened.path) from None
