"""AWQ, version gemm, from weights of the codec ``int`` and with the same values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from qformat import bits as fields
from qformat.checkpoint import KEY
from qformat.dtypes import Array
from qformat.shards import Spec, spec

from ..plan import Item, Plan
from . import _int_groups as groups
from ._int_groups import HEAD, Layer

NAME = "awq"
PACKED = False
BITS = 4
RUN = 8  # outputs in a word, in the order ORDER
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def plan(plan: Plan, dtype: str | None) -> Plan:
    layers = groups.read(plan, dtype, "AWQ", (BITS,), ("float16",))
    first = layers[0]
    for layer in layers:
        if layer.scattered:
            raise layer.unsupported("groups of neighbouring columns for AWQ, which has no g_idx", "act-order")
        if layer.rows % RUN or layer.cols % layer.group:
            found = f"{layer.rows} x {layer.cols} in groups of {layer.group}"
            raise layer.unsupported(f"rows in {RUN}s and whole groups for AWQ", found)
        if layer.group != groups.columns(first.group_size, layer.cols):
            expected = f"one group size for AWQ, {first.group_size} as {first.item.name} has"
            raise layer.unsupported(expected, str(layer.group_size))
        if layer.module == HEAD:
            raise layer.unsupported("a dense head for AWQ, whose loaders never take a packed one", "a packed one")
    exported = {layer.item.name: _item(layer) for layer in layers}
    settings = {
        "quant_method": NAME,
        "bits": BITS,
        "group_size": first.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": groups.dense_modules(plan.items) or None,
    }
    items = tuple(exported.get(item.name, item) for item in plan.items)
    config = {**plan.config, KEY: settings}
    return replace(plan, items=items, config=config, notes=groups.notes(plan, "AWQ"))


def _item(layer: Layer) -> Item:
    shapes: dict[str, Spec] = {
        "qweight": spec("int32", (layer.cols, layer.rows // RUN)),
        "qzeros": spec("int32", (layer.groups, layer.rows // RUN)),
        "scales": spec(layer.dtype, (layer.groups, layer.rows)),
    }
    foreign = {f"{layer.module}.{part}": of for part, of in shapes.items()}
    return replace(layer.item, entry=None, foreign=foreign, make=partial(_tensors, layer))


def _tensors(layer: Layer) -> Mapping[str, Array]:
    codes, zeros, scales, _ = layer.arrays(highest=(1 << BITS) - 1)
    return {
        f"{layer.module}.qweight": _words(codes),
        f"{layer.module}.qzeros": _words(zeros),
        f"{layer.module}.scales": scales,
    }


def _words(codes: Array) -> Array:
    """[rows, out] -> int32 [rows, out / 8]."""
    runs = codes.reshape(len(codes), -1, RUN)[:, :, ORDER]
    return fields.pack(runs.reshape(codes.shape), BITS).view(np.int32)
