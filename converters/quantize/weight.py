"""One dense weight -> its entry and parts: pad, rotate, encode."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from qformat import codecs, manifest, rotation
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError
from qformat.kernels import native
from qformat.manifest import Entry
from qformat.records import read_record
from qformat.rotation import Rotation, Side
from qformat.weight import PackedWeight, matrix_shape, terms_of

Rotate = Literal["hadamard", "none"] | int  # the size of the blocks of both sides
Encode = Callable[[Any, Array], dict[str, Array]]


def entry_of(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    terms: Sequence[Mapping[str, Any]],
    rotate: Rotate,
    *,
    stack: int = 0,
    transposed: bool = False,
) -> Entry:
    """The entry of a weight that is to be packed as a sum of ``terms``: padded to their codecs' units and to whole
    blocks of a ``rotate`` of a size, rotated if asked for.
    """
    found = [codecs.read_params(term) for term in terms]
    sides = [codec.units(params) for codec, params in found]
    if isinstance(rotate, int):
        sides.append((rotate, rotate))
    units = [math.lcm(*side) for side in zip(*sides, strict=True)]
    axes = (units[1], units[0]) if transposed else units
    flat = shape[stack:] if len(shape) == stack + 2 else ()
    stored = (*shape[:stack], *(-(-n // unit) * unit for n, unit in zip(flat, axes, strict=True))) if flat else shape
    fields: dict[str, Any] = {
        "weights": [name],
        "shape": shape,
        "dtype": dtype,
        "terms": [dict(term) for term in terms],
        "label": "quantized",
        "stack": stack,
        "transposed": transposed,
    }
    if stored != shape:
        fields["stored_shape"] = stored
    entry = read_record(Entry, fields)
    if rotate != "none":
        rows, cols = matrix_shape(entry)
        into, out = (rotate, rotate) if isinstance(rotate, int) else (in_size(cols), min(128, rows & -rows))
        sides = {"in": Side(size=into, scale="int8"), "out": Side(size=out, scale="float16")}
        fields["rotation"] = {name: manifest.write_record(side) for name, side in sides.items()}
        entry = read_record(Entry, fields)
    return entry


def in_size(cols: int) -> int:
    """The largest power of two that divides ``cols / 8``, not below the smaller of 64 and the largest that divides
    ``cols``: a matrix can then be split eight ways along its input.
    """
    largest = cols & -cols
    eighth = (cols // 8) & -(cols // 8) if cols % 8 == 0 else 1
    return max(eighth, min(64, largest))


@functools.cache
def signs(side: str, length: int) -> Array:
    """Random signs, int8 [length]: the same for every weight of that length, so that weights with one input share
    them.
    """
    bits = hashlib.shake_128(f"qformat {side} {length}".encode()).digest(-(-length // 8))
    return (1 - 2 * np.unpackbits(np.frombuffer(bits, np.uint8))[:length].astype(np.int8)).astype(np.int8)


def pack(entry: Entry, weight: Array) -> PackedWeight:
    """Encode a float weight of ``entry.shape``; :class:`DamagedError` where it, or a scale of it, is not finite."""
    lead = entry.shape[: entry.stack]
    matrices = [_pack_matrix(entry, weight[at]) for at in itertools.product(*map(range, lead))]
    parts = {
        name: np.stack([matrix[name] for matrix in matrices]).reshape(*lead, *array.shape) if lead else array
        for name, array in matrices[0].items()
    }
    return PackedWeight(entry.weights[0], entry, parts)


def _pack_matrix(entry: Entry, weight: Array) -> dict[str, Array]:
    shape = matrix_shape(entry)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is infinite, and told below
        matrix = weight.astype(np.float32)
        if not np.isfinite(matrix).all():
            raise DamagedError("finite values", f"{int((~np.isfinite(matrix)).sum())} that are not")
        matrix = matrix.T if entry.transposed else matrix.reshape(matrix.shape[0], -1)
        padded = np.zeros(shape, np.float32)
        padded[: matrix.shape[0], : matrix.shape[1]] = matrix
        turn: dict[str, Array] = {}
        if entry.rotation is not None:
            turn = _scales(entry.rotation, padded)
            rotation.check(entry.rotation, turn)
            padded = rotation.apply(entry.rotation, padded, turn).astype(np.float32)
        return _encode(entry, padded) | turn


def _encode(entry: Entry, matrix: Array) -> dict[str, Array]:
    """The parts of every term: each one packs what those before it leave over."""
    parts: dict[str, Array] = {}
    rest = matrix
    for prefix, term, _ in terms_of(entry):
        codec, params = codecs.read_params(term)
        own = encoder(codec)(params, rest)
        codec.check(params, rest.shape, own)
        parts |= {prefix + name: array for name, array in own.items()}
        if len(entry.terms) > 1:
            rest = rest - codec.decode(params, rest.shape, own)
    return parts


def _scales(turn: Rotation, matrix: Array) -> dict[str, Array]:
    """Signs on both sides; those of the output carry the root mean square of their row, so that what is left has
    variance 1.
    """
    rows, cols = matrix.shape
    spread = np.sqrt((matrix.astype(np.float64) ** 2).mean(axis=1))
    assert turn.out is not None and turn.out.scale is not None
    return {"in_scale": signs("in", cols), "out_scale": (signs("out", rows) * spread).astype(NUMPY[turn.out.scale])}


def encoder(codec: codecs.Codec) -> Encode:
    """The fast encoder of a codec where the C++ library has one, else its reference."""
    fast = getattr(native.binding(codec.NAME), "encode", None) if native.available() else None
    return fast or codec.encode
