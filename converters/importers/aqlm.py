"""AQLM and PV-Tuning: sums of entries of several books, a scale for each row of tiles. Codes are kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from qformat.checkpoint import Checkpoint
from qformat.codecs import additive
from qformat.dtypes import Array
from qformat.errors import DamagedError, UnsupportedError
from qformat.manifest import Entry

from ..plan import Item, Plan, passed
from . import _common as common
from ._common import Module
from ._permute import pack

NAME = "aqlm"
PARTS = ("codes", "codebooks", "scales", "bias")
TRAINING = ("scales_clusters", "scales_indices")  # of checkpoints from before the conversion, as codes in int32 are
SKIPPED = "linear_weights_not_to_quantize"


@dataclass(frozen=True)
class Layer:
    module: Module
    params: additive.Params
    tiles: tuple[int, int]  # rows and columns of tiles
    dtype: str
    turned: bool  # the codes of a model that was saved after it had run on a CPU: [columns of tiles, rows, books]

    @property
    def shape(self) -> tuple[int, int]:
        return self.tiles[0] * self.params.group[0], self.tiles[1] * self.params.group[1]

    @property
    def term(self) -> dict[str, Any]:
        params = self.params
        sizes = {"bits": params.bits, "books": params.books, "group": list(params.group), "block": list(params.block)}
        return {"codec": additive.NAME, **sizes, "table": params.table, "scales": params.scales}

    def __str__(self) -> str:
        rows, cols = self.params.group
        turned = ", codes transposed by a CPU run" if self.turned else ""
        return f"{self.params.books} x {self.params.bits} bits, tiles of {rows} x {cols}{turned}"


def detect(source: Checkpoint) -> str:
    if method := common.method(source):
        return f'quant_method "{method}"' if method == NAME else ""
    for name in source.tensors:
        module, _, part = name.rpartition(".")
        if part == "codebooks" and all(f"{module}.{other}" in source.tensors for other in ("codes", "scales")):
            return f"{name} beside codes and scales; the settings name no quant_method"
    return ""


def plan(source: Checkpoint) -> Plan:
    found = list(common.settings(source))
    common.agreed(source, found, "quant_method")
    layers = [_layer(source, module) for module in _modules(source)]
    if not layers:
        raise DamagedError("packed weights: *.codebooks", "none", file=source.path)
    for layer in layers:
        _check_settings(source, found, layer)
    items = [_item(layer) for layer in layers]
    packed = [item.name for item in items]
    used = {name for item in items for name in item.consumes}
    notes = [f"{number} x {form}" for form, number in Counter(map(str, layers)).items()]
    if listed := _skipped(common.agreed(source, found, SKIPPED)) & {layer.module.name for layer in layers}:
        notes.append(f"packed though {SKIPPED} lists them: {common.count(listed, 'layer')}")
    return Plan(
        scheme=NAME,
        items=(*items, *passed(source, [name for name in source.tensors if name not in used])),
        config=common.target_config(source, packed),
        notes=(*notes, *common.notes(source, packed)),
        settings=common.merged(found),
    )


def _modules(source: Checkpoint) -> list[Module]:
    for name in source.tensors:
        path = name.split(".")
        if path[-1] in TRAINING or "quantized_weight" in path[:-1]:
            found = "a tensor of a checkpoint from training"
            hint = "AQLM's convert_to_hf.py makes a model of it"
            raise UnsupportedError("a converted model", found, file=source.file_of(name), weight=name, hint=hint)
    return common.modules(source, "codebooks", PARTS, never_alone=("codes",))


def _layer(source: Checkpoint, module: Module) -> Layer:
    books = module.tensor("codebooks", common.FLOATS, 4)
    count, entries, down, across = books.shape
    bits = entries.bit_length() - 1
    if entries != 1 << bits or bits < 1:
        raise module.error("codebooks", "books of 2, 4, 8, ... entries", str(entries))
    if bits > 16 or count > 256 or max(down, across) > 1024:
        found = f"{count} of 2**{bits}, {down} x {across}"
        expected = "at most 256 books of 2**16 entries, tiles within 1024 x 1024"
        file, name = source.file_of(f"{module.name}.codebooks"), f"{module.name}.codebooks"
        raise UnsupportedError(expected, found, file=file, weight=name)
    scales = module.tensor("scales", common.FLOATS, 4)
    rows = scales.shape[0]
    if scales.shape[1:] != (1, 1, 1):
        raise module.error("scales", "[rows of tiles, 1, 1, 1]", str(list(scales.shape)))
    codes = module.tensor("codes", ("int8",) if bits <= 8 else ("int16",), 3).shape
    turned = codes[0] != rows and codes[1] == rows
    if rows not in codes[:2] or codes[2] != count:
        raise module.error("codes", f"[{rows}, columns of tiles, {count}], as scales and books are", str(list(codes)))
    params = additive.Params(
        bits=bits,
        books=count,
        group=(down, across),
        table=books.dtype,  # type: ignore[arg-type]
        block=(down, -1),
        scales=scales.dtype,  # type: ignore[arg-type]
    )
    dtype = books.dtype if books.dtype == scales.dtype else "float32"
    layer = Layer(module, params, (rows, codes[0] if turned else codes[1]), dtype, turned)
    if "bias" in module.parts:
        bias = module.tensor("bias", common.FLOATS, 1).shape
        if bias != layer.shape[:1]:
            raise module.error("bias", str([layer.shape[0]]), str(list(bias)))
    return layer


def _check_settings(source: Checkpoint, found: Iterable[common.Settings], layer: Layer) -> None:
    """One setting of each kind holds for the whole model, and the books have them too."""
    (down, across), params = layer.params.group, layer.params
    stored = {"nbits_per_codebook": params.bits, "num_codebooks": params.books}
    for key, size in {**stored, "out_group_size": down, "in_group_size": across}.items():
        value = common.agreed(source, found, key)
        if value is not None and (type(value) is not int or value != size):
            shape = list(layer.module.parts["codebooks"].shape)
            expected = f"{key} {value!r}, as the settings say"
            raise layer.module.error("codebooks", expected, f"{size}, by its shape {shape}")


def _skipped(names: Any) -> set[str]:
    """Modules that are said to be dense. Parameters are listed, and by some versions of transformers their modules."""
    return {str(name).removesuffix(".weight") for name in names} if isinstance(names, list) else set()


def _item(layer: Layer) -> Item:
    module = layer.module
    entry = Entry(
        weights=(module.weight,),
        shape=layer.shape,
        dtype=layer.dtype,  # type: ignore[arg-type]
        terms=(layer.term,),
        label="bit-exact",
    )
    consumes = tuple(f"{module.name}.{part}" for part in ("codes", "codebooks", "scales"))
    return Item(module.weight, consumes, partial(_parts, layer), entry)


def _parts(layer: Layer) -> dict[str, Array]:
    module = layer.module
    scales = common.check_finite(module, "scales").reshape(-1, 1)
    return {"codes": _codes(layer), "scales": scales, "table": common.check_finite(module, "codebooks")}


def _codes(layer: Layer) -> Array:
    """The part of codes. They are stored signed: what is above the middle, less the number of entries."""
    params, codes = layer.params, layer.module.array("codes")
    if not codes.any():
        raise layer.module.error("codes", "codes that differ", "0 throughout", hint=common.PARTIAL)
    middle = 1 << (params.bits - 1)
    if params.bits not in (8, 16) and not -middle <= codes.min() <= codes.max() < middle:
        found = f"{codes.min()} to {codes.max()}"
        raise layer.module.error("codes", f"codes of {params.bits} bits: {-middle} to {middle - 1}", found)
    codes = codes.transpose(1, 0, 2) if layer.turned else codes
    rows, cols = layer.tiles
    if params.bits in (8, 16):  # their own bits
        return np.ascontiguousarray(codes).view(np.uint8).reshape(rows, cols, -1)
    part = additive.layout(params, layer.shape)[0]
    stream = pack(np.ascontiguousarray(codes).reshape(rows, -1), params.bits)
    if stream.size == math.prod(part.shape):
        return stream.reshape(part.shape)
    out = np.zeros((rows, math.prod(part.shape[1:])), np.uint8)
    out[:, : stream.shape[1]] = stream
    return out.reshape(part.shape)
