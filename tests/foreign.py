"""Foreign checkpoints for tests of importers: written from arrays, imported, decoded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qformat import checkpoint
from qformat.converters.convert import convert
from qformat.converters.importers import read
from qformat.converters.plan import Plan
from qformat.dtypes import Array, name_of
from qformat.shards import ShardWriter, spec

DATA = Path(__file__).parent / "data"


def write(folder: Path, tensors: Mapping[str, Array], config: Mapping[str, Any], **files: Any) -> Path:
    """A model folder of one shard; ``files``: JSON files by their name without ``.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    specs = {name: spec(name_of(array.dtype), array.shape) for name, array in tensors.items()}
    with ShardWriter(folder / "model.safetensors", specs, {}) as out:
        for name, array in tensors.items():
            out.put(name, array)
    for name, values in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def plan_of(folder: Path, scheme: str | None = None) -> Plan:
    return read(checkpoint.open(folder), scheme)[0]


def decoded(plan: Plan, rotated: bool = False) -> dict[str, Array]:
    """The values of every packed weight of a plan, float32."""
    weights = [item.packed() for item in plan.items if item.entry is not None]
    for weight in weights:
        weight.check()
    return {weight.name: weight.decode(rotated) for weight in weights}


def converted(source: Path, work: Path) -> checkpoint.Checkpoint:
    """``source`` as a qformat folder on disk."""
    convert(source, work / "packed")
    return checkpoint.open(work / "packed")


def difference(found: Array, wanted: Array) -> float:
    """The relative Frobenius error."""
    distance = np.linalg.norm(found.astype(np.float64) - wanted)
    return float(distance / (np.linalg.norm(wanted.astype(np.float64)) or 1))
