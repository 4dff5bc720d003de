"""GPTQ layer by layer: what shapes, settings and zeros say together. Each must agree with the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from qformat.checkpoint import Checkpoint
from qformat.dtypes import Array

from . import _common as common
from . import _roles as roles
from . import _words as words
from ._common import Module
from ._gptq_settings import MARLIN, VERSIONS, Rules, conflict

PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")
MARLIN_PARTS = ("B", "s", "bias")
MARLIN_ZERO = 8

# How a stored zero is read: as it is; plus one; plus one modulo 2**bits; or with one added to every field of a word,
# carries and all. The last three differ only where a true zero was 0, which minus one has no field for.
Convention = Literal["as stored", "plus one", "modulo", "words"]


@dataclass(frozen=True)
class Layer:
    """A packed layer ``[rows, cols]``: columns of one ``group`` share a scale, the last group may be short."""

    module: Module
    bits: int
    rows: int
    cols: int
    group: int
    dtype: str
    scattered: bool = False  # g_idx deals columns to groups
    form: Literal["stream", "planar", "marlin"] = "stream"
    convention: Convention = "as stored"
    zero: int | None = None  # of every group, where it is one number
    zeros: str | None = None  # else the dtype of the part

    @property
    def term(self) -> dict[str, Any]:
        block = [1, -1 if self.group == self.cols else self.group]
        term: dict[str, Any] = {"codec": "int", "bits": self.bits, "block": block, "scales": self.dtype}
        if self.zeros is not None:
            term["zeros"] = self.zeros
        elif self.zero:
            term["zero"] = self.zero
        if self.scattered:
            term["groups"] = "int32"
        return term

    def __str__(self) -> str:
        group = "one group" if self.group == self.cols else f"groups of {self.group}"
        order = ", scattered (act-order)" if self.scattered else ""
        zero = f"zero {self.zero}" if self.zeros is None else "zeros"
        return f"{self.bits} bits, {self.form}, {group}{order}, {zero} read {self.convention}"


def read(source: Checkpoint, rules: Rules) -> list[Layer]:
    """Every packed layer; :class:`DamagedError` names the tensor that contradicts the settings or another tensor."""
    marlin = [module for module in common.modules(source, "B", MARLIN_PARTS) if "s" in module.parts]
    if rules.format == MARLIN:
        if plain := common.modules(source, "qweight", PARTS):
            raise plain[0].error("qweight", "B, as checkpoint_format marlin has it", "qweight")
        return [_marlin(module, rules.of(module.name)) for module in marlin]
    if marlin:
        raise marlin[0].error("B", f"qweight, as checkpoint_format {rules.format or 'gptq'} has it", "B")
    found = common.modules(source, "qweight", PARTS, never_alone=("qzeros", "scales", "g_idx"))
    stated = [rules.of(module.name) for module in found]
    layers = [_layer(source, module, its) for module, its in zip(found, stated, strict=True)]
    return _with_zeros(source, rules, layers, stated)


def _marlin(module: Module, rules: Rules) -> Layer:
    tiles, twice = module.tensor("B", ("int32",), 2).shape
    scales = module.tensor("s", common.FLOATS, 2)
    rows, cols, groups = twice // 2, tiles * 16, scales.shape[0]
    if rules.bits not in (None, 4):
        raise module.error("B", f"bits {rules.bits} ({rules.where})", "marlin, which has 4")
    if twice % 128 or scales.shape[1] != rows or cols % groups:
        raise module.error("s", f"whole groups of {cols} columns, and {rows} outputs in 64s", str(list(scales.shape)))
    group = group_size(module, "s", rules, cols, groups)
    return Layer(module, 4, rows, cols, group, scales.dtype, form="marlin", zero=MARLIN_ZERO)


def _layer(source: Checkpoint, module: Module, rules: Rules) -> Layer:
    """Everything but the zeros, from the shapes."""
    qweight, qzeros = (module.tensor(part, ("int32",), 2) for part in ("qweight", "qzeros"))
    scales = module.tensor("scales", common.FLOATS, 2)
    (packed, rows), groups = qweight.shape, scales.shape[0]
    if scales.shape[1] != rows:
        raise module.error("scales", f"{rows} columns, as qweight {list(qweight.shape)} has", str(list(scales.shape)))
    if qzeros.shape[0] != groups:
        raise module.error("qzeros", f"{groups} groups, as scales {list(scales.shape)} has", str(list(qzeros.shape)))
    bits = _bits(module, rules, rows, qzeros.shape[1])
    g_idx = _g_idx(module, groups)
    cols = len(g_idx) if g_idx is not None else _columns(source, module, rules, packed, bits)
    planar = _planar(bits, rules)
    if packed not in words.sizes(cols, bits, planar):
        held = f"as qweight {list(qweight.shape)} holds at {bits} bits ({rules.where})"
        raise module.error("qweight" if g_idx is None else "g_idx", f"{32 * packed // bits} columns, {held}", str(cols))
    if g_idx is None and groups > 1 and rules.desc_act and not rules.static_groups:
        raise module.error("scales", f"{module.name}.g_idx beside it, as desc_act deals columns to groups", "none")
    group = group_size(module, "scales", rules, cols, groups, g_idx)
    return Layer(
        module,
        bits,
        rows,
        cols,
        group,
        scales.dtype,
        scattered=g_idx is not None and _scattered(module, g_idx, group, groups),
        form="planar" if planar else "stream",
    )


def _planar(bits: int, rules: Rules) -> bool:
    """5, 6 and 7 bits always are; 2, 4 and 8 bits look alike either way."""
    return bits in words.PLANES and (bits != 3 or rules.format == "gptq_p")


def _bits(module: Module, rules: Rules, rows: int, packed: int) -> int:
    """The width that the settings give, held against the packed zeros; theirs where the settings give none."""
    possible = [bits for bits in range(2, 9) if packed in words.sizes(rows, bits, _planar(bits, rules))]
    if rules.bits is None and len(possible) == 1:
        return possible[0]
    if rules.bits is None or rules.bits not in possible:
        held = " or ".join(map(str, possible)) or "no whole number of"
        found = f"{packed} words for {rows} outputs, which hold {held} bits"
        raise module.error("qzeros", f"bits {rules.bits or 'in the settings'} ({rules.where})", found)
    return rules.bits


def _columns(source: Checkpoint, module: Module, rules: Rules, packed: int, bits: int) -> int:
    """Without g_idx: as many as the words hold, less what fills up the last of them by what config.json says."""
    full = 32 * packed // bits
    _, sizes = roles.candidates(source.config, module.name)
    planar = _planar(bits, rules)
    return next((size for size in sizes if size <= full and packed in words.sizes(size, bits, planar)), full)


def _g_idx(module: Module, groups: int) -> Array | None:
    if "g_idx" not in module.parts:
        return None
    module.tensor("g_idx", ("int32",), 1)
    g_idx = module.array("g_idx")
    outside = np.flatnonzero((g_idx < 0) | (g_idx >= groups))
    if outside.size:
        shown = ", ".join(f"[{i}] = {g_idx[i]}" for i in outside[:3])
        raise module.error("g_idx", f"numbers from 0 to {groups - 1}, as there are {groups} groups", shown)
    return g_idx


def group_size(module: Module, part: str, rules: Rules, cols: int, groups: int, g_idx: Array | None = None) -> int:
    """Columns of a group by the settings, held against the number of groups."""
    size = rules.group_size
    if size is None:
        if g_idx is None and cols % groups:
            raise module.error(part, f"group_size ({rules.where})", f"none for {cols} columns in {groups} groups")
        size = int(np.bincount(g_idx).max()) if g_idx is not None else cols // groups
    size = cols if size == -1 else min(size, cols)
    if (expected := -(-cols // size)) != groups:
        why = f"group_size {rules.group_size} ({rules.where}) makes of {cols} columns"
        raise module.error(part, f"{expected} groups, which {why}", str(groups))
    return size


def _scattered(module: Module, g_idx: Array, group: int, groups: int) -> bool:
    """False where g_idx is i // group. Each group has ``group`` columns, but one may have fewer."""
    if np.array_equal(g_idx, np.arange(len(g_idx)) // group):
        return False
    counts = np.bincount(g_idx, minlength=groups)
    uneven = np.flatnonzero(counts != group)
    if uneven.size > (1 if len(g_idx) % group else 0):
        raise module.error("g_idx", f"{group} columns in each group", f"{counts[uneven[0]]} in group {uneven[0]}")
    return True


def _with_zeros(source: Checkpoint, rules: Rules, layers: Sequence[Layer], stated: Sequence[Rules]) -> list[Layer]:
    """The layers with their zeros understood, by the data and what is ``stated`` of each."""
    constants = [_constant(stored_zeros(layer, "as stored")) for layer in layers]
    if len(rules.formats) > 1:
        raise conflict(source, rules, _evidence(rules, layers, constants))
    versions = [_version(*each) for each in zip(layers, stated, constants, strict=True)]
    old = [layer for layer, version in zip(layers, versions, strict=True) if version == 1]
    # AutoGPTQ ruins every field above a full one: a file with any other pattern was written by whole-word subtraction
    borrowed = rules.by_gptqmodel or any(
        words.full_fields(layer.module.array("qzeros"), layer.bits).borrowed for layer in old if layer.bits in (2, 4, 8)
    )
    out = []
    for layer, version, constant in zip(layers, versions, constants, strict=True):
        convention: Convention = "as stored"
        if version == 1 and borrowed and layer.bits in (2, 4, 8):
            convention = "words"
        elif version == 1:
            convention = "modulo" if rules.by_gptqmodel else "plus one"
        out.append(_understood(layer, convention, constant))
    return out


def _understood(layer: Layer, convention: Convention, stored: int | None) -> Layer:
    layer = replace(layer, convention=convention)
    if stored is not None and (convention == "as stored" or stored + 1 < 1 << layer.bits):
        return replace(layer, zero=stored + (convention != "as stored"))
    zeros = stored_zeros(layer, convention)
    if (zero := _constant(zeros)) is not None:
        return replace(layer, zero=zero)
    return replace(layer, zeros="uint8" if zeros.max() < 256 else "int16")


def stored_zeros(layer: Layer, convention: Convention) -> Array:
    """The zeros of a layer read by a convention: int16 [groups, rows]."""
    stored = layer.module.array("qzeros")
    if convention == "words":
        stored = words.add_one(stored, layer.bits)
    zeros = words.unpack(stored, layer.bits, layer.rows, layer.form == "planar").astype(np.int16)
    if convention in ("plus one", "modulo"):
        zeros += 1
    return zeros & ((1 << layer.bits) - 1) if convention == "modulo" else zeros


def _constant(zeros: Array) -> int | None:
    first = int(zeros[0, 0])
    return first if (zeros == first).all() else None


def _version(layer: Layer, rules: Rules, constant: int | None) -> int:
    """1: zeros are stored minus one. Symmetric layers show it: their zero is 2**(bits - 1)."""
    stated = VERSIONS.get(rules.format or "")
    half = 1 << (layer.bits - 1)
    if rules.sym is False or constant not in (half, half - 1):
        return stated or (2 if layer.bits in (5, 6, 7) else 1)
    shown = 2 if constant == half else 1
    if stated not in (None, shown):
        expected = f"{half - (stated == 1)} throughout, as sym and checkpoint_format {rules.format!r} mean"
        hint = f"if the zeros are right, set checkpoint_format to {'gptq_v2' if shown == 2 else 'gptq'}"
        raise layer.module.error("qzeros", expected, f"{constant}, as version {shown} has it", hint)
    return shown


def _evidence(rules: Rules, layers: Sequence[Layer], constants: Sequence[int | None]) -> str:
    """What stored zeros say where two places state different formats."""
    for layer, constant in zip(layers, constants, strict=True):
        half = 1 << (layer.bits - 1)
        if rules.sym is not False and constant in (half, half - 1):
            version = "gptq_v2" if constant == half else "gptq"
            return f"; qzeros hold {constant} throughout, as {version} has it when sym is true"
    return "; sym is false or qzeros hold many values, so that they cannot decide"
