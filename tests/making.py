"""Packed weights, folders and hypothesis strategies that several tests need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from hypothesis import strategies as st

from qformat import checkpoint, codecs, weight
from qformat.codecs import float as float_codec
from qformat.codecs import trellis
from qformat.converters import plan
from qformat.dtypes import NUMPY, Array
from qformat.layout import Part
from qformat.manifest import Entry, Manifest
from qformat.manifest import write as write_manifest
from qformat.records import read_record
from qformat.shards import ShardWriter, spec
from qformat.weight import PackedWeight

FLOATS = ("float16", "bfloat16", "float32")
SCALES = (*FLOATS, "float8_e4m3fn", "float8_e8m0fnu")


def entry(shape: tuple[int, ...], *terms: Mapping[str, Any], weights: Any = ("w",), **more: Any) -> Entry:
    """An entry as it is read from JSON."""
    fields = {"weights": list(weights), "shape": list(shape), "dtype": "float32", "terms": list(terms), **more}
    return read_record(Entry, json.loads(json.dumps(fields)))


def numbers(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Array:
    """Finite random numbers."""
    if dtype == "float8_e8m0fnu":
        return (2.0 ** rng.integers(-6, 6, shape)).astype(NUMPY[dtype])
    if dtype == "uint8":
        return rng.integers(0, 256, shape, np.uint8)
    if dtype in ("int8", "int16"):
        return rng.integers(-100, 100, shape).astype(NUMPY[dtype])
    return rng.standard_normal(shape).astype(np.float32).astype(NUMPY[dtype])


def part(rng: np.random.Generator, one: Part, parts: Mapping[str, Array]) -> Array:
    """Random numbers that a codec's check lets pass."""
    kind = one.name.rpartition("_")[2]
    if kind == "perm":
        return np.argsort(rng.random(one.shape), axis=-1).astype(np.int32)
    if kind == "matrix":
        turns = np.linalg.qr(rng.standard_normal(one.shape))[0]
        return turns.astype(NUMPY[str(one.dtype)])
    if kind == "groups":
        count = parts[one.name.removesuffix("groups") + "scales"].shape[-1]
        return rng.integers(0, count, one.shape, np.int32)
    return numbers(rng, str(one.dtype), one.shape)


def packed(rng: np.random.Generator, of: Entry, name: str = "w") -> PackedWeight:
    """A weight of random parts."""
    parts: dict[str, Array] = {}
    for one in weight.layout(of):
        parts[one.name] = part(rng, one, parts)
    for i, term in enumerate(of.terms):
        prefix = f"{i}_" if len(of.terms) > 1 else ""
        parts[f"{prefix}codes"] = finite(parts[f"{prefix}codes"], str(term.get("format")))
    return PackedWeight(name, of, parts)


def finite(codes: Array, form: str) -> Array:
    """Codes of 8 bits without those that stand for no finite number in one of the formats of ``float``."""
    return codes & 0xFB | 1 if form.startswith(("e4m3", "e5m2")) else codes


def random_parts(rng: np.random.Generator, params: Any, shape: tuple[int, int]) -> dict[str, Array]:
    """Parts of one matrix as its codec's ``decode`` takes them."""
    codec = params.__class__.__module__.rpartition(".")[2]
    parts: dict[str, Array] = {}
    for one in codecs.get(codec).layout(params, shape):
        parts[one.name] = part(rng, one, parts)
    parts["codes"] = finite(parts["codes"], getattr(params, "format", ""))
    return parts


def folder(path: Path, weights: Mapping[str, PackedWeight], dense: Mapping[str, Array] | None = None) -> Path:
    """A qformat model folder of one shard."""
    items = [
        plan.Item(name, (), lambda one=one: one.parts, entry=one.entry)  # type: ignore[misc]
        for name, one in weights.items()
    ]
    for name, array in (dense or {}).items():
        of = spec(str(array.dtype), array.shape)
        items.append(plan.Item(name, (), lambda array=array: {"": array}, dense=of))  # type: ignore[misc]
    path.mkdir(parents=True, exist_ok=True)
    specs = {name: one for item in items for name, one in item.specs.items()}
    with ShardWriter(path / "model.safetensors", specs, {"format": "pt"}) as out:
        for item in items:
            for name, array in item.tensors().items():
                out.put(name, array)
    entries = tuple(msgspec.structs.replace(one.entry, weights=(name,)) for name, one in weights.items())
    config = {"model_type": "test", checkpoint.KEY: write_manifest(Manifest(entries=entries))}
    (path / "config.json").write_text(json.dumps(config))
    return path


def dense_folder(path: Path, tensors: Mapping[str, Array], **config: Any) -> Path:
    """A dense model folder of one shard."""
    path.mkdir(parents=True, exist_ok=True)
    specs = {name: spec(str(array.dtype), array.shape) for name, array in tensors.items()}
    with ShardWriter(path / "model.safetensors", specs, {"format": "pt"}) as out:
        for name, array in tensors.items():
            out.put(name, array)
    (path / "config.json").write_text(json.dumps({"model_type": "test", **config}))
    return path


_size = st.sampled_from([1, 2, 3, 5, 8, 16, 17, 32, 64])
_axis = st.one_of(st.just(-1), _size)
_block = st.tuples(_axis, _axis).map(list)


def _maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), values)


def _given(**fields: Any) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


@st.composite
def int_terms(draw: st.DrawFn, shape: tuple[int, int], depth: int = 0) -> dict[str, Any]:
    nested = st.deferred(lambda: int_terms((1, 1), depth + 1))
    floats = st.sampled_from(FLOATS) if depth == 2 else st.one_of(st.sampled_from(FLOATS), nested)
    scales = st.sampled_from(SCALES) if depth == 2 else st.one_of(st.sampled_from(SCALES), nested)
    kind = draw(st.sampled_from(["none", "zero", "zeros", "offsets"]))
    zeros = st.one_of(st.sampled_from(["uint8", "int16"]), floats)
    grouped = depth == 0 and draw(st.booleans())
    return {
        "codec": "int",
        "bits": draw(st.integers(1, 8)),
        "block": [draw(_axis), draw(_size)] if grouped else draw(_block),
        "scales": "float16" if grouped else draw(scales),
        "rounding": draw(st.sampled_from(["none", "once", "each", "fused"])),
        "round_dtype": draw(st.sampled_from(FLOATS)),
        **_given(groups="int32" if grouped else None),
        **_given(zero=draw(st.sampled_from([1, 8, 7.5, -3])) if kind == "zero" else None),
        **_given(zeros=draw(zeros) if kind == "zeros" else None),
        **_given(offsets=draw(floats) if kind == "offsets" else None),
        **_given(view=_view(draw, shape) if depth == 0 and not grouped else None),
    }


def _view(draw: st.DrawFn, shape: tuple[int, int]) -> list[int] | None:
    count = shape[0] * shape[1]
    return draw(_maybe(st.sampled_from([[n, count // n] for n in range(1, count + 1) if count % n == 0])))


@st.composite
def float_terms(draw: st.DrawFn, shape: tuple[int, int]) -> dict[str, Any]:
    scales = draw(_maybe(st.one_of(st.sampled_from(SCALES), int_terms((1, 1), 1))))
    return {
        "codec": "float",
        "format": draw(st.sampled_from(list(float_codec.FORMATS))),
        "block": draw(_block),
        "global_form": draw(st.sampled_from(["multiply", "divide", "last"])),
        "global_divisor": draw(st.sampled_from([1, 3, 2688])),
        "rounding": draw(st.sampled_from(["none", "once", "each"])),
        "round_dtype": draw(st.sampled_from(FLOATS)),
        **_given(global_scale=draw(_maybe(st.sampled_from(FLOATS))) if scales is not None else None),
        **_given(scales=scales, view=_view(draw, shape)),
    }


@st.composite
def table_terms(draw: st.DrawFn, shape: tuple[int, int]) -> dict[str, Any]:
    p = draw(st.sampled_from([p for p in (1, 2, 4) if shape[1] % p == 0]))
    stored = draw(st.booleans())
    named = {1: [(2, "gauss-p1-n4"), (4, "nf4"), (4, "fp4")], 2: [(4, "higgs-p2-n16")], 4: [(8, "gauss-p4-n256")]}
    bits, table = draw(st.sampled_from(named[p]))
    scales = st.one_of(st.sampled_from(SCALES), int_terms((1, 1), 1))
    offsets = st.one_of(st.sampled_from(FLOATS), int_terms((1, 1), 1))
    return {
        "codec": "table",
        "bits": draw(st.integers(1, 9)) if stored else bits,
        "p": p,
        "table": draw(st.sampled_from(FLOATS)) if stored else table,
        "block": draw(_block),
        "rounding": draw(st.sampled_from(["none", "once"])),
        "round_dtype": draw(st.sampled_from(FLOATS)),
        **_given(table_block=[draw(_axis), draw(st.sampled_from([-1, p, 2 * p, 4 * p]))] if stored else None),
        **_given(scales=draw(_maybe(scales)), offsets=draw(_maybe(offsets)), view=_view(draw, shape)),
    }


@st.composite
def additive_terms(draw: st.DrawFn, shape: tuple[int, int]) -> dict[str, Any]:
    def divisors(n: int) -> list[int]:
        return [d for d in range(1, 17) if n % d == 0]

    scales = st.one_of(st.sampled_from(SCALES), int_terms((1, 1), 1))
    return {
        "codec": "additive",
        "bits": draw(st.integers(1, 9)),
        "books": draw(st.integers(1, 5)),
        "group": [draw(st.sampled_from(divisors(n))) for n in shape],
        "table": draw(st.sampled_from(FLOATS)),
        "block": draw(_block),
        **_given(scales=draw(_maybe(scales))),
    }


@st.composite
def e8p_terms(draw: st.DrawFn, shape: tuple[int, int]) -> dict[str, Any]:
    scales = st.one_of(st.sampled_from(SCALES), int_terms((1, 1), 1))
    return {
        "codec": "e8p",
        "bits": draw(st.sampled_from([1, 2])),
        "block": draw(_block),
        "rounding": draw(st.sampled_from(["none", "once"])),
        "round_dtype": draw(st.sampled_from(FLOATS)),
        **_given(scales=draw(_maybe(scales))),
    }


@st.composite
def trellis_terms(draw: st.DrawFn, tiles: tuple[tuple[int, int], ...] = ((16, 16), (8, 16), (4, 8))) -> dict[str, Any]:
    code = draw(st.sampled_from(["hash", "1mad", "2mad", "3inst", "hyb", "lut", "mcg", "mul1", "table"]))
    L = draw(st.integers(8, 16 if code != "table" else 10))
    V = 2 if code == "hyb" else draw(st.sampled_from([1, 2])) if code in ("lut", "table") else 1
    tile = draw(st.sampled_from(tiles))
    width = st.integers(1, min(8, L // V))
    lengths = [n for n in (1, 2, 4) if tile[0] * tile[1] // V % n == 0]
    bits = draw(st.sampled_from(lengths).flatmap(lambda n: st.lists(width, min_size=n, max_size=n)))
    names = [f"r{i}" for i in range(tile[0].bit_length() - 1)] + [f"c{i}" for i in range(tile[1].bit_length() - 1)]
    more: dict[str, Any] = {}
    stored = draw(st.booleans())
    if code == "hash":
        index = [draw(st.integers(1, 4)), draw(st.integers(1, 4))]
        more |= {"index": index, "shift": draw(st.integers(0, L - index[0])), "additive": draw(st.booleans())}
        more |= {"taps": draw(st.lists(st.integers(0, L - 1), min_size=1, max_size=4)), "table": "int8"}
    elif code == "hyb":
        index = 9 if not stored else draw(st.integers(1, 10))
        more |= {"index": [index], "table": "float16" if stored or index != 9 else "hyb-q9"}
    elif code == "lut":
        more |= {"index": [draw(st.integers(1, 10))], "table": draw(st.sampled_from(FLOATS))}
    elif code == "table":
        more |= {"table": draw(st.sampled_from(["float16", "float32", "bfloat16", "int8"]))}
    elif code in ("mcg", "mul1") and stored:
        more |= {"multiplier": draw(st.integers(0, 2**32 - 1))}
    term = {
        "codec": "trellis",
        "L": L,
        "V": V,
        "bits": bits,
        "code": code,
        "tile": list(tile),
        "order": " ".join(draw(st.permutations(names))),
        "reversed": draw(st.booleans()),
        "block": draw(_block),
        **more,
        **_given(scales=draw(_maybe(st.sampled_from(SCALES)))),
    }
    if sum(np.resize(bits, tile[0] * tile[1] // V)) * V < L:
        term["bits"] = [L // V] * len(bits)
    assert isinstance(codecs.read_params(term)[1], trellis.Params)
    return term


seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
