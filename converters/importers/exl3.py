"""EXL3 (exllamav3): trellis codes with a Hadamard rotation of 128 on both sides. Bits are re-laid, codes are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from qformat.checkpoint import Checkpoint
from qformat.codecs._trellis_codes import MULTIPLIERS
from qformat.dtypes import Array
from qformat.errors import DamagedError
from qformat.manifest import Entry
from qformat.rotation import Rotation, Side
from qformat.shards import Spec

from ..plan import Item, Plan, passed
from . import _common as common
from . import _roles as roles
from ._common import Module

NAME = "exl3"
BLOCK = 128  # both sides are padded to a multiple of it, and rotated in blocks of it
TILE = 16
ORDER = "c0 c3 r3 c1 c2 r0 r1 r2"  # of the 256 elements of a tile, [out, in], last step first
SCALES = {"in": ("suh", "su"), "out": ("svh", "sv")}  # float16, and the oldest files' packed signs
PARTS = ("trellis", "suh", "svh", "su", "sv", "mcg", "mul1", "bias", "scale")
UNUSED = "scale"  # never written by a released version, never read


@dataclass(frozen=True)
class Layer:
    """A packed layer ``[rows, cols]``, stored padded to ``stored``; the code is a bit pattern's arithmetic."""

    module: Module
    rows: int
    cols: int
    stored: tuple[int, int]
    bits: int
    code: str
    multiplier: int | None
    scales: dict[str, str]  # side -> the tensor that holds its vector

    @property
    def term(self) -> dict[str, Any]:
        term = {"codec": "trellis", "L": 16, "bits": [self.bits], "code": self.code, "order": ORDER, "reversed": True}
        return term if self.multiplier is None else {**term, "multiplier": self.multiplier}

    @property
    def rotation(self) -> Rotation:
        def side(name: str) -> Side:
            return Side(size=BLOCK, scale="float16" if self.scales[name] == SCALES[name][0] else "int8")

        return Rotation(in_=side("in"), out=side("out"))

    def __str__(self) -> str:
        multiplier = f" with multiplier {self.multiplier:#x}" if self.multiplier is not None else ""
        padded = ", padded" if self.stored != (self.rows, self.cols) else ""
        signs = ", signs alone" if "su" in self.scales.values() else ""
        return f"{self.bits} bits, {self.code}{multiplier}{padded}{signs}"


def detect(source: Checkpoint) -> str:
    if method := common.method(source):
        return f'quant_method "{method}"' if method == NAME else ""
    for name, tensor in source.tensors.items():
        module, _, part = name.rpartition(".")
        beside = any(f"{module}.{scale}" in source.tensors for scale in SCALES["in"])
        if part == "trellis" and len(tensor.shape) == 3 and beside:
            return f"{name} beside its scales; the settings name no quant_method"
    return ""


def plan(source: Checkpoint) -> Plan:
    found = list(common.settings(source))
    common.agreed(source, found, "quant_method", "method")
    modules = common.modules(source, "trellis", PARTS, never_alone=("suh", "svh", "mcg", "mul1"))
    layers = [_layer(source, module) for module in modules]
    if not layers:
        raise DamagedError("packed weights: *.trellis", "none", file=source.path)
    items = [_item(layer) for layer in layers]
    packed = [item.name for item in items]
    items += [_bias(layer) for layer in layers if "bias" in layer.module.parts]
    left_out = [f"{layer.module.name}.{UNUSED}" for layer in layers if UNUSED in layer.module.parts]
    used = {*left_out, *(name for item in items for name in item.consumes)}
    return Plan(
        scheme=NAME,
        items=(*items, *passed(source, [name for name in source.tensors if name not in used])),
        config=common.target_config(source, packed),
        left_out=tuple(left_out),
        notes=(*_notes(source, layers, found), *common.notes(source, packed)),
        settings=common.merged(found),
    )


def _layer(source: Checkpoint, module: Module) -> Layer:
    down, across, width = module.tensor("trellis", ("int16",), 3).shape
    stored = (across * TILE, down * TILE)
    if width % TILE or not 1 <= width // TILE <= 8 or stored[0] % BLOCK or stored[1] % BLOCK:
        expected = f"[in / 16, out / 16, 16 K] with K from 1 to 8, in and out in {BLOCK}s"
        raise module.error("trellis", expected, str([down, across, width]))
    code, multiplier = _code(module)
    sizes = roles.candidates(source.config, module.name)
    rows, cols = (_unpadded(module, size, known) for size, known in zip(stored, sizes, strict=True))
    scales = {side: _scale(module, side, stored[side == "in"]) for side in SCALES}
    return Layer(module, rows, cols, stored, width // TILE, code, multiplier, scales)


def _code(module: Module) -> tuple[str, int | None]:
    """By the tensor that is there, not by the settings: files are merged from several conversions."""
    found = [code for code in MULTIPLIERS if code in module.parts]
    if not found:
        return "3inst", None
    if len(found) > 1:
        raise module.error("mcg", "one code", "mul1 beside it: the library's quantizer and its kernels disagree on it")
    tensor = module.parts[found[0]]
    if tensor.dtype != "int32" or tensor.nbytes != 4:
        raise module.error(found[0], "int32 []", f"{tensor.dtype} {list(tensor.shape)}")
    multiplier = int(module.array(found[0]).reshape(()).view(np.uint32))
    if multiplier == 0:
        raise module.error(found[0], "a multiplier", "0")
    return found[0], None if multiplier == MULTIPLIERS[found[0]] else multiplier


def _unpadded(module: Module, stored: int, candidates: Iterable[int]) -> int:
    """The size that config.json gives for what is stored padded; as stored where it gives none."""
    candidates = list(candidates)
    for size in candidates or [stored]:
        if -(-size // BLOCK) * BLOCK == stored:
            return size
    sizes = " or ".join(map(str, candidates))
    raise module.error("trellis", f"{sizes} by config.json, padded to a multiple of {BLOCK}", str(stored))


def _scale(module: Module, side: str, length: int) -> str:
    """The name of the tensor with a side's vector, checked."""
    now, once = SCALES[side]
    if now in module.parts and once in module.parts:
        raise module.error(once, f"one of {now} and {once}", "both")
    name = once if once in module.parts else now
    tensor = module.tensor(name, ("int16",) if name == once else ("float16",), 1)
    expected = length // 16 if name == once else length
    if tensor.shape != (expected,):
        raise module.error(name, str([expected]), str(list(tensor.shape)))
    return name


def _item(layer: Layer) -> Item:
    module = layer.module
    entry = Entry(
        weights=(module.weight,),
        shape=(layer.rows, layer.cols),
        stored_shape=None if layer.stored == (layer.rows, layer.cols) else layer.stored,
        dtype="float16",
        terms=(layer.term,),
        rotation=layer.rotation,
        label="bit-exact",
    )
    consumes = tuple(f"{module.name}.{part}" for part in module.parts if part not in ("bias", UNUSED))
    return Item(module.weight, consumes, partial(_parts, layer), entry)


def _parts(layer: Layer) -> dict[str, Array]:
    trellis = layer.module.array("trellis")
    if not trellis.any():
        raise layer.module.error("trellis", "codes that differ", "0 throughout", hint=common.PARTIAL)
    scales = {f"{side}_scale": _vector(layer.module, name) for side, name in layer.scales.items()}
    return {"codes": relaid(trellis), **scales}


def relaid(trellis: Array) -> Array:
    """int16 [in / 16, out / 16, 16 K] -> uint8 [out / 16, in / 16, 32 K].

    The bits of a tile were counted down from the top of the first 32-bit word; now they count up from the bottom of the
    last, which comes first.
    """
    words = trellis.view(np.uint32).transpose(1, 0, 2)
    return np.ascontiguousarray(words[:, :, ::-1]).view(np.uint8)


def _vector(module: Module, name: str) -> Array:
    if name in ("suh", "svh"):
        return common.check_finite(module, name)
    negative = np.unpackbits(module.array(name).view(np.uint8), bitorder="little")
    return (1 - 2 * negative.astype(np.int8)).astype(np.int8)


def _bias(layer: Layer) -> Item:
    """The bias, cut as the rows are."""
    module, name = layer.module, f"{layer.module.name}.bias"
    tensor = module.tensor("bias", common.FLOATS, 1)
    if tensor.shape[0] not in (layer.rows, layer.stored[0]):
        raise module.error("bias", str([layer.stored[0]]), str(list(tensor.shape)))
    return Item(name, (name,), lambda: {"": module.array("bias")[: layer.rows]}, dense=Spec(tensor.tag, (layer.rows,)))


def _notes(source: Checkpoint, layers: list[Layer], found: list[common.Settings]) -> list[str]:
    notes = [f"{number} x {form}" for form, number in Counter(map(str, layers)).items()]
    unsure = [layer.module.name for layer in layers if not all(roles.candidates(source.config, layer.module.name))]
    if unsure:
        notes.append(f"sizes taken as stored, as config.json does not give them: {common.count(unsure, 'layer')}")
    listed = {name for one in found for name in _listed(one.values.get("tensor_storage"))}
    if missing := listed - source.tensors.keys():
        notes.append(f"listed in tensor_storage but not stored: {common.count(missing, 'tensor')}")
    return notes


def _listed(storage: Any) -> Iterable[str]:
    modules = storage.values() if isinstance(storage, dict) else ()
    return [name for one in modules if isinstance(one, dict) for name in (one.get("stored_tensors") or ())]
