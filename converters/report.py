"""What ``inspect``, ``verify``, ``convert`` and ``quantize`` say of a checkpoint, as JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qformat import names, sources
from qformat import verify as check
from qformat.checkpoint import Checkpoint
from qformat.errors import DamagedError

from .importers import read
from .write import account


def summary(opened: Checkpoint, coverage: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``format``, ``stored_bits`` over the packed weights, ``bytes`` of all shards, ``weights``, ``coverage``."""
    weights = [opened[name] for name in sorted(opened, key=names.natural)]
    elements = sum(math.prod(weight.shape) for weight in weights)
    if coverage is None:
        coverage = opened.manifest.provenance.get("source") if opened.manifest is not None else None
    return {
        "format": "qformat" if opened.manifest is not None else "dense",
        "stored_bits": round(8 * sum(weight.nbytes for weight in weights) / elements, 6) if elements else None,
        "bytes": opened.nbytes,
        "weights": [
            _row(weight.name, weight.codec, weight.shape, weight.stored_bits, weight.entry.label) for weight in weights
        ],
        "coverage": coverage,
    }


def _row(name: str, codec: str, shape: Sequence[int], bits: float, label: str) -> dict[str, Any]:
    return {"name": name, "codec": codec, "shape": list(shape), "stored_bits": round(bits, 6), "label": label}


def inspect(source: str | Path) -> dict[str, Any]:
    """A checkpoint's report from headers alone; a foreign one as what it would become. Of a model on the Hub only what
    it needs is read.
    """
    with sources.headers(source) as opened:
        return _inspected(opened)


def _inspected(opened: Checkpoint) -> dict[str, Any]:
    files = [file._asdict() for file in opened.files()]
    if opened.manifest is not None:
        return {**summary(opened), "notes": [], "files": files}
    plan, found, reason = read(opened)
    rows, nbytes, elements = [], 0, 0
    for item in sorted(plan.items, key=lambda item: names.natural(item.name)):
        if item.entry is None:
            continue
        size, count = sum(spec.nbytes for spec in item.specs.values()), math.prod(item.entry.shape)
        codec = "+".join(str(term["codec"]) for term in item.entry.terms)
        rows.append(_row(item.name, codec, item.entry.shape, 8 * size / count, item.entry.label))
        nbytes, elements = nbytes + size, elements + count
    return {
        "format": found,
        "because": reason,
        "stored_bits": round(8 * nbytes / elements, 6) if elements else None,
        "bytes": opened.nbytes,
        "weights": rows,
        "coverage": account(opened, plan),
        "notes": list(plan.notes),
        "files": files,
    }


def verify(source: str | Path) -> dict[str, Any]:
    """Every check of a qformat folder, or of the import of a foreign one; nothing is written.

    What is damaged is a problem of the report; what cannot be read at all (another version, another scheme) is raised.
    """
    opened, plan = None, None
    try:
        opened = sources.open(source)
        if opened.manifest is None:
            plan, _, _ = read(opened)
            account(opened, plan)
            items = [item for item in plan.items if item.entry is not None]
            found = list(check.problems([lambda item=item: item.packed().check() for item in items]))  # type: ignore[misc]
        else:
            items, found = list(opened), check.verify(opened)
    except DamagedError as error:
        items, found = [], [error]
    return {
        "ok": not found,
        "problems": [error.as_json() for error in found],
        "weights": len(items),
        "tensors": len(opened.tensors) if opened is not None else 0,
    }
