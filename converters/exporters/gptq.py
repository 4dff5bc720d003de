"""GPTQ, from weights of the codec ``int`` and with the same values.

Version 1 (``gptq``) where every zero is the middle one, which the most loaders read; else version 2 (``gptq_v2``),
which has a field for a zero of 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

import qformat
from qformat import bits as fields
from qformat.checkpoint import KEY
from qformat.dtypes import Array
from qformat.shards import Spec, spec

from ..plan import Item, Plan
from . import _int_groups as groups
from ._int_groups import HEAD, Layer

NAME = "gptq"
PACKED = False
WORD = 32  # bits; codes fill whole words down the columns, zeros along the rows


def plan(plan: Plan, dtype: str | None) -> Plan:
    layers = groups.read(plan, dtype, "GPTQ", (2, 3, 4, 8), ("float16", "bfloat16", "float32"))
    for layer in layers:
        if layer.rows % WORD or layer.cols % WORD:
            raise layer.unsupported(f"rows and columns in {WORD}s for GPTQ", f"{layer.rows} x {layer.cols}")
    symmetric = all(layer.zero == _middle(layer) for layer in layers)
    exported = {layer.item.name: _item(layer, 1 if symmetric else 2) for layer in layers}
    items = tuple(exported.get(item.name, item) for item in plan.items)
    settings = _settings(layers, symmetric, groups.dense_modules(plan.items))
    config = {**plan.config, KEY: settings}
    return replace(plan, items=items, config=config, notes=groups.notes(plan, "GPTQ"))


def _middle(layer: Layer) -> int:
    return 1 << (layer.bits - 1)


def _settings(layers: Sequence[Layer], symmetric: bool, dense: Sequence[str]) -> dict[str, Any]:
    bits = Counter(layer.bits for layer in layers).most_common(1)[0][0]
    size = Counter(layer.group_size for layer in layers).most_common(1)[0][0]
    dynamic: dict[str, Any] = {f"-:^{re.escape(module)}$": {} for module in dense if module != HEAD}
    for layer in layers:
        if layer.bits != bits or layer.group != groups.columns(size, layer.cols):
            dynamic[f"+:^{re.escape(layer.module)}$"] = {"bits": layer.bits, "group_size": layer.group_size}
    return {
        "quant_method": NAME,
        "bits": bits,
        "group_size": size,
        "desc_act": any(layer.scattered for layer in layers),
        "sym": symmetric,
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "lm_head": any(layer.module == HEAD for layer in layers),
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": [f"qformat:{qformat.__version__}"]},
    }


def _item(layer: Layer, version: int) -> Item:
    shapes: dict[str, Spec] = {
        "qweight": spec("int32", (layer.cols * layer.bits // WORD, layer.rows)),
        "qzeros": spec("int32", (layer.groups, layer.rows * layer.bits // WORD)),
        "scales": spec(layer.dtype, (layer.groups, layer.rows)),
        "g_idx": spec("int32", (layer.cols,)),
    }
    foreign = {f"{layer.module}.{part}": of for part, of in shapes.items()}
    return replace(layer.item, entry=None, foreign=foreign, make=partial(_tensors, layer, version))


def _tensors(layer: Layer, version: int) -> Mapping[str, Array]:
    codes, zeros, scales, group = layer.arrays(highest=(1 << layer.bits) - 1)
    counts = np.bincount(group, minlength=layer.groups)
    uneven = np.flatnonzero(counts != layer.group)
    if uneven.size > (1 if layer.cols % layer.group else 0):
        found = f"{counts[uneven[0]]} in group {uneven[0]}"
        raise layer.unsupported(f"{layer.group} columns in each group for GPTQ", found)
    return {
        f"{layer.module}.qweight": np.ascontiguousarray(_words(codes.T, layer.bits).T),
        f"{layer.module}.qzeros": _words(zeros - 1 if version == 1 else zeros, layer.bits),
        f"{layer.module}.scales": scales,
        f"{layer.module}.g_idx": group,
    }


def _words(codes: Array, bits: int) -> Array:
    """[rows, n] -> int32 [rows, n * bits / 32]: GPTQ's stream of each row is qformat's."""
    return fields.pack(codes, bits).view(np.int32)
