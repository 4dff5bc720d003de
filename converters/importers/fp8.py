"""FP8 as DeepSeek, FBGEMM, ModelOpt, compressed-tensors and transformers write it: a scale for each tile, row, expert
or tensor. Weights whose dtype is int8 are pairs of FP4 numbers. Codes and scales are carried as they are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from qformat import blocks
from qformat.checkpoint import Checkpoint
from qformat.codecs import float as codec
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError, UnsupportedError
from qformat.kernels.native import stretches
from qformat.manifest import Entry
from qformat.shards import Tensor

from ..plan import Item, Plan, passed
from ..quantize.select import TRANSPOSED_EXPERTS
from . import _common as common
from . import _roles as roles

NAME = "fp8"
METHODS = ("fp8", "fbgemm_fp8")
SHARED = ("modelopt", "compressed-tensors", "quark")  # methods that name FP8 and much else: the tensors decide
FORMATS = {"F8_E4M3": "e4m3fn", "F8_E5M2": "e5m2", "F8_E4M3FNUZ": "e4m3fnuz", "F8_E5M2FNUZ": "e5m2fnuz"}
SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight", "scale_weight", "scale")  # all of them multiply
ACTIVATIONS = ("activation_scale", "input_scale", "input_scale_ub", "qscale_act", "scale_input")
CACHE = ("k_scale", "v_scale")
MARKER = "scaled_fp8"  # an empty tensor that says of the others what they are
SCALE_DTYPES = ("float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8")
EXPONENTS = ("float8_e8m0fnu", "uint8")  # uint8 scales are exponents, too
GROUP = 32  # columns that share an exponent
TILE = (128, 128)  # of scales with four axes, which say no other
AT_ONCE = 32  # rows that are checked at a time: stays in the cache
LARGEST = 4096  # numbers of an activation scale that a manifest takes


@dataclass(frozen=True)
class Layer:
    """A packed weight ``[stack..., out, in]``; ``scale`` names the tensor with its scales, ``grid`` is their shape."""

    source: Checkpoint
    name: str
    tensor: Tensor
    transposed: bool
    scale: str
    block: tuple[int, int]
    activations: Mapping[str, str]  # what they are called -> the tensor

    @property
    def format(self) -> str:
        return FORMATS.get(self.tensor.tag, "e2m1")

    @property
    def matrix(self) -> tuple[int, int]:
        rows, cols = self.tensor.shape[-2:]
        return (cols, rows) if self.transposed else (rows, 2 * cols if self.format == "e2m1" else cols)

    @property
    def scales(self) -> str:
        dtype = self.source.tensors[self.scale].dtype
        return "float8_e8m0fnu" if dtype in EXPONENTS else dtype

    def __str__(self) -> str:
        block = " x ".join("all" if size == -1 else str(size) for size in self.block)
        return f"{self.format}, {self.scales} scales of {block}"


def detect(source: Checkpoint) -> str:
    method = common.method(source)
    if method in METHODS:
        return f'quant_method "{method}"'
    if method and method not in SHARED:
        return ""
    weights = [name for name in source.tensors if _is_weight(source, name)]
    kinds = {tensor.dtype for name, tensor in source.tensors.items() if not _partner(name, SCALES)}
    others = any(
        one.values.get(key) for one in common.settings(source) for key in ("transform_config", "sparsity_config")
    )
    if not weights or others or kinds - {*common.FLOATS, *(source.tensors[name].dtype for name in weights)}:
        return ""
    beside = f'quant_method "{method}"' if method else "the settings name no quant_method"
    return f"{weights[0]} is {source.tensors[weights[0]].dtype}; {beside}"


def plan(source: Checkpoint) -> Plan:
    found = list(common.settings(source))
    tiles = _tiles(source, found)
    layers = [_layer(source, name, tiles) for name in source.tensors if _is_weight(source, name)]
    if not layers:
        raise DamagedError("packed weights: float8 beside their scales", "none", file=source.path)
    _check(source, found, layers)
    items = [_item(source, layer) for layer in layers]
    used = {name for item in items for name in item.consumes}
    loose = (*ACTIVATIONS, *CACHE, MARKER)
    spare = [name for name in source.tensors if name not in used and name.rpartition(".")[2] in loose]
    packed = [item.name for item in items]
    return Plan(
        scheme=NAME,
        items=(*items, *passed(source, [name for name in source.tensors if name not in (*used, *spare)])),
        config=common.target_config(source, packed),
        left_out=tuple(spare),
        activations=_activations(source, found, layers),
        kv_cache=_numbers(source, {name: name for name in spare if name.rpartition(".")[2] in CACHE}) or None,
        notes=(*_notes(found, layers), *common.notes(source, packed)),
        settings=common.merged(found),
    )


def _base(name: str) -> str:
    """What the names of a weight's partners start with: of ``X.weight`` it is ``X.``, of fused experts ``X_``."""
    return name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"


def _partners(source: Checkpoint, name: str, kinds: Iterable[str]) -> dict[str, str]:
    """kind -> tensor; fused experts' scales are ``X_scale``, ``X_scale_inv`` or ``X_weight_scale``."""
    found = {kind: _base(name) + kind for kind in kinds}
    if not name.endswith(".weight"):
        found["scale_inv"] = f"{name}_scale_inv"
    return {kind: tensor for kind, tensor in found.items() if tensor in source.tensors}


def _partner(name: str, kinds: Iterable[str]) -> bool:
    return any(name.endswith((f".{kind}", f"_{kind}")) for kind in (*kinds, "scale_inv"))


def _is_weight(source: Checkpoint, name: str) -> bool:
    """Float8 numbers that are no scale of another tensor, or int8 ones beside exponents: FP4."""
    tensor = source.tensors[name]
    if tensor.tag in FORMATS:
        return name != MARKER and not _partner(name, (*SCALES, *ACTIVATIONS))
    beside = _partners(source, name, SCALES).values() if tensor.tag == "I8" else ()
    return any(source.tensors[scale].dtype in EXPONENTS for scale in beside)


def _tiles(source: Checkpoint, found: list[common.Settings]) -> set[tuple[int, int]]:
    """The tiles that the settings name."""
    named = [common.agreed(source, found, "weight_block_size")]
    for one in found:
        groups = one.values.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            named.append(weights.get("block_structure") if isinstance(weights, Mapping) else None)
    tiles = set()
    for tile in named:
        if tile is None:
            continue
        tile = [int(size) for size in tile.split("x") if size.isdecimal()] if isinstance(tile, str) else tile
        if not isinstance(tile, list) or len(tile) != 2 or not all(type(n) is int and 0 < n < 1 << 32 for n in tile):
            raise DamagedError("weight_block_size of two sizes", repr(tile), file=source.path)
        tiles.add((tile[0], tile[1]))
    return tiles


def _layer(source: Checkpoint, name: str, tiles: set[tuple[int, int]]) -> Layer:
    tensor, file = source.tensors[name], source.file_of(name)
    if len(tensor.shape) not in (2, 3) or 0 in tensor.shape:
        raise UnsupportedError("a matrix, or a stack of them", str(list(tensor.shape)), file=file, weight=name)
    scales = _partners(source, name, SCALES)
    if len(scales) != 1:
        expected = f"one scale beside it, such as {_base(name)}{SCALES[0] if name.endswith('.weight') else 'scale_inv'}"
        raise DamagedError(expected, " and ".join(scales) or "none", file=file, weight=name)
    fused = len(tensor.shape) == 3
    transposed = fused and roles.part_of(source.config, name).get("model_type") in TRANSPOSED_EXPERTS
    (scale,) = scales.values()
    layer = Layer(source, name, tensor, transposed, scale, (-1, -1), _partners(source, name, ACTIVATIONS))
    if transposed and layer.format == "e2m1":
        raise UnsupportedError("FP8 where inputs come first", "int8: pairs of FP4 numbers", file=file, weight=name)
    return Layer(source, name, tensor, transposed, scale, _block(layer, tiles), layer.activations)


def _block(layer: Layer, tiles: set[tuple[int, int]]) -> tuple[int, int]:
    """What shares a scale, from the shape of the scales and the tiles that the settings name.

    Raises :class:`DamagedError` where it fits none, or several.
    """
    scale = layer.source.tensors[layer.scale]
    (rows, cols), lead = layer.matrix, layer.tensor.shape[:-2]
    places = {(-1, -1): [(), (1,), lead, (*lead, 1, 1)], (1, -1): [(*lead, rows), (*lead, rows, 1), (*lead, 1, rows)]}
    if not layer.transposed:
        places[1, -1].pop()
    groups = [_oriented(layer, blocks.grid((1, GROUP), (rows, cols)))]
    if layer.format == "e2m1":
        places = {(1, GROUP): groups}
    elif tiles:
        kept = {tile: [_oriented(layer, blocks.grid(tile, (rows, cols)))] for tile in tiles}
        places = kept if len(kept) == 1 and "weight_scale_inv" in layer.scale else {**places, **kept}
    elif len(scale.shape) == 4:
        down, across = blocks.grid(TILE, (rows, cols))
        places = {TILE: [(down, 1, across, 1)]}
    elif scale.dtype in EXPONENTS:
        places[1, GROUP] = groups
    fitting = {blocks.size(block, (rows, cols)): block for block, shapes in places.items() if scale.shape in shapes}
    if scale.dtype not in SCALE_DTYPES or len(fitting) != 1:
        shapes = " or ".join(str(list(shape)) for shape in dict.fromkeys(s for one in places.values() for s in one))
        raise DamagedError(
            f"{' or '.join(SCALE_DTYPES)} scales of shape {shapes} for {list(layer.tensor.shape)}",
            f"{scale.dtype} {list(scale.shape)}",
            file=layer.source.file_of(layer.scale),
            weight=layer.scale,
            hint="" if tiles else "the tile of a block scale is weight_block_size in config.json",
        )
    return next(iter(fitting.values()))


def _oriented(layer: Layer, grid: tuple[int, int]) -> tuple[int, ...]:
    return (*layer.tensor.shape[:-2], *(grid[::-1] if layer.transposed else grid))


def _check(source: Checkpoint, found: list[common.Settings], layers: list[Layer]) -> None:
    """Raise :class:`DamagedError` where settings contradict tensors, or a scale has no weight."""
    named = common.agreed(source, found, "fmt")
    for layer in layers:
        if isinstance(named, str) and layer.format != "e2m1" and not layer.format.startswith(named.lower()):
            expected, file = f"{named}, as fmt in the settings says", source.file_of(layer.name)
            raise DamagedError(expected, layer.tensor.dtype, file=file, weight=layer.name)
    used = {layer.scale for layer in layers}
    for name in source.tensors:
        last = name.rpartition(".")[2]
        if name not in used and (last in SCALES[:-1] or last.endswith("_scale_inv")):
            raise DamagedError("a float8 weight beside it", "none", file=source.file_of(name), weight=name)


def _item(source: Checkpoint, layer: Layer) -> Item:
    *lead, rows, cols = (*layer.tensor.shape[:-2], *layer.matrix)
    dtype = next((value for key in ("dtype", "torch_dtype") if (value := source.config.get(key))), None)
    term: dict[str, Any] = {
        "codec": "float",
        "format": layer.format,
        "block": list(layer.block),
        "scales": layer.scales,
    }
    entry = Entry(
        weights=(layer.name,),
        shape=(*lead, cols, rows) if layer.transposed else (*lead, rows, cols),
        dtype=dtype if dtype in common.FLOATS else "bfloat16",
        terms=(term,),
        label="bit-exact",
        stack=len(lead),
        transposed=layer.transposed,
    )
    return Item(layer.name, (layer.name, layer.scale, *layer.activations.values()), partial(_parts, layer), entry)


def _parts(layer: Layer) -> dict[str, Array]:
    source, (rows, cols), lead = layer.source, layer.matrix, layer.tensor.shape[:-2]
    codes = source.raw(layer.name).reshape(layer.tensor.shape)
    rows_of_all = codes.reshape(-1, codes.shape[-1])
    if count := sum(codec.special(layer.format, rows_of_all[here]) for here in stretches(len(rows_of_all), AT_ONCE)):
        raise DamagedError(
            "finite numbers", f"{count} that are not", file=source.file_of(layer.name), weight=layer.name
        )
    scales = source.array(layer.scale)
    scales = scales.view(NUMPY["float8_e8m0fnu"]) if scales.dtype == np.uint8 else scales
    finite = np.isfinite(scales.astype(np.float32))
    if not finite.all():
        found = f"{int((~finite).sum())} that are not"
        raise DamagedError("finite numbers", found, file=source.file_of(layer.scale), weight=layer.scale)
    grid = blocks.grid(layer.block, (rows, cols))
    if layer.transposed:
        codes = codes.swapaxes(-1, -2)
        if layer.block not in ((-1, -1), (1, -1)):
            scales = scales.swapaxes(-1, -2)
    if scales.size == 1:  # one for all experts
        scales = np.broadcast_to(scales.reshape(()), (*lead, *grid))
    return {"codes": np.ascontiguousarray(codes), "scales": np.ascontiguousarray(scales.reshape(*lead, *grid))}


def _activations(source: Checkpoint, found: list[common.Settings], layers: list[Layer]) -> dict[str, Any] | None:
    """The source's scheme for activations, and their scales by kind and weight; None where there is neither."""
    scheme = common.agreed(source, found, "activation_scheme")
    out: dict[str, Any] = {} if scheme is None else {"scheme": scheme}
    for kind in ACTIVATIONS:
        named = {layer.name: layer.activations[kind] for layer in layers if kind in layer.activations}
        if named:
            out[kind] = _numbers(source, named)
    return out or None


def _numbers(source: Checkpoint, named: Mapping[str, str]) -> dict[str, Any]:
    """Key -> what a small tensor of floats holds: a number, or a list where it has several."""
    out = {}
    for key, name in named.items():
        tensor, file = source.tensors[name], source.file_of(name)
        if tensor.dtype not in common.FLOATS or not 0 < math.prod(tensor.shape) <= LARGEST:
            expected = f"1 to {LARGEST} numbers of {' or '.join(common.FLOATS)}"
            raise DamagedError(expected, f"{tensor.dtype} {list(tensor.shape)}", file=file, weight=name)
        values = source.array(name).astype(np.float32)
        if not np.isfinite(values).all():
            raise DamagedError("finite numbers", "others", file=file, weight=name)
        out[key] = float(values.reshape(-1)[0]) if values.size == 1 else values.tolist()
    return out


def _notes(found: list[common.Settings], layers: list[Layer]) -> list[str]:
    notes = [f"{number} x {form}" for form, number in Counter(map(str, layers)).items()]
    keys = ("modules_to_not_convert", "ignored_layers", "ignore")
    lists = [value for one in found for key in keys if isinstance(value := one.values.get(key), list)]
    listed = {name for names in lists for name in names if isinstance(name, str)}
    if both := [layer.name for layer in layers if layer.name.removesuffix(".weight") in listed]:
        notes.append(f"packed although the settings exclude them: {common.count(both, 'weight')}")
    return notes
