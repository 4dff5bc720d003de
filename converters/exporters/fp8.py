"""FP8, from weights of the codec ``float`` in E4M3 and with the same values: DeepSeek's form where scales are of tiles
or of whole tensors, FBGEMM's where they are of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from qformat.checkpoint import KEY
from qformat.codecs.float import Params
from qformat.dtypes import NUMPY, Array
from qformat.errors import UnsupportedError, UsageError
from qformat.manifest import read_term
from qformat.shards import spec

from ..plan import Item, Plan
from . import _int_groups as groups

NAME = "fp8"
PACKED = False
FORMAT = "e4m3fn"  # the only one that loaders know
TENSOR, ROWS = (-1, -1), (1, -1)
UPPER = 1200.0  # FBGEMM's bound of activation scales, where the source has none
ACTIVATION = "activation_scale"
HINT = "`--set block=[128,128] --set scales=float32` with `quantize --codec float --bits 8` makes one"


@dataclass(frozen=True)
class Layer:
    """A matrix and its item; ``activation`` is the scale of its input where that is fixed."""

    item: Item
    module: str
    params: Params
    shape: tuple[int, int]
    activation: float | None


def plan(plan: Plan, dtype: str | None) -> Plan:
    if dtype is not None:
        raise UsageError("--dtype only with --to dense")
    kept = plan.activations if isinstance(plan.activations, Mapping) else {}
    fixed = kept.get(ACTIVATION) if kept.get("scheme") == "static" else None
    layers = [
        _layer(item, fixed if isinstance(fixed, Mapping) else {}) for item in plan.items if item.entry is not None
    ]
    if not layers:
        raise UsageError("packed weights", "none", hint="`qformat quantize --codec float` packs a dense model")
    block = layers[0].params.block
    for layer in layers:
        if layer.params.block != block:
            raise _unsupported(layer.item, f"blocks of {list(block)} as the others", str(list(layer.params.block)))
    exported = {layer.item.name: _item(layer) for layer in layers}
    items = tuple(exported.get(item.name, item) for item in plan.items)
    settings = _settings(block, layers, kept, groups.dense_modules(plan.items))
    lost = [kind for kind in kept if kind not in ("scheme", ACTIVATION)] + ["kv_cache"] * (plan.kv_cache is not None)
    notes = (*plan.notes, *(f"FP8 has no place for {kind}" for kind in lost))
    return replace(plan, items=items, config={**plan.config, KEY: settings}, notes=notes)


def _layer(item: Item, fixed: Mapping[str, Any]) -> Layer:
    entry = item.entry
    assert entry is not None
    codecs = [str(term["codec"]) for term in entry.terms]
    if codecs != ["float"] or entry.rotation is not None:
        found = " + ".join(codecs) + (" and a rotation" if entry.rotation is not None else "")
        raise _unsupported(item, "one term of codec float", found)
    module, _, last = item.name.rpartition(".")
    if len(entry.shape) != 2 or entry.transposed or last != "weight" or groups.EMBEDDING.search(module):
        raise _unsupported(item, "the weight [out, in] of a linear layer", f"another, of shape {list(entry.shape)}")
    _, params, _ = read_term(entry.terms[0])
    assert isinstance(params, Params)
    if params.format != FORMAT:
        raise _unsupported(item, FORMAT, params.format)
    if params.view is not None or params.global_scale is not None or params.rounding != "none":
        raise _unsupported(item, "no view, no global scale and no rounding", "one")
    if params.scales not in ("float32", "bfloat16", "float16", "float8_e8m0fnu"):
        raise _unsupported(item, "scales of float32, bfloat16, float16 or exponents", str(params.scales))
    if -1 in params.block and params.block not in (TENSOR, ROWS):
        raise _unsupported(item, "scales of tiles, rows or whole tensors", str(list(params.block)))
    activation = fixed.get(item.name)
    return Layer(item, module, params, (entry.shape[0], entry.shape[1]), activation)


def _unsupported(item: Item, expected: str, found: str) -> UnsupportedError:
    return UnsupportedError(f"{expected} for FP8", found, weight=item.name, hint=HINT)


def _settings(block: tuple[int, int], layers: list[Layer], kept: Mapping[str, Any], dense: list[str]) -> dict[str, Any]:
    if block == ROWS:
        return {"quant_method": "fbgemm_fp8", "activation_scale_ub": UPPER, "modules_to_not_convert": dense}
    static = all(isinstance(layer.activation, float) for layer in layers)
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "static" if static else "dynamic",
        "weight_block_size": None if block == TENSOR else list(block),
        "modules_to_not_convert": dense,
    }


def _item(layer: Layer) -> Item:
    rows = layer.params.block == ROWS
    whole = layer.params.block == TENSOR
    scale = f"{layer.module}.{'weight_scale' if rows else 'weight_scale_inv'}"
    grid = () if whole else next(s.shape for name, s in layer.item.specs.items() if name.endswith("_scales"))
    foreign = {layer.item.name: spec("float8_e4m3fn", layer.shape), scale: spec(str(layer.params.scales), grid)}
    if isinstance(layer.activation, float):
        foreign[f"{layer.module}.{ACTIVATION}"] = spec("float32", ())
    return replace(layer.item, entry=None, foreign=foreign, make=partial(_tensors, layer, scale, grid))


def _tensors(layer: Layer, scale: str, grid: tuple[int, ...]) -> Mapping[str, Array]:
    parts = layer.item.make()
    tensors = {layer.item.name: parts["codes"].view(NUMPY["float8_e4m3fn"]), scale: parts["scales"].reshape(grid)}
    if isinstance(layer.activation, float):
        tensors[f"{layer.module}.{ACTIVATION}"] = np.array(layer.activation, np.float32)
    return tensors
