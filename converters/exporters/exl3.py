"""EXL3, from weights of the codec ``trellis`` that hold its codes in its order, and with the same values: those that an
EXL3 model was imported as, or that ``quantize`` packs as :data:`HINT` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from qformat.checkpoint import KEY
from qformat.codecs.trellis import Params, states
from qformat.dtypes import FLOATS, FROM_SAFETENSORS, NUMPY, Array
from qformat.errors import UnsupportedError, UsageError
from qformat.manifest import read_term
from qformat.rotation import Side
from qformat.shards import Spec, spec
from qformat.weight import matrix_shape

from ..plan import Item, Plan

NAME = "exl3"
PACKED = False
BLOCK, TILE = 128, 16
ORDER = "c0 c3 r3 c1 c2 r0 r1 r2"
CODES = ("mul1", "mcg", "3inst")
SCALES = {"in": "suh", "out": "svh"}
HINT = (
    "for EXL3: `qformat quantize SRC DST --codec trellis --rotate 128 --set code=mul1 --set scales=null "
    f"--set reversed=true --set order='{ORDER}'`"
)


@dataclass(frozen=True)
class Layer:
    """A matrix ``[rows, cols]`` as it is stored, padded."""

    item: Item
    module: str
    rows: int
    cols: int
    params: Params

    @property
    def bits(self) -> int:
        return self.params.bits[0]


def plan(plan: Plan, dtype: str | None) -> Plan:
    if dtype is not None:
        raise UsageError("--dtype only with --to dense")
    layers = [_layer(item) for item in plan.items if item.entry is not None]
    if not layers:
        raise UsageError("packed weights", "none", hint="`qformat quantize --codec trellis` packs a dense model")
    exported = {layer.item.name: _item(layer) for layer in layers}
    biases = {f"{layer.module}.bias": layer for layer in layers}
    items = []
    for item in plan.items:
        bias = _bias(item, biases[item.name]) if item.name in biases else item
        items.append(exported.get(item.name, bias))
    return replace(plan, items=tuple(items), config={**plan.config, KEY: _settings(layers)}, notes=_notes(plan, layers))


def _layer(item: Item) -> Layer:
    entry = item.entry
    assert entry is not None

    def need(holds: bool, expected: str, found: object) -> None:
        if not holds:
            raise UnsupportedError(f"{expected} for EXL3", str(found), weight=item.name, hint=HINT)

    codecs = [str(term["codec"]) for term in entry.terms]
    need(codecs == ["trellis"], "one term of codec trellis", " + ".join(codecs))
    plain = len(entry.shape) == 2 and not (entry.stack or entry.transposed or entry.concat)
    need(plain, "a matrix [out, in] of one weight", f"shape {list(entry.shape)}, stacked, transposed or of several")
    module, _, last = item.name.rpartition(".")
    need(last == "weight" and "embed" not in module, "the weight of a linear layer", "another")
    _, params, _ = read_term(entry.terms[0])
    assert isinstance(params, Params)
    need(params.code in CODES, f"code {' or '.join(CODES)}", params.code)
    own = states.MULTIPLIERS.get(params.code)
    need(params.multiplier in (None, own), f"the multiplier {own}, which its kernels have in them", params.multiplier)
    need(params.L == 16, "L 16", params.L)
    need(len(params.bits) == 1, "one width for all steps", f"widths {list(params.bits)}")
    need(params.tile == (TILE, TILE), "tiles of 16 x 16", list(params.tile))
    need(params.order == ORDER and params.reversed, f"order {ORDER}, reversed", _placed(params))
    need(params.scales is None or params.block == (-1, -1), "one scale at most", f"block {list(params.block)}")
    sides = dict(entry.rotation.sides()) if entry.rotation else {}
    for name in SCALES:
        side = sides.get(name, Side())
        found = side.size if side.matrix is None and side.perm is None else "another transform"
        need(found == BLOCK, f"a Hadamard transform in blocks of {BLOCK} on the side {name}", found)
    rows, cols = matrix_shape(entry)
    least = tuple(-(-size // BLOCK) * BLOCK for size in entry.shape)
    need((rows, cols) == least, f"{list(entry.shape)} padded to {list(least)}", [rows, cols])
    return Layer(item, module, rows, cols, params)


def _placed(params: Params) -> str:
    return f"{params.order}, {'reversed' if params.reversed else 'not reversed'}"


def _item(layer: Layer) -> Item:
    shapes: dict[str, Spec] = {
        "trellis": spec("int16", (layer.cols // TILE, layer.rows // TILE, TILE * layer.bits)),
        "suh": spec("float16", (layer.cols,)),
        "svh": spec("float16", (layer.rows,)),
    }
    if layer.params.code in states.MULTIPLIERS:
        shapes[layer.params.code] = spec("int32", ())
    foreign = {f"{layer.module}.{part}": of for part, of in shapes.items()}
    return replace(layer.item, entry=None, foreign=foreign, make=partial(_tensors, layer))


def _tensors(layer: Layer) -> Mapping[str, Array]:
    parts, code = layer.item.make(), layer.params.code
    words = parts["codes"].view(np.uint32)[:, :, ::-1].transpose(1, 0, 2)  # bits are counted from the other end
    tensors = {"trellis": np.ascontiguousarray(words).view(np.int16), **_scales(layer, parts)}
    if code in states.MULTIPLIERS:
        tensors[code] = np.array(states.MULTIPLIERS[code], np.uint32).view(np.int32)
    return {f"{layer.module}.{part}": array for part, array in tensors.items()}


def _scales(layer: Layer, parts: Mapping[str, Array]) -> dict[str, Array]:
    """``suh`` and ``svh``; the codec's one scale goes into the side that takes it exactly."""
    lengths = {"in": layer.cols, "out": layer.rows}
    given = {
        side: parts[f"{side}_scale"].astype(np.float64) if f"{side}_scale" in parts else np.ones(length)
        for side, length in lengths.items()
    }
    scale = parts["scales"].astype(np.float64).reshape(()) if "scales" in parts else np.float64(1)
    for side in ("out", "in"):
        folded = {**given, side: given[side] * scale}
        with np.errstate(over="ignore"):  # what overflows is not exact
            held = {name: vector.astype(np.float16) for name, vector in folded.items()}
        if all(np.array_equal(held[name], folded[name]) for name in held):
            return {SCALES[name]: vector for name, vector in held.items()}
    found = f"others, or a scale of {float(scale)!r} that they do not take exactly"
    raise UnsupportedError("scales that float16 holds for EXL3", found, weight=layer.item.name, hint=HINT)


def _bias(item: Item, layer: Layer) -> Item:
    """Padded as the rows are, in float16."""
    assert item.dense is not None and layer.item.entry is not None
    own, shape = FROM_SAFETENSORS.get(item.dense.tag), item.dense.shape
    if own not in FLOATS or shape != layer.item.entry.shape[:1]:
        raise UnsupportedError("a bias of floats, one a row, for EXL3", f"{own} {list(shape)}", weight=item.name)

    def make() -> Mapping[str, Array]:
        bias = item.make()[""].reshape(-1).view(NUMPY[own])
        held = np.zeros(layer.rows, np.float16)
        with np.errstate(over="ignore"):
            held[: len(bias)] = bias
        if not np.array_equal(held[: len(bias)].astype(np.float32), bias.astype(np.float32)):
            raise UnsupportedError("a bias that float16 holds for EXL3", f"others, in {own}", weight=item.name)
        return {"": held}

    return replace(item, dense=spec("float16", (layer.rows,)), make=make)


def _settings(layers: list[Layer]) -> dict[str, Any]:
    body = [layer for layer in layers if layer.module != "lm_head"]
    head = [layer.bits for layer in layers if layer.module == "lm_head"]
    weights = [layer.rows * layer.cols for layer in body]
    bits = sum(n * layer.bits for n, layer in zip(weights, body, strict=True)) / max(sum(weights), 1)
    codes = Counter(layer.params.code for layer in layers)
    return {
        "quant_method": NAME,
        "bits": round(bits, 4),
        "head_bits": head[0] if head else 16,
        "codebook": codes.most_common(1)[0][0],
    }


def _notes(plan: Plan, layers: list[Layer]) -> tuple[str, ...]:
    padded = [layer.module for layer in layers if (layer.rows, layer.cols) != layer.item.entry.shape]  # type: ignore[union-attr]
    note = f"{len(padded)} layers padded to multiples of {BLOCK}: readers take their sizes from config.json"
    return (*plan.notes, *([note] if padded else []))
