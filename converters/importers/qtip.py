"""QTIP and YAQA: trellis codes between Hadamard rotations of whole sides. Bits are re-laid, codes are kept.

Both write the same tensors and settings; nothing in a file tells them apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from qformat import rotation
from qformat.checkpoint import Checkpoint
from qformat.dtypes import Array
from qformat.errors import DamagedError, QformatError, UnsupportedError
from qformat.manifest import Entry
from qformat.rotation import Rotation, Side

from ..plan import Item, Plan, passed
from . import _common as common
from ._common import Module
from ._permute import numbers, permutation, permute

NAME = "qtip"
SETTINGS = "quip_params"  # of config.json; QuIP# has the same key, without a decode_mode
PARTS = ("trellis", "SU", "SV", "tlut", "rcp", "tp_rank", "bias")
CODES = {  # decode_mode -> our code, which is a table's where the module stores one
    **{name: name for name in ("1mad", "2mad", "3inst")},
    **{"quantlut": "lut", "quantlut_sym": "hyb", "lut": "table"},
}
TABLED = {"lut": (1, 12), "hyb": (1, 12), "table": (16, 16)}  # bits of an index into the stored table
STATE = 16  # bits of a state; others were never written
KERNEL = {
    "code": "hyb",
    "V": 2,
    "tile": (16, 16),
    "table_bits": 9,
}  # of their CUDA kernels, which have an order of bits
KERNEL_BITS = (2, 3, 4)
KERNEL_ORDER = "c0 r3 c3 c1 c2 r0 r1 r2"
LANES = 32
SPLIT = 8  # blocks of a side that is rotated in parts, for as many devices


@dataclass(frozen=True)
class Rules:
    """What the settings say of every layer."""

    bits: int
    v_bits: int | None  # of v_proj, where it has its own
    V: int
    code: str
    table_bits: int
    tile: tuple[int, int]
    skipped: frozenset[str]


@dataclass(frozen=True)
class Layer:
    """A packed layer ``[rows, cols]``; ``sizes`` are those of the Hadamard blocks, out and in."""

    module: Module
    rules: Rules
    rows: int
    cols: int
    bits: int
    sizes: tuple[int, int]

    @property
    def kernel(self) -> bool:
        """Whether the codes lie as the CUDA kernels read them; no setting says so."""
        return self.bits in KERNEL_BITS and all(getattr(self.rules, name) == value for name, value in KERNEL.items())

    @property
    def term(self) -> dict[str, Any]:
        rules, (high, wide) = self.rules, self.rules.tile
        row_major = [*(f"c{i}" for i in range(wide.bit_length() - 1)), *(f"r{i}" for i in range(high.bit_length() - 1))]
        term: dict[str, Any] = {"codec": "trellis", "L": STATE, "V": rules.V, "bits": [self.bits], "code": rules.code}
        term |= {"order": KERNEL_ORDER if self.kernel else " ".join(row_major), "reversed": True}
        if rules.tile != (16, 16):
            term["tile"] = list(rules.tile)
        if rules.code in ("lut", "hyb"):
            term["index"] = [rules.table_bits]
        if rules.code in TABLED:
            term["table"] = self.module.parts["tlut"].dtype
        return term

    @property
    def rotation(self) -> Rotation:
        into, out = (self.module.parts[name].dtype for name in ("SU", "SV"))
        return Rotation(in_=Side(size=self.sizes[1], scale=into), out=Side(size=self.sizes[0], scale=out))  # type: ignore[arg-type]

    def __str__(self) -> str:
        split = ", rotated in 8 blocks" if self.sizes != (self.rows, self.cols) else ""
        return f"{self.bits} bits, {self.rules.code}, {'kernel' if self.kernel else 'plain'} order{split}"


def detect(source: Checkpoint) -> str:
    params = source.config.get(SETTINGS)
    return f"{SETTINGS} with a decode_mode" if isinstance(params, Mapping) and "decode_mode" in params else ""


def plan(source: Checkpoint) -> Plan:
    rules = _rules(source)
    modules = common.modules(source, "trellis", PARTS, never_alone=("SU", "SV", "tlut", "rcp", "tp_rank"))
    if not modules:
        raise DamagedError("packed weights: *.trellis", "none", file=source.path)
    layers = [_layer(module, rules) for module in modules]
    items = [_item(layer) for layer in layers]
    packed = [item.name for item in items]
    used = {name for item in items for name in item.consumes}
    config = common.target_config(source, packed)
    settings = config.pop(SETTINGS)
    return Plan(
        scheme=NAME,
        items=(*items, *passed(source, [name for name in source.tensors if name not in used])),
        config=config,
        notes=(*_notes(layers), *common.notes(source, packed)),
        settings=settings,
    )


def _rules(source: Checkpoint) -> Rules:
    params, file = source.config.get(SETTINGS), source.folder / "config.json"
    if not isinstance(params, Mapping):
        raise DamagedError(f"{SETTINGS} as an object", repr(params), file=file)

    def number(key: str, least: int, most: int) -> int:
        value = params.get(key)
        if type(value) is not int or not least <= value <= most:
            raise DamagedError(f"{SETTINGS}.{key} from {least} to {most}", repr(value), file=file)
        return value

    def known(key: str, *values: Any) -> None:
        if params.get(key) not in values:
            expected = " or ".join(repr(value) for value in values if value is not None)
            raise UnsupportedError(f"{SETTINGS}.{key} {expected}", repr(params.get(key)), file=file)

    known("codebook", "bitshift", None)
    known("codebook_version", 0, None)
    known("L", STATE)
    known("V", 1, 2)
    known("decode_mode", *CODES)
    code = CODES[params["decode_mode"]]
    skipped = params.get("skip_list") or []
    if not isinstance(skipped, list):
        raise DamagedError(f"{SETTINGS}.skip_list as a list", repr(skipped), file=file)
    return Rules(
        bits=number("K", 1, 8),
        v_bits=number("K_v_proj", 1, 8) if params.get("K_v_proj") is not None else None,
        V=params["V"],
        code=code,
        table_bits=number("tlut_bits", *TABLED[code]) if code in TABLED else 0,
        tile=(number("td_x", 1, 4096), number("td_y", 1, 4096)),
        skipped=frozenset(map(str, skipped)),
    )


def _layer(module: Module, rules: Rules) -> Layer:
    (cols,), (rows,) = (module.tensor(name, common.FLOATS, 1).shape for name in ("SU", "SV"))
    high, wide = rules.tile
    if rows % high or cols % wide:
        raise module.error("SV" if rows % high else "SU", f"whole tiles of {high} x {wide}", f"{rows} x {cols}")
    bits = _bits(module, rules, rows, cols)
    if rules.code in TABLED:
        entries = [2**rules.table_bits, rules.V]
        tensor = module.tensor("tlut", common.FLOATS, 2)
        if list(tensor.shape) != entries:
            raise module.error("tlut", f"{entries}, as tlut_bits and V say", str(list(tensor.shape)))
    elif "tlut" in module.parts:
        raise module.error("tlut", f"none beside decode_mode {rules.code}", "one")
    layer = Layer(module, rules, rows, cols, bits, _sizes(module, rows, cols))
    if layer.kernel and (rows % LANES or cols % LANES):
        raise module.error("trellis", "rows and columns in 32s for the kernels' order", f"{rows} x {cols}")
    return layer


def _bits(module: Module, rules: Rules, rows: int, cols: int) -> int:
    """Bits a weight, which the size of the codes tells; held against the settings."""
    found = module.tensor("trellis", ("int16",), 2)
    own = module.name.endswith("v_proj")
    stated = (rules.v_bits if own else None) or rules.bits
    bits, rest = divmod(8 * found.nbytes, rows * cols)
    if rest or not 1 <= bits <= 8 or (bits != stated and not (own and rules.v_bits is None)):
        expected = (
            f"[tiles, words] with {rows * cols * stated // 16} numbers, {stated} bits for {rows} x {cols} weights"
        )
        raise module.error("trellis", expected, str(list(found.shape)))
    return bits


def _sizes(module: Module, rows: int, cols: int) -> tuple[int, int]:
    """Of the Hadamard blocks: the whole side, or an eighth of the one that was to be split between devices."""
    module.tensor("rcp", ("int64",), 0)
    split = int(module.array("rcp"))
    if split not in (0, 1, 2):
        raise module.error("rcp", "0, 1 or 2", str(split))
    if split and "tp_rank" in module.parts and (ranks := int(module.array("tp_rank"))) != SPLIT:
        raise module.error("tp_rank", f"{SPLIT}, which is all that was ever written", str(ranks))
    if (side := {0: 0, 1: cols, 2: rows}[split]) % SPLIT:
        raise module.error("rcp", f"{SPLIT} equal blocks of a side", f"{split}, for a side of {side}")
    sizes = (rows // SPLIT if split == 2 else rows, cols // SPLIT if split == 1 else cols)
    try:
        for size in sizes:
            rotation.order(size)
    except QformatError as error:
        raise error.located(weight=module.weight) from None
    return sizes


def _item(layer: Layer) -> Item:
    module = layer.module
    entry = Entry(
        weights=(module.weight,),
        shape=(layer.rows, layer.cols),
        dtype=module.parts["SU"].dtype,  # type: ignore[arg-type]
        terms=(layer.term,),
        rotation=layer.rotation,
        label="bit-exact",
    )
    consumes = tuple(f"{module.name}.{part}" for part in module.parts if part != "bias")
    return Item(module.weight, consumes, partial(_parts, layer), entry)


def _parts(layer: Layer) -> dict[str, Array]:
    module, (high, wide) = layer.module, layer.rules.tile
    trellis = module.array("trellis")
    if not trellis.any():
        raise module.error("trellis", "codes that differ", "0 throughout", hint=common.PARTIAL)
    shift = STATE - layer.bits * layer.rules.V  # windows here begin where theirs end
    strings = (
        kernel_strings(trellis, layer.rows, layer.cols, shift)
        if layer.kernel
        else plain_strings(trellis, layer.rows * layer.cols // (high * wide), shift)
    )
    parts = {"codes": strings.reshape(layer.rows // high, layer.cols // wide, -1)}
    if "tlut" in module.parts:
        parts["table"] = common.check_finite(module, "tlut")
    return {**parts, "in_scale": common.check_finite(module, "SU"), "out_scale": common.check_finite(module, "SV")}


def plain_strings(trellis: Array, tiles: int, shift: int) -> Array:
    """int16 words of ``tiles`` tiles -> uint8 [tiles, bytes]: bits that were counted down from the top of the first
    word now count up from the bottom of the last, which comes first. Of a cyclic string bit j goes to j + ``shift``.
    """
    stored = trellis.reshape(tiles, -1)
    if stored.shape[1] % 2 or stored.shape[1] > 512:
        return _turned(np.ascontiguousarray(stored[:, ::-1]).view(np.uint8), shift)
    out = np.empty_like(stored)
    order = np.roll(numbers(stored.shape[1], 16)[::-1], shift)
    permute(permutation(order), stored.view(np.uint32).T, out.view(np.uint32).T)
    return out.view(np.uint8)


def kernel_strings(trellis: Array, rows: int, cols: int, shift: int) -> Array:
    """The same for codes in the order of the CUDA kernels: bytes [row of 2 x 2 tiles, column of them, lane, column
    tile, row tile, byte], of which the lanes run backwards.
    """
    bits = 8 * trellis.nbytes // (rows * cols)
    lanes = numbers(LANES, 2, 2, 8 * bits)[::-1]
    strings = np.roll(lanes.transpose(2, 1, 0, 3).reshape(2, 2, -1), shift, axis=-1)
    out = np.empty((rows // 32, 2, cols // 32, 2, 8 * bits), np.uint32)
    stored = trellis.reshape(-1).view(np.uint32).reshape(rows // 32, cols // 32, -1)
    permute(permutation(strings), np.moveaxis(stored, -1, 0), out.transpose(1, 3, 4, 0, 2))
    return out.view(np.uint8).reshape(rows * cols // 256, -1)


def _turned(strings: Array, bits: int) -> Array:
    turned, bit = np.roll(strings, bits // 8, axis=-1), bits % 8
    return turned << bit | np.roll(turned, 1, axis=-1) >> (8 - bit) if bit else turned


def _notes(layers: list[Layer]) -> list[str]:
    notes = [f"{number} x {form}" for form, number in Counter(map(str, layers)).items()]
    skipped = [layer.module.name for layer in layers if _short(layer.module.name) in layer.rules.skipped]
    if skipped:
        notes.append(f"packed though skip_list excludes them: {common.count(skipped, 'layer')}")
    return notes


def _short(module: str) -> str:
    """``model.layers.3.mlp.up_proj`` as skip_list has it: ``3_up``."""
    *_, layer, _, name = ("", "", *module.split("."))
    return f"{layer}_{name.removesuffix('_proj')}"
