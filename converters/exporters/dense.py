"""Every weight decoded to floats: in the dtype that the source's own loader gives, or in the one asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from qformat import manifest
from qformat.dtypes import FLOATS, FROM_SAFETENSORS, NUMPY, Array
from qformat.errors import UsageError
from qformat.manifest import Rows
from qformat.shards import spec

from ..plan import Item, Plan

NAME = "dense"
PACKED = False


def plan(plan: Plan, dtype: str | None) -> Plan:
    if dtype is not None and dtype not in FLOATS:
        raise UsageError(f"--dtype one of {', '.join(FLOATS)}", dtype)
    config = dict(plan.config)
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    composed = [item for item in plan.items if item.entry is not None and item.entry.pieces]
    of = {item.name: item for item in plan.items}
    pieces = {item.name: [of.pop(piece.weights[0]) for piece in item.entry.pieces] for item in composed if item.entry}
    items = [one for item in of.values() if item.name not in pieces for one in _items(item, dtype)]
    items += [_joined(item, pieces[item.name], dtype) for item in composed]
    return replace(plan, items=tuple(items), config=config)


def _joined(item: Item, pieces: list[Item], dtype: str | None) -> Item:
    """A weight that is stored as several."""
    assert item.entry is not None
    target, axis = dtype or item.entry.dtype, item.entry.axis

    def make() -> dict[str, Array]:
        return {"": np.concatenate([piece.packed().decode() for piece in pieces], axis).astype(NUMPY[target])}

    consumes = tuple(name for piece in pieces for name in piece.consumes)
    return Item(item.name, consumes, make, dense=spec(target, item.entry.shape))


def _items(item: Item, dtype: str | None) -> Iterator[Item]:
    """Of a packed weight, each weight of the model that lies in it."""
    if item.entry is None:
        yield _item(item, dtype)
        return
    target, shape = dtype or item.entry.dtype, item.entry.shape
    found = manifest.members({item.name: item.entry}) or {item.name: Rows(item.name, 0, shape[0])}
    for i, (name, rows) in enumerate(found.items()):
        consumes = () if i else item.consumes
        dense = spec(target, (rows.stop - rows.start, *shape[1:]))
        yield Item(name, consumes, partial(_decoded, item, rows, target), dense=dense)


def _decoded(item: Item, rows: Rows, dtype: str) -> dict[str, Array]:
    return {"": item.packed().decode()[rows.start : rows.stop].astype(NUMPY[dtype])}


def _item(item: Item, dtype: str | None) -> Item:
    assert item.dense is not None
    own = FROM_SAFETENSORS.get(item.dense.tag)
    if dtype is None or own not in FLOATS or own == dtype:
        return item
    shape = item.dense.shape

    def cast() -> dict[str, object]:
        return {"": item.make()[""].reshape(-1).view(NUMPY[own]).reshape(shape).astype(NUMPY[dtype])}

    return replace(item, make=cast, dense=spec(dtype, shape))  # type: ignore[arg-type]
