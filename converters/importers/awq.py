"""AWQ, as AutoAWQ and gptqmodel write it: version gemm, gemv, gemv_fast and marlin.

Codes, scales and zeros are carried as they are; gemv_fast's ``qzeros``, minus scale times zero, are offsets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from qformat import bits as fields
from qformat.checkpoint import Checkpoint
from qformat.dtypes import Array
from qformat.errors import DamagedError, UnsupportedError
from qformat.manifest import Entry

from ..plan import Item, Plan, passed
from . import _common as common
from . import _gptq_layers as layers
from . import _gptq_settings as settings
from . import _groups as groups
from . import _words as words
from ._common import Module, Settings
from ._gptq_settings import Rules
from ._groups import Names

NAME = "awq"
PARTS = ("qweight", "qzeros", "scales", "bias")
VERSIONS = {form: form for form in ("gemm", "gemv", "gemv_fast", "marlin")} | {"exllama": "gemm"}  # -> layout on disk
MARLIN_ZERO = 8


@dataclass(frozen=True)
class Layer:
    """A packed layer ``[rows, cols]``, ``group`` columns a scale."""

    module: Module
    form: str
    bits: int
    rows: int
    cols: int
    group: int
    dtype: str
    zero: int | None = None  # of every group, where it is one number; else zeros, or gemv_fast's offsets

    @property
    def groups(self) -> int:
        return -(-self.cols // self.group)

    @property
    def term(self) -> dict[str, Any]:
        block = [1, -1 if self.group == self.cols else self.group]
        term: dict[str, Any] = {"codec": "int", "bits": self.bits, "block": block, "scales": self.dtype}
        if self.form == "gemv_fast":
            return term | {"offsets": self.dtype, "rounding": "fused", "round_dtype": self.dtype}
        if self.zero is None:
            term["zeros"] = "uint8"
        elif self.zero:
            term["zero"] = self.zero
        return term

    def __str__(self) -> str:
        group = "one group" if self.group == self.cols else f"groups of {self.group}"
        zero = "offsets" if self.form == "gemv_fast" else "zeros" if self.zero is None else f"zero {self.zero}"
        return f"{self.bits} bits, {self.form}, {group}, {zero}"


def detect(source: Checkpoint) -> str:
    if method := common.method(source):
        return f'quant_method "{method}"' if method == NAME else ""
    if next(common.settings(source), None) is None:
        return ""
    for name, qweight in source.tensors.items():  # settings from before there was a quant_method
        module, _, part = name.rpartition(".")
        scales = source.tensors.get(f"{module}.scales")
        if part != "qweight" or scales is None or len(qweight.shape) != 2 or len(scales.shape) != 2:
            continue
        if qweight.tag == "I16":
            return "codes in words of 16 bits; the settings name no quant_method"
        across = qweight.tag == "I32" and (scales.shape[1] > qweight.shape[1] or scales.shape[0] == qweight.shape[0])
        return "codes packed along the output, or by rows; the settings name no quant_method" if across else ""
    return ""


def plan(source: Checkpoint) -> Plan:
    found = list(common.settings(source))
    rules, zero_point = _rules(source, found)
    modules = common.modules(source, "qweight", PARTS, never_alone=("qzeros", "scales", "scaled_zeros"))
    if not modules:
        raise DamagedError("packed weights: *.qweight", "none", file=source.path)
    packed = [_layer(module, rules.of(module.name), zero_point) for module in modules]
    items = [_item(source, layer) for layer in packed]
    used = {name for item in items for name in item.consumes}
    return Plan(
        scheme=NAME,
        items=(*items, *passed(source, [name for name in source.tensors if name not in used])),
        config=common.target_config(source, packed=[item.name for item in items]),
        notes=(*_notes(source, found, packed), *common.notes(source, [item.name for item in items])),
        settings=common.merged(found),
    )


def _rules(source: Checkpoint, found: Sequence[Settings]) -> tuple[Rules, bool | None]:
    """What the settings say of layers, and ``zero_point``. Raises as :func:`_gptq_settings.read` does."""
    common.agreed(source, found, "quant_method", "method")
    for key, only in (("pack_dtype", "int32"), ("backend", "autoawq")):
        value = common.agreed(source, found, key)
        if value not in (None, only):
            raise UnsupportedError(f"{key} {only}", repr(value), file=source.path)
    zero_point = common.agreed(source, found, "zero_point")
    if zero_point is not None and not isinstance(zero_point, bool):
        raise DamagedError("zero_point true or false", repr(zero_point), file=source.path)
    stated = {
        "bits": common.agreed(source, found, "bits", "w_bit"),
        "group_size": common.agreed(source, found, "group_size", "q_group_size"),
    }
    rules = Rules(
        where=found[0].file if found else Rules.where,
        formats=_versions(source, found),
        by_gptqmodel=settings.written_by_gptqmodel(found),
        dynamic=settings.dynamic_of(source, common.agreed(source, found, "dynamic")),
        **settings.checked(source, stated),
    )
    if len(rules.formats) > 1:
        (first, believed), (second, other) = rules.formats[:2]
        expected = f"version {believed!r}, as {first} says"
        raise DamagedError(expected, f"{other!r} in {second}", file=source.folder / second)
    return rules, zero_point


def _versions(source: Checkpoint, found: Sequence[Settings]) -> tuple[tuple[str, str], ...]:
    """The different layouts that are stated, with the file of each."""
    out: dict[str, str] = {}
    for file, values in found:
        for key in ("version", "format", "checkpoint_format"):
            if (value := values.get(key)) is None:
                continue
            if str(value).lower() not in VERSIONS:
                raise UnsupportedError(f"{key} {', '.join(VERSIONS)}", repr(value), file=source.folder / file)
            out.setdefault(VERSIONS[str(value).lower()], file)
    return tuple((file, form) for form, file in out.items())


def _layer(module: Module, rules: Rules, zero_point: bool | None) -> Layer:
    """A layer by the version that is stated, else by its shapes; its tensors must be those of that version."""
    form = rules.format or _form(module)
    if form != "gemm" and rules.bits not in (None, 4):
        raise module.error("qweight", f"bits {rules.bits} ({rules.where})", f"{form}, which has 4")
    layer = {"gemm": _gemm, "gemv": _gemv, "gemv_fast": _gemv_fast, "marlin": _marlin}[form](module, rules)
    if form == "gemv_fast":
        return layer
    zeros = _zeros(layer)
    constant = bool((zeros == zeros[0, 0]).all())
    half = 1 << (layer.bits - 1)
    if zero_point is False and (zeros != half).any():
        found = f"{zeros[0, 0]} throughout" if constant else f"numbers from {zeros.min()} to {zeros.max()}"
        raise module.error("qzeros", f"{half} throughout, as zero_point false means", found)
    return replace(layer, zero=int(zeros[0, 0])) if constant else layer


def _form(module: Module) -> str:
    qweight = module.tensor("qweight", ("int32", "int16"), 2)
    scales = module.tensor("scales", common.FLOATS, 2)
    if qweight.dtype == "int16":
        return "gemv_fast"
    if "qzeros" not in module.parts and qweight.shape[1] == 2 * scales.shape[1]:
        return "marlin"
    rows = {module.tensor(part, ("int32", *common.FLOATS), 2).shape[0] for part in ("qweight", "qzeros", "scales")}
    return "gemv" if len(rows) == 1 else "gemm"


def _gemm(module: Module, rules: Rules) -> Layer:
    qweight, qzeros = (module.tensor(part, ("int32",), 2) for part in ("qweight", "qzeros"))
    scales = module.tensor("scales", common.FLOATS, 2)
    (cols, packed), (number, rows) = qweight.shape, scales.shape
    if qzeros.shape != (number, packed):
        raise module.error("qzeros", f"{[number, packed]}, as scales and qweight have it", str(list(qzeros.shape)))
    possible = [bits for bits in range(2, 9) if packed in words.sizes(rows, bits, False)]
    bits = rules.bits or (possible[0] if len(possible) == 1 else None)
    if bits is None or bits not in possible:
        held = " or ".join(map(str, possible)) or "no whole number of"
        found = f"{packed} words for {rows} outputs, which hold {held} bits in version gemm"
        raise module.error("qweight", f"bits {bits or 'in the settings'} ({rules.where})", found)
    if bits == 4 and rows % 8:
        raise module.error("scales", "outputs in 8s, as qweight interleaves them", str(rows))
    if bits != 4 and not rules.by_gptqmodel:  # others order these widths differently, and shapes do not show it
        expected = "4 bits in version gemm, or gptqmodel as meta.quantizer"
        raise UnsupportedError(expected, f"{bits} bits", file=module.source.path, weight=module.weight)
    group = layers.group_size(module, "scales", rules, cols, number)
    return Layer(module, "gemm", bits, rows, cols, group, scales.dtype)


def _gemv(module: Module, rules: Rules) -> Layer:
    qweight, qzeros = (module.tensor(part, ("int32",), 2) for part in ("qweight", "qzeros"))
    scales = module.tensor("scales", common.FLOATS, 2)
    rows, cols = qweight.shape[0], 8 * qweight.shape[1]
    group = _whole_group(module, rules, cols)
    width = _padded(module, cols // group, group)
    for part, tensor, columns in (("qzeros", qzeros, width // 8), ("scales", scales, width)):
        if tensor.shape != (rows, columns):
            why = f"as version gemv has them for {rows} x {cols} in groups of {group}"
            raise module.error(part, f"{[rows, columns]}, {why}", str(list(tensor.shape)))
    return Layer(module, "gemv", 4, rows, cols, group, scales.dtype)


def _gemv_fast(module: Module, rules: Rules) -> Layer:
    qweight = module.tensor("qweight", ("int16",), 2)
    scales = module.tensor("scales", ("float16", "bfloat16"), 2)
    qzeros = module.tensor("qzeros", (scales.dtype,), 2)
    rows, cols = 4 * qweight.shape[0], qweight.shape[1]
    if cols % 64:
        raise module.error("qweight", "columns in 64s, as version gemv_fast has them", str(cols))
    group = _whole_group(module, rules, cols)
    shape = _padded(module, cols // group, group), rows
    for part, tensor in (("scales", scales), ("qzeros", qzeros)):
        if tensor.shape != shape:
            why = f"as version gemv_fast has them for {rows} x {cols} in groups of {group}"
            raise module.error(part, f"{list(shape)}, {why}", str(list(tensor.shape)))
    return Layer(module, "gemv_fast", 4, rows, cols, group, scales.dtype)


def _marlin(module: Module, rules: Rules) -> Layer:
    tiles, twice = module.tensor("qweight", ("int32",), 2).shape
    scales = module.tensor("scales", common.FLOATS, 2)
    rows, cols, number = twice // 2, tiles * 16, scales.shape[0]
    if "qzeros" in module.parts:
        raise module.error("qzeros", "none, as version marlin has none", "one")
    if twice % 128 or scales.shape[1] != rows or cols % number:
        raise module.error(
            "scales", f"whole groups of {cols} columns, and {rows} outputs in 64s", str(list(scales.shape))
        )
    group = layers.group_size(module, "scales", rules, cols, number)
    return Layer(module, "marlin", 4, rows, cols, group, scales.dtype)


def _whole_group(module: Module, rules: Rules, cols: int) -> int:
    """The group size that the settings give: padding hides it from the shapes."""
    size = cols if rules.group_size == -1 else rules.group_size
    if size is None or cols % size:
        raise module.error("qweight", f"a group_size ({rules.where}) that divides {cols} columns", str(size))
    return size


def _padded(module: Module, number: int, group: int) -> int:
    """Groups of version gemv and gemv_fast with their padding: words of 8, and the words in ones, twos or fours."""
    multiple = 1 if group >= 128 else {64: 2, 32: 4}.get(group)
    if multiple is None:
        expected = "groups of 32, 64, or 128 and more in version gemv"
        raise UnsupportedError(expected, str(group), file=module.source.path, weight=module.weight)
    return 8 * multiple * -(-number // (8 * multiple))


def _zeros(layer: Layer) -> Array:
    """int16 [groups, rows]. Of gemv_fast those that its offsets were made of."""
    module = layer.module
    if layer.form == "marlin":
        return np.full((layer.groups, layer.rows), MARLIN_ZERO, np.int16)
    stored = module.array("qzeros")
    if layer.form == "gemv_fast":
        scales, offsets = (array[: layer.groups].astype(np.float32) for array in (module.array("scales"), stored))
        return np.rint(np.divide(-offsets, scales, out=np.zeros_like(scales), where=scales != 0)).astype(np.int16)
    if layer.form == "gemv":
        return np.ascontiguousarray(words.unpack(stored, 4, layer.groups, False).T).astype(np.int16)
    zeros = words.unpack(stored, layer.bits, layer.rows, False)
    return (words.in_order(zeros) if layer.bits == 4 else zeros).astype(np.int16)


def _item(source: Checkpoint, layer: Layer) -> Item:
    module = layer.module
    if module.name.rpartition(".")[2] in common.EMBEDDINGS:
        raise UnsupportedError("packed linear layers", "a packed embedding", file=source.path, weight=module.weight)
    entry = Entry(
        weights=(module.weight,),
        shape=(layer.rows, layer.cols),
        dtype=layer.dtype,  # type: ignore[arg-type]
        terms=(layer.term,),
        label="bit-exact",
    )
    consumes = tuple(f"{module.name}.{part}" for part in module.parts if part != "bias")
    return Item(module.weight, consumes, partial(_parts, layer), entry)


def _parts(layer: Layer) -> Mapping[str, Array]:
    module = layer.module
    scales = common.check_finite(module, "scales")
    if layer.form == "gemv":
        scales = words.transposed(scales[:, : layer.groups])
    elif layer.form == "gemv_fast":
        scales = scales[: layer.groups]
    elif layer.form == "marlin":
        scales = words.marlin_scales(scales)
    offsets = common.check_finite(module, "qzeros") if layer.form == "gemv_fast" else None
    codes, zeros = _codes(layer), _zeros(layer)
    group = np.arange(layer.cols) // layer.group
    groups.check(module, Names("qweight", "scales"), layer.bits, codes, scales, zeros, group)
    parts = {"codes": codes, "scales": words.transposed(scales)}
    if offsets is not None:
        parts["offsets"] = words.transposed(offsets[: layer.groups])
    elif layer.zero is None:
        parts["zeros"] = words.transposed(zeros).astype(np.uint8)
    return parts


def _codes(layer: Layer) -> Array:
    """uint8 [rows, row bytes]."""
    stored = layer.module.array("qweight")
    if layer.form == "gemv":  # qformat's own order
        return np.ascontiguousarray(stored).view(np.uint8)
    if layer.form == "gemv_fast":
        return words.gemv_fast_codes(stored)
    if layer.form == "marlin":
        return words.marlin_codes(stored)
    if layer.bits in words.ORDERS:
        return words.turned(stored, layer.bits)
    return fields.pack(words.transposed(words.unpack(stored, layer.bits, layer.rows, False)), layer.bits)


def _notes(source: Checkpoint, found: Sequence[Settings], packed: Sequence[Layer]) -> list[str]:
    notes = [f"{number} x {form}" for form, number in Counter(map(str, packed)).items()]
    skipped = common.agreed(source, found, "modules_to_not_convert")
    names = [name for name in skipped if isinstance(name, str)] if isinstance(skipped, list) else []
    modules = [layer.module.name for layer in packed]
    excluded = [module for module in modules if any(f".{module}".endswith(f".{name}") for name in names)]
    if excluded:
        notes.append(f"packed though modules_to_not_convert excludes them: {common.count(excluded, 'layer')}")
    return notes
