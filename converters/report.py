"""What ``inspect``, ``convert`` and ``quantize`` say of a checkpoint, as JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qformat import names
from qformat.checkpoint import Checkpoint


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
            {
                "name": weight.name,
                "codec": weight.codec,
                "shape": list(weight.shape),
                "stored_bits": round(weight.stored_bits, 6),
                "label": weight.entry.label,
            }
            for weight in weights
        ],
        "coverage": coverage,
    }
