"""HIGGS: codes into a grid, packed as FLUTE's kernels read them, of inputs rotated by a Hadamard matrix.

Words are re-laid, codes are kept. How they lie depends on the kernel that was the fastest where the file was made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from qformat.checkpoint import Checkpoint
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError
from qformat.manifest import Entry
from qformat.rotation import Rotation, Side

from ..plan import Item, Plan, passed
from . import _common as common
from . import _roles as roles
from ._common import Module
from ._permute import numbers, permutation, permute

NAME = "higgs"
PARTS = ("weight", "scales", "tables", "tables2", "bias")
STORED = ("float16", "bfloat16")
TALL = {2: {id for id in range(36) if id % 12 < 4}, 3: set(), 4: {id for id in range(144) if id % 48 < 16}}
TEMPLATES = {
    2: {*range(36)},
    3: {*range(36)} - TALL[2],
    4: {*range(144)},
}  # by bits; those of TALL have tiles of 64 rows


@dataclass(frozen=True)
class Rules:
    """What the settings say of every layer: ``p`` weights share a code, ``size`` is that of a Hadamard block."""

    bits: int
    p: int
    group: int
    size: int
    tuned: Mapping[str, Any]


@dataclass(frozen=True)
class Layer:
    """A packed layer ``[rows, cols]``, its columns stored padded to ``padded``; words lie in tiles of ``tile`` rows."""

    module: Module
    rules: Rules
    rows: int
    cols: int
    padded: int
    tile: int
    dtype: str

    @property
    def term(self) -> dict[str, Any]:
        term = {"codec": "table", "bits": self.rules.bits * self.rules.p, "p": self.rules.p, "table": self.dtype}
        term |= {"block": [1, self.rules.group], "scales": self.dtype}
        return {**term, "rounding": "once", "round_dtype": self.dtype}

    def __str__(self) -> str:
        padded = ", padded" if self.padded != self.cols else ""
        rules = self.rules
        return (
            f"{rules.bits} bits, p {rules.p}, groups of {rules.group}, {self.dtype}, tiles of {self.tile} rows{padded}"
        )


def detect(source: Checkpoint) -> str:
    method = common.method(source)
    return f'quant_method "{method}"' if method == NAME else ""


def plan(source: Checkpoint) -> Plan:
    found = list(common.settings(source))
    rules = _rules(source, found)
    modules = common.modules(source, "tables2", PARTS, never_alone=("tables", "scales"))
    known = {module.weight for module in modules}
    for name, tensor in source.tensors.items():
        if tensor.dtype == "int16" and name.endswith(".weight") and name not in known:
            raise DamagedError("tables2 beside a packed weight", "none", file=source.file_of(name), weight=name)
    if not modules:
        raise DamagedError("packed weights: *.tables2", "none", file=source.path)
    layers = [_layer(source, module, rules) for module in modules]
    items = [_item(layer) for layer in layers]
    packed = [item.name for item in items]
    used = {name for item in items for name in item.consumes}
    settings = {key: value for key, value in common.merged(found).items() if key != "tune_metadata"}
    return Plan(
        scheme=NAME,
        items=(*items, *passed(source, [name for name in source.tensors if name not in used])),
        config=common.target_config(source, packed),
        notes=(*_notes(source, layers), *common.notes(source, packed)),
        settings=settings,
    )


def _rules(source: Checkpoint, found: list[common.Settings]) -> Rules:
    common.agreed(source, found, "quant_method", "method")

    def number(key: str, default: int, *allowed: int) -> int:
        value = common.agreed(source, found, key)
        value = default if value is None else value
        power = type(value) is int and 0 < value < 1 << 20 and value & (value - 1) == 0
        if value not in allowed if allowed else not power:
            expected = " or ".join(map(str, allowed)) if allowed else "a power of two"
            raise DamagedError(f"{key} {expected}", repr(value), file=source.folder / found[0].file)
        return int(value)

    rules = Rules(
        bits=number("bits", 4, *TEMPLATES),
        p=number("p", 2, 1, 2),
        group=number("group_size", 256, 64, 128, 256),
        size=number("hadamard_size", 512),
        tuned=_tuned(source, found),
    )
    if rules.size % rules.group:
        expected = f"hadamard_size of a multiple of group_size {rules.group}"
        raise DamagedError(expected, str(rules.size), file=source.folder / found[0].file)
    return rules


def _tuned(source: Checkpoint, found: list[common.Settings]) -> Mapping[str, Any]:
    tuned = common.agreed(source, found, "tune_metadata") or {}
    if not isinstance(tuned, Mapping):
        raise DamagedError("tune_metadata as an object", type(tuned).__name__, file=source.folder / found[0].file)
    return tuned


def _layer(source: Checkpoint, module: Module, rules: Rules) -> Layer:
    words = module.tensor("weight", ("int16",), 2)
    scales = module.tensor("scales", STORED, 2)
    (rows, groups), padded, entries = scales.shape, words.shape[1], 2**rules.bits
    if words.shape[0] * 16 != rows * rules.bits:
        raise module.error("weight", f"{rows} x {rules.bits} / 16 rows, as scales and bits say", str(list(words.shape)))
    if groups * rules.group != padded or padded % rules.size:
        expected = f"columns in blocks of {rules.size}, a scale for each {rules.group}"
        raise module.error("scales", expected, f"{padded} columns, {groups} scales")
    for part, dtypes, shape in (
        ("tables", STORED, (entries,)),
        ("tables2", ("float16",), (entries, entries, 2)),
    ):
        if (tensor := module.tensor(part, dtypes, len(shape))).shape != shape:
            raise module.error(part, f"{list(shape)}, as bits {rules.bits} says", str(list(tensor.shape)))
    tile = _tile(module, rules, rows, padded)
    run = 512 if rules.bits == 3 else tile * 16 // rules.bits
    if rows % run:
        raise module.error("weight", f"rows in {run}s", str(rows))
    sizes = roles.candidates(source.config, module.name)[1]
    cols = next((size for size in sizes if padded - rules.size < size <= padded), 0 if sizes else padded)
    if not cols:
        expected = f"{' or '.join(map(str, sizes))} columns by config.json, padded to a multiple of {rules.size}"
        raise module.error("weight", expected, str(padded))
    return Layer(module, rules, rows, cols, padded, tile, scales.dtype)


def _tile(module: Module, rules: Rules, rows: int, padded: int) -> int:
    """Rows of a tile, which only the number of the kernel's template tells."""
    tuned = rules.tuned.get(module.name)
    if not isinstance(tuned, Mapping):
        raise module.error("weight", "its tune_metadata in the settings, which say how it lies", "none")
    dtype = f"torch.{module.parts['scales'].dtype}"
    stated = {"N": rows, "K": padded, "num_bits": rules.bits, "group_size": rules.group, "dtype": dtype}
    for key, value in stated.items():
        if tuned.get(key, value) != value:
            raise module.error("weight", f"{key} {tuned[key]} by tune_metadata", str(value))
    template = tuned.get("template_id")
    if type(template) is not int or template not in TEMPLATES[rules.bits]:
        raise module.error("weight", f"a template_id of FLUTE for {rules.bits} bits", repr(template))
    return 64 if template in TALL[rules.bits] else 32


def _item(layer: Layer) -> Item:
    module = layer.module
    entry = Entry(
        weights=(module.weight,),
        shape=(layer.rows, layer.cols),
        stored_shape=None if layer.padded == layer.cols else (layer.rows, layer.padded),
        dtype=layer.dtype,  # type: ignore[arg-type]
        terms=(layer.term,),
        rotation=Rotation(in_=Side(size=layer.rules.size)),
        label="bit-exact",
    )
    consumes = tuple(f"{module.name}.{part}" for part in module.parts if part != "bias")
    return Item(module.weight, consumes, partial(_parts, layer), entry)


def _parts(layer: Layer) -> dict[str, Array]:
    module, bits = layer.module, layer.rules.bits
    words = module.array("weight")
    if not words.any():
        raise module.error("weight", "codes that differ", "0 throughout", hint=common.PARTIAL)
    codes = relaid(words.view(np.uint32), bits, layer.tile, layer.rules.p)
    scales, table = common.check_finite(module, "scales"), _table(layer)
    return {"codes": codes, "scales": scales, "table": table[None, None]}


def relaid(words: Array, bits: int, tile: int, p: int) -> Array:
    """uint32 [out · bits / 16, in / 2] -> qformat's codes, uint8 [out, in · bits / 8].

    A word holds the codes of a pair of inputs, the even one's above, for 16 / bits rows, ``tile`` rows apart. With 3
    bits three words hold them for 16 rows: five each, and two bits each of the last one.
    """
    tops = [words.reshape(-1, tile, words.shape[1])]
    if bits == 3:
        first, others = np.split(words, [len(words) // 3])
        others = others.reshape(-1, 2, tile, words.shape[1])
        tops = [first.reshape(-1, tile, words.shape[1]), others[:, 0], others[:, 1]]
    side = 16 if bits == 3 else 16 // bits  # neighbours whose codes of a row fill whole words
    codes = numbers(len(tops), side, 32)
    fives = [codes[..., at : at + 2 * bits] for at in range(0, 32 - 2 * bits + 1, 2 * bits)]
    rows = [each for five in fives for each in five]  # of each row, its codes in all neighbours
    if bits == 3:
        rows.append(np.concatenate([*codes[..., 30:]], axis=-1))
    order = np.stack(rows).reshape(len(rows), side, 2, bits)  # the even input's code is the upper half ...
    order = order[:, :, ::-1] if p == 1 else order  # ... and comes first where it is one of its own
    blocks, width = len(tops[0]), words.shape[1] // side
    out = np.empty((blocks, len(rows), tile, width, 2 * bits * side // 32), np.uint32)
    source = [top[..., neighbour::side] for top in tops for neighbour in range(side)]
    target = [out[:, row, ..., word] for row in range(len(rows)) for word in range(out.shape[-1])]
    rule = permutation(order)
    for block in range(blocks):
        permute(rule, [one[block] for one in source], [one[block] for one in target])
    return out.view(np.uint8).reshape(blocks * len(rows) * tile, -1)


def _table(layer: Layer) -> Array:
    """[entries, p] in the stored dtype, which tables2 has under the label of float16 whatever it is."""
    module, p = layer.module, layer.rules.p
    pairs = module.array("tables2").view(NUMPY[layer.dtype])
    if not np.isfinite(pairs.astype(np.float32)).all():
        raise module.error("tables2", f"finite numbers of {layer.dtype}", "others")
    if p == 2:
        return pairs.reshape(-1, 2)
    single = pairs[:, 0, 0]
    every = np.stack(np.broadcast_arrays(single[:, None], single[None]), axis=-1)
    for part, same in (("tables2", every), ("tables", single)):
        own = module.array(part)
        if own.tobytes() != np.ascontiguousarray(same).tobytes():
            raise module.error(part, "one number for each code, as p 1 says", "others")
    return single[:, None]


def _notes(source: Checkpoint, layers: list[Layer]) -> list[str]:
    notes = [f"{number} x {form}" for form, number in Counter(map(str, layers)).items()]
    unsure = [layer.module.name for layer in layers if not roles.candidates(source.config, layer.module.name)[1]]
    if unsure:
        notes.append(f"columns taken as stored, as config.json does not give them: {common.count(unsure, 'layer')}")
    return notes
