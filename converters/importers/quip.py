"""QuIP#: codes of the lattice E8 (and older codebooks), one Hadamard transform over the whole of each side. Codes are
re-laid; scales are folded into one vector a side; what was fused stays so, as one transform spans it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from qformat.checkpoint import Checkpoint
from qformat.codecs import e8p
from qformat.dtypes import Array
from qformat.errors import DamagedError, QformatError, UnsupportedError
from qformat.kernels.native import stretches
from qformat.manifest import Entry, Piece
from qformat.rotation import Rotation, Side
from qformat.shards import spec
from qformat.weight import layout

from ..plan import Item, Plan, passed
from . import _common as common
from . import _roles as roles
from ._common import Module
from ._permute import numbers, permutation, permute
from ._words import transposed

NAME = "quip"
SETTINGS = "quip_params"  # of config.json
PARTS = ("Qidxs", "codebook_id", "SU", "SV", "Wscale", "fuse_scales", "scaleWH", "bias")
REFUSED = ("A", "B", "ocs_dupe_inds")  # low-rank corrections and split outliers of versions that never agreed on them
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "upgate_proj": ("up_proj", "gate_proj")}
TILE = (16, 64)  # rows and columns that 32 words of E8P codes hold
AT_ONCE = 16  # tiles down that are re-laid at a time
NIBBLES = (7, 3, 6, 2, 5, 1, 4, 0)  # where the columns of eight lie in a word of hi4b1c


class Codebook(NamedTuple):
    """``units``: rows and columns that come together; ``words``: of Qidxs in a row of as many columns."""

    id: int
    version: int
    dtype: str
    units: tuple[int, int]
    words: int
    relaid: Callable[[Array, tuple[int, int]], tuple[Array, ...]]  # Qidxs and shape -> the codes of each term
    terms: tuple[dict[str, Any], ...]
    residual: float = 0  # what the second term is divided by


@dataclass(frozen=True)
class Layer:
    """A packed layer ``[rows, cols]``; ``pieces`` are what was fused to it, with their rows."""

    module: Module
    codebook: Codebook
    rows: int
    cols: int
    pieces: tuple[tuple[str, int], ...]
    scales: dict[str, Array]  # of the rotation
    exact: bool  # whether folding rounded none of them
    residual: np.float32 | None  # what the second term is multiplied by

    def __str__(self) -> str:
        terms = " + ".join(str(term.get("table", term["codec"])) for term in self.codebook.terms)
        pieces = " and ".join(name.rpartition(".")[2] for name, _ in self.pieces)
        return f"{terms}, {pieces} in one" if pieces else terms


def detect(source: Checkpoint) -> str:
    found = source.config.get(SETTINGS)
    return f"{SETTINGS} with codesz in config.json" if isinstance(found, Mapping) and "codesz" in found else ""


def plan(source: Checkpoint) -> Plan:
    settings = source.config.get(SETTINGS)
    if not isinstance(settings, Mapping):
        raise DamagedError(f"{SETTINGS} in config.json", "none", file=source.path)
    codebook = _codebook(settings)
    modules = common.modules(source, "Qidxs", (*PARTS, *REFUSED), never_alone=("SU", "SV", "codebook_id"))
    if not modules:
        raise DamagedError("packed weights: *.Qidxs", "none", file=source.path)
    layers = [_layer(module, codebook, settings) for module in modules]
    items = [item for layer in layers for item in (_item(layer), *_biases(layer))]
    packed = [layer.module.weight for layer in layers]
    used = {name for item in items for name in item.consumes}
    config = common.target_config(source, packed)
    config.pop(SETTINGS)
    return Plan(
        scheme=NAME,
        items=(*items, *passed(source, [name for name in source.tensors if name not in used])),
        config=config,
        notes=(*_notes(layers), *common.notes(source, packed)),
        settings=dict(settings),
    )


def _codebook(settings: Mapping[str, Any]) -> Codebook:
    """Of the name in the settings; :class:`UnsupportedError` for what no released version could run."""
    name = settings.get("codebook")
    if not isinstance(name, str) or name not in CODEBOOKS:
        raise UnsupportedError(f"one of the codebooks {', '.join(CODEBOOKS)}", repr(name))
    codebook = CODEBOOKS[name]
    if (version := settings.get("codebook_version", 0)) != codebook.version:
        raise UnsupportedError(f"version {codebook.version} of codebook {name}", repr(version))
    for key in ("lora_rank", "outlier_channel_split"):
        if settings.get(key):
            raise UnsupportedError(f"no {key}", repr(settings[key]), hint="its versions differ in what it means")
    if codebook.residual and (override := settings.get("resid_scale_override", -1)) is not None:
        if type(override) not in (int, float) or not math.isfinite(override):
            raise DamagedError("resid_scale_override as a number", repr(override))
        return codebook._replace(residual=override if override > 0 else codebook.residual)
    return codebook


def _layer(module: Module, codebook: Codebook, settings: Mapping[str, Any]) -> Layer:
    for part in REFUSED:
        if part in module.parts:
            raise module.error(part, "no such tensor", "one of an older version")
    parent, _, last = module.name.rpartition(".")
    if (scale := f"{parent}.{last.removesuffix('_proj')}_scale") in module.source.tensors:
        raise UnsupportedError("scales within the module", scale, file=module.source.path, weight=module.weight)
    cols, rows = (module.tensor(part, common.FLOATS[::2], 1).shape[0] for part in ("SU", "SV"))
    _check_codes(module, codebook, rows, cols, settings)
    pieces = _pieces(module, rows)
    columns, exact_in = _in_scale(module, cols, settings)
    out, exact_out = _out_scale(module, [n for _, n in pieces])
    residual = _reciprocal(codebook.residual) if codebook.residual else None
    scales = {"in_scale": columns, "out_scale": out}
    return Layer(module, codebook, rows, cols, pieces, scales, exact_in and exact_out, residual)


def _check_codes(module: Module, codebook: Codebook, rows: int, cols: int, settings: Mapping[str, Any]) -> None:
    found = int(_scalar(module, "codebook_id", ("int64", "int32")))
    if found != codebook.id:
        raise module.error("codebook_id", f"{codebook.id}, of {settings['codebook']}", str(found))
    tensor = module.tensor("Qidxs", (codebook.dtype,), 2)
    down, across = codebook.units
    expected = (rows, cols * codebook.words // across)
    if rows % down or cols % across or tensor.shape != expected:
        found_at = f"{list(tensor.shape)} for {rows} rows and {cols} columns"
        raise module.error("Qidxs", f"{list(expected)}, rows in {down}s and columns in {across}s", found_at)
    if (dtype := settings.get("idx_dtype")) not in (None, f"torch.{codebook.dtype}"):
        raise module.error("Qidxs", f"idx_dtype of {codebook.dtype}", repr(dtype))


def _pieces(module: Module, rows: int) -> tuple[tuple[str, int], ...]:
    """Names and rows of what was fused, in order; none for a layer of its own."""
    parent, dot, last = module.name.rpartition(".")
    if last not in FUSED:
        if "fuse_scales" in module.parts:
            raise module.error("fuse_scales", f"a module called {' or '.join(FUSED)}", last)
        return ()
    names = [f"{parent}{dot}{name}" for name in FUSED[last]]
    for name in names:
        if f"{name}.weight" in module.source.tensors:
            raise module.error("Qidxs", f"{name}.weight within it", "that tensor, too")
    sizes = [roles.candidates(module.source.config, name)[0] for name in names]
    if last == "upgate_proj" and not sizes[0]:
        sizes = [[rows // 2]] * 2
    first = next((n for n in sizes[0] if n + sum(size[0] for size in sizes[1:] if size) == rows), 0)
    if not first or not all(sizes):
        what = ", ".join(f"{name.rpartition('.')[2]} {n or 'unknown'}" for name, n in zip(names, sizes, strict=True))
        raise module.error("SV", f"rows that config.json shares out: {what}", str(rows))
    if last == "upgate_proj":
        return tuple((name, rows // 2) for name in names)
    return tuple(zip(names, (first, *(size[0] for size in sizes[1:])), strict=True))


def _scalar(module: Module, part: str, dtypes: tuple[str, ...]) -> float:
    """The number of a tensor of one element."""
    tensor = module.parts.get(part)
    if tensor is None or tensor.dtype not in dtypes or math.prod(tensor.shape) != 1:
        found = "no such tensor" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise DamagedError(f"{' or '.join(dtypes)} []", found, file=module.source.path, weight=f"{module.name}.{part}")
    return float(common.check_finite(module, part).reshape(()))


def _vector(module: Module, part: str, length: int) -> Array:
    tensor = module.tensor(part, common.FLOATS[::2], 1)
    if tensor.shape != (length,):
        raise module.error(part, str([length]), str(list(tensor.shape)))
    return common.check_finite(module, part)


def _in_scale(module: Module, cols: int, settings: Mapping[str, Any]) -> tuple[Array, bool]:
    """SU over scaleWH, and whether no quotient was rounded."""
    signs = _vector(module, "SU", cols)
    given, wanted = "scaleWH" in module.parts, settings.get("rescale_WH")
    if isinstance(wanted, bool) and wanted != given:
        found = "scaleWH" if given else "no scaleWH"
        raise module.error("SU", f"what rescale_WH {wanted} says", found)
    if not given:
        return signs, True
    divisor = _vector(module, "scaleWH", cols).astype(np.float64)
    if not divisor.all():
        raise module.error("scaleWH", "numbers other than 0", f"{int((divisor == 0).sum())} zeros")
    quotient = (signs / divisor).astype(np.float32)
    return quotient, bool((quotient * divisor == signs).all())


def _out_scale(module: Module, rows: list[int]) -> tuple[Array, bool]:
    """SV times Wscale, in the dtype of SV as the library does, times the scale of each piece; whether all of it is
    exact.
    """
    signs = _vector(module, "SV", module.parts["SV"].shape[0])
    exact = signs.astype(np.float64) * _scalar(module, "Wscale", common.FLOATS[::2])
    scale = exact.astype(signs.dtype)
    if not rows:
        return scale, bool((scale == exact).all())
    pieces = np.repeat(_vector(module, "fuse_scales", len(rows)).astype(np.float64), rows)
    product = scale * pieces
    folded = product.astype(np.float32)
    return folded, bool((scale == exact).all() and (folded == product).all())


def _reciprocal(divisor: float) -> np.float32:
    """A factor that gives the same float16 as the division, for every value of the codebooks: multiples of 1/4."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        values = np.arange(-11, 12, dtype=np.float32) / 4
        wanted = (values / np.float32(divisor)).astype(np.float16)
        near = np.float32(1) / np.float32(divisor)
        for factor in (near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))):
            if np.isfinite(wanted).all() and ((values * factor).astype(np.float16) == wanted).all():
                return factor
    raise UnsupportedError("a resid_scale_override that is a factor, too", str(divisor))


def _item(layer: Layer) -> Item:
    module = layer.module
    entry = Entry(
        weights=(module.weight,),
        shape=(layer.rows, layer.cols),
        dtype="float16",
        terms=layer.codebook.terms,
        sum_dtype="float16" if len(layer.codebook.terms) > 1 else "float32",
        concat=tuple(Piece(weights=(f"{name}.weight",), rows=rows) for name, rows in layer.pieces),
        rotation=Rotation(
            in_=_side(layer.cols, layer.scales["in_scale"]), out=_side(layer.rows, layer.scales["out_scale"])
        ),
        label="bit-exact" if layer.exact else "rounded",
    )
    try:
        layout(entry)
    except QformatError as error:  # of a size that no transform has
        raise error.located(file=module.source.path, weight=module.weight) from None
    consumes = tuple(f"{module.name}.{part}" for part in module.parts if part != "bias")
    return Item(module.weight, consumes, partial(_parts, layer), entry)


def _side(size: int, scale: Array) -> Side:
    return Side(size=size, scale="float16" if scale.dtype == np.float16 else "float32")


def _parts(layer: Layer) -> dict[str, Array]:
    words = layer.module.array("Qidxs")
    if not words.any():
        raise layer.module.error("Qidxs", "codes that differ", "0 throughout", hint=common.PARTIAL)
    codes = layer.codebook.relaid(words, (layer.rows, layer.cols))
    if layer.residual is None:
        return {"codes": codes[0], **layer.scales}
    scales = np.full((1, 1), layer.residual, np.float32)
    return {"0_codes": codes[0], "1_codes": codes[1], "1_scales": scales, **layer.scales}


def _biases(layer: Layer) -> list[Item]:
    """The bias of what was fused, cut and multiplied as its rows are; another one passes as it is."""
    module = layer.module
    if "bias" not in module.parts or not layer.pieces:
        return []
    scales, bias = module.array("fuse_scales").astype(np.float64), _vector(module, "bias", layer.rows)
    items, start = [], 0
    for (name, rows), scale in zip(layer.pieces, scales, strict=True):
        own = (bias[start : start + rows] * scale).astype(bias.dtype)
        consumes = () if start else (f"{module.name}.bias",)
        items.append(Item(f"{name}.bias", consumes, partial(dict, {"": own}), dense=spec(str(own.dtype), own.shape)))
        start += rows
    return items


def _notes(layers: list[Layer]) -> list[str]:
    notes = [f"{number} x {form}" for form, number in Counter(map(str, layers)).items()]
    if rounded := [layer.module.name for layer in layers if not layer.exact]:
        notes.append(f"scales rounded where they were folded into one: {common.count(rounded, 'layer')}")
    if biased := [layer.module.name for layer in layers if layer.pieces and "bias" in layer.module.parts]:
        notes.append(f"biases multiplied by fuse_scales, and rounded: {common.count(biased, 'layer')}")
    return notes


def _e8p12(words: Array, shape: tuple[int, int]) -> tuple[Array, ...]:
    return (_tiled(words, shape),)


def _rvq4b(words: Array, shape: tuple[int, int]) -> tuple[Array, ...]:
    base, residual = np.split(words, 2, axis=1)
    return _tiled(base, shape), _tiled(residual, shape)


def _rvq3b(words: Array, shape: tuple[int, int]) -> tuple[Array, ...]:
    base, residual = words[:, : shape[1] // 32], np.ascontiguousarray(words[:, shape[1] // 32 :])
    return _tiled(base, shape), residual.view(np.uint8)[..., None]


def _tiled(words: Array, shape: tuple[int, int]) -> Array:
    """int64 words, one for each 2 x 2 patch of codes, 8 x 4 patches a tile, tiles in row-major order -> uint8
    [rows, cols / 8, 2]: signs, pattern.

    A word holds the patterns of its codes as bytes, then bit 0 of the signs of each, bit 1 of each, ...; of a patch the
    rows run faster than the columns.
    """
    down, across = shape[0] // TILE[0], shape[1] // TILE[1]
    patterns, signs = np.split(numbers(64), 2)
    codes = np.stack([signs.reshape(8, 4).T, patterns.reshape(4, 8)], axis=1)
    rule = permutation(codes.reshape(2, 2, 16).swapaxes(0, 1))
    out = np.empty((down, 8, 2, across, 4), np.uint32)  # tile, patch, row; tile, patch
    for here in stretches(down, AT_ONCE):
        own = words.reshape(down, TILE[0], -1)[here]
        halves = np.ascontiguousarray(own).view(np.uint32).reshape(-1, across, 8, 4, 2)
        permute(rule, halves.transpose(4, 0, 2, 1, 3), out[here].transpose(2, 0, 1, 3, 4))
    return out.view(np.uint8).reshape(shape[0], shape[1] // e8p.WIDTH, 2)


def _d4(codes: Array, shape: tuple[int, int]) -> tuple[Array, ...]:
    """uint8, columns in sixteens and the rows within -> [rows, cols / 4]."""
    grouped = np.ascontiguousarray(codes).view(np.uint32).reshape(shape[1] // 16, shape[0])
    return (transposed(grouped).view(np.uint8),)


def _hi4b1c(words: Array, shape: tuple[int, int]) -> tuple[Array, ...]:
    """int32 words of eight codes of four bits -> uint8 [rows, cols / 2]."""
    codes = np.empty_like(words)
    permute(permutation(numbers(8, 4)[NIBBLES, :]), words[None], codes[None])
    return (codes.view(np.uint8),)


_BASE: dict[str, Any] = {"codec": "e8p"}
_RESIDUAL = {"codec": "e8p", "scales": "float32", "rounding": "once", "round_dtype": "float16"}
CODEBOOKS = {
    "E8P12": Codebook(7, 1, "int64", TILE, 2, _e8p12, (_BASE,)),
    "E8P12RVQ3B": Codebook(18, 0, "int64", TILE, 3, _rvq3b, (_BASE, {**_RESIDUAL, "bits": 1}), 2.04),
    "E8P12RVQ4B": Codebook(17, 1, "int64", TILE, 4, _rvq4b, (_BASE, _RESIDUAL), 3.45),
    "D4": Codebook(0, 0, "uint8", (1, 16), 4, _d4, ({"codec": "table", "bits": 8, "p": 4, "table": "d4"},)),
    "HI4B1C": Codebook(10, 0, "int32", (1, 8), 1, _hi4b1c, ({"codec": "table", "bits": 4, "table": "hi4b1c"},)),
}
