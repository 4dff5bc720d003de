"""Every weight decoded to floats: in the dtype that the source's own loader gives, or in the one asked for."""

from __future__ import annotations

from dataclasses import replace

from qformat.dtypes import FLOATS, FROM_SAFETENSORS, NUMPY
from qformat.errors import UsageError
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
    return replace(plan, items=tuple(_item(item, dtype) for item in plan.items), config=config)


def _item(item: Item, dtype: str | None) -> Item:
    if item.entry is not None:
        target = dtype or item.entry.dtype
        return replace(
            item,
            make=lambda: {"": item.packed().decode().astype(NUMPY[target])},
            entry=None,
            dense=spec(target, item.entry.shape),
        )
    assert item.dense is not None
    own = FROM_SAFETENSORS.get(item.dense.tag)
    if dtype is None or own not in FLOATS or own == dtype:
        return item
    shape = item.dense.shape

    def cast() -> dict[str, object]:
        return {"": item.make()[""].reshape(-1).view(NUMPY[own]).reshape(shape).astype(NUMPY[dtype])}

    return replace(item, make=cast, dense=spec(dtype, shape))  # type: ignore[arg-type]
