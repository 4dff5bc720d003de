"""``PackedWeight``: one weight with its entry and parts. Here layouts of terms, rotation and packed parts come
together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import msgspec
import numpy as np

from . import codecs, rotation
from .dtypes import NUMPY, Array, rounded
from .errors import DamagedError, QformatError, UnsupportedError, UsageError
from .layout import Part
from .manifest import Entry, Stored, Term


def matrix_shape(entry: Entry) -> tuple[int, int]:
    """The stored matrix that codecs see, ``(out, in)``: padded, transposed back, all axes after out as one."""
    rows, *rest = (entry.stored_shape or entry.shape)[entry.stack :]
    cols = math.prod(rest)
    return (cols, rows) if entry.transposed else (rows, cols)


def layout(entry: Entry) -> list[Part]:
    """Every part of a weight: ``codes``, ``1_codes``, ``scales_codes``, ``in_scale``, ... with its full shape."""
    shape = matrix_shape(entry)
    parts = []
    for prefix, term, _ in terms_of(entry):
        parts += [part.named(prefix) for part in _expand(term, shape)]
    if entry.rotation is not None:
        parts += rotation.layout(entry.rotation, shape)
    seen = {part.name for part in parts}
    if len(seen) != len(parts):
        raise DamagedError("parts of different names", str(sorted(part.name for part in parts)))
    return [part.stacked(entry.shape[: entry.stack]) for part in parts]


def terms_of(entry: Entry) -> list[tuple[str, Term, bool]]:
    """For each term: what its part names start with, its codec and params, whether it is outside the rotation."""
    out = []
    for i, term in enumerate(entry.terms):
        prefix = f"{i}_" if len(entry.terms) > 1 else ""
        out.append((prefix, {key: term[key] for key in term if key != "outside"}, bool(term.get("outside", False))))
    return out


def _expand(term: Term, shape: tuple[int, int]) -> Iterator[Part]:
    """A codec's layout, with parts that are packed replaced by the parts that they are packed into."""
    codec, params = codecs.read_params(term)
    for part in codec.layout(params, shape):
        if isinstance(part.dtype, str):
            yield part
            continue
        for inner in _expand(dict(part.dtype), _flat(part.shape)):
            along_out = inner.out_axis is not None and part.out_axis == 0
            along_in = inner.in_axis is not None and part.in_axis == len(part.shape) - 1
            yield replace(
                inner.named(part.name + "_"),
                out_axis=inner.out_axis if along_out else None,
                out_unit=inner.out_unit * part.out_unit,
                in_axis=inner.in_axis if along_in else None,
                in_unit=inner.in_unit * part.in_unit,
            )


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1]


# (codec, params, shape, parts) -> float32 [out, in], as the codec's own ``decode``
Decoder = Callable[[codecs.Codec, Any, tuple[int, int], Mapping[str, Array]], Array]


def reference(codec: codecs.Codec, params: Any, shape: tuple[int, int], parts: Mapping[str, Array]) -> Array:
    """The decoder that defines what is right."""
    return codec.decode(params, shape, parts)


def term_parts(
    codec: codecs.Codec, params: Any, shape: tuple[int, int], parts: Mapping[str, Array], prefix: str, decoder: Decoder
) -> dict[str, Array]:
    """A term's parts as its codec's ``decode`` takes them: packed ones decoded, all of them checked."""
    arrays = {}
    for part in codec.layout(params, shape):
        name = prefix + part.name
        if isinstance(part.dtype, str):
            arrays[part.name] = parts[name]
        else:
            inner = _decode_term(dict(part.dtype), _flat(part.shape), parts, name + "_", decoder)
            arrays[part.name] = inner.reshape(part.shape)
    codec.check(params, shape, arrays)
    return arrays


def _decode_term(
    term: Term, shape: tuple[int, int], parts: Mapping[str, Array], prefix: str, decoder: Decoder
) -> Array:
    """One term of one matrix: float32 [out, in]."""
    codec, params = codecs.read_params(term)
    return decoder(codec, params, shape, term_parts(codec, params, shape, parts, prefix, decoder))


@np.errstate(over="ignore", invalid="ignore")  # what overflows is infinite, which `check` names
def decode_matrix(
    entry: Entry, parts: Mapping[str, Array], rotated: bool = False, decoder: Decoder = reference
) -> Array:
    """One matrix (no stack) -> float32 [out, in] as codecs see it, padding included."""
    shape = matrix_shape(entry)
    stored: Array | None = None
    outside = []
    for prefix, term, is_outside in terms_of(entry):
        value = _decode_term(term, shape, parts, prefix, decoder)
        if is_outside:
            outside.append(value)
        else:
            stored = value if stored is None else rounded(stored + value, entry.sum_dtype)
    assert stored is not None  # the manifest has a term that is not outside
    if rotated:
        return stored
    if entry.rotation is not None:
        rotation.check(entry.rotation, parts)
        exact = rotation.undo(entry.rotation, stored, parts)
        return sum(outside, exact).astype(np.float32)
    for value in outside:
        stored = rounded(stored + value, entry.sum_dtype)
    return stored


@dataclass(frozen=True)
class PackedWeight:
    """A weight of the model. ``parts`` maps part names to arrays: views of the file, nothing is copied. ``rows`` are
    its first row and its end in what is stored, where that is a concatenation; ``pieces`` make it up along the entry's
    axis, where it is stored as several.
    """

    name: str
    entry: Entry
    parts: Mapping[str, Array]
    file: str = ""
    rows: tuple[int, int] | None = None
    pieces: tuple[PackedWeight, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        if self.rows is None:
            return self.entry.shape
        return (self.rows[1] - self.rows[0], *self.entry.shape[1:])

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.parts.values()) + sum(piece.nbytes for piece in self.pieces)

    @property
    def stored_bits(self) -> float:
        """Every stored byte of the weight, in bits for each of its elements."""
        return 8 * self.nbytes / math.prod(self.entry.shape)

    @property
    def codec(self) -> str:
        codecs = {piece.codec: None for piece in self.pieces}
        return ", ".join(codecs) or "+".join(str(term["codec"]) for term in self.entry.terms)

    def decode(self, rotated: bool = False, decoder: Decoder = reference) -> Array:
        """float32 [shape] in the model's basis; ``rotated``: the matrix as stored, [stack..., out, in], padding and
        all rows included.

        Raises :class:`DamagedError` naming this weight where a part holds what its codec forbids, and
        :class:`UnsupportedError` for the stored matrix of a weight in pieces, which has several.
        """
        if self.pieces:
            if rotated:
                raise UnsupportedError("a stored weight", "one in pieces", file=self.file, weight=self.name)
            return np.concatenate([piece.decode(decoder=decoder) for piece in self.pieces], self.entry.axis)
        try:
            lead = self.entry.shape[: self.entry.stack]
            matrices = [
                decode_matrix(self.entry, {part: array[at] for part, array in self.parts.items()}, rotated, decoder)
                for at in itertools.product(*map(range, lead))
            ]
        except QformatError as error:
            raise error.located(file=self.file, weight=self.name) from None
        if rotated:
            return np.stack(matrices).reshape(*lead, *matrix_shape(self.entry))
        whole = np.stack([self._cut(matrix) for matrix in matrices]).reshape(self.entry.shape)
        return whole if self.rows is None else whole[slice(*self.rows)]

    def _cut(self, matrix: Array) -> Array:
        """Codec's orientation and padding -> the model's."""
        matrix = matrix.T if self.entry.transposed else matrix
        if self.entry.stored_shape is None:
            return matrix
        rows, cols = self.entry.shape[self.entry.stack :]
        return matrix[:rows, :cols]

    def check(self) -> None:
        """Raise :class:`DamagedError` unless the parts are those of the layout and every value is finite."""
        check_parts(self.entry, self.parts, self.name, self.file)
        if not np.isfinite(self.decode()).all():
            raise DamagedError("finite values", "an infinity or NaN", file=self.file, weight=self.name)

    def slice(self, axis: int, start: int, stop: int) -> PackedWeight:
        """The weight that is ``[start:stop]`` of this one along ``axis``, its parts cut and not copied.

        Raises :class:`UsageError` for a range that the weight has not, :class:`UnsupportedError` where the packing has
        no cut there.
        """
        entry = msgspec.structs.replace(self.entry, concat=())
        if self.rows is not None:
            raise UnsupportedError("a stored weight, to be cut", "rows of one", weight=self.name)
        if not 0 <= axis < len(self.shape):
            raise UsageError(f"an axis below {len(self.shape)}", str(axis), weight=self.name)
        if not 0 <= start < stop <= self.shape[axis]:
            raise UsageError(f"a range within 0..{self.shape[axis]}", f"{start}..{stop}", weight=self.name)
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        if self.pieces:
            pieces = tuple(self._cut_pieces(axis, start, stop))
            listed = tuple(Stored(weights=(piece.name,)) for piece in pieces)
            return replace(self, entry=msgspec.structs.replace(entry, shape=shape, pieces=listed), pieces=pieces)
        if axis < entry.stack:
            lead = (slice(None),) * axis + (slice(start, stop),)
            stored = entry.stored_shape and (*shape[: entry.stack], *entry.stored_shape[entry.stack :])
            cut = {name: array[lead] for name, array in self.parts.items()}
            return replace(self, entry=msgspec.structs.replace(entry, shape=shape, stored_shape=stored), parts=cut)
        if len(entry.shape) != entry.stack + 2:
            raise UnsupportedError("a matrix, to be cut", str(list(entry.shape)), weight=self.name)
        along_out = (axis == entry.stack) != entry.transposed
        padded = (entry.stored_shape or entry.shape)[axis]
        end = padded if stop == self.shape[axis] else stop
        stored_shape = entry.stored_shape and (*entry.stored_shape[:axis], end - start, *entry.stored_shape[axis + 1 :])
        if stored_shape == shape:
            stored_shape = None
        self._check_rotation_cut("out" if along_out else "in", start, end, padded)
        self._check_units(0 if along_out else 1, start, end, padded)
        cut = {part.name: self._cut_part(part, along_out, start, end, padded) for part in layout(entry)}
        result = replace(self, entry=msgspec.structs.replace(entry, shape=shape, stored_shape=stored_shape), parts=cut)
        try:
            check_parts(result.entry, cut, self.name, self.file)
        except DamagedError:
            raise UnsupportedError("a packing that can be cut there", f"{start}..{stop}", weight=self.name) from None
        return result

    def _cut_pieces(self, axis: int, start: int, stop: int) -> Iterator[PackedWeight]:
        first = 0
        for piece in self.pieces:
            size = piece.shape[axis]
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                yield piece if (low, high) == (0, size) else piece.slice(axis, low, high)
            first += size if axis == self.entry.axis else 0

    def _check_rotation_cut(self, name: str, start: int, end: int, padded: int) -> None:
        side = dict(self.entry.rotation.sides()).get(name) if self.entry.rotation else None
        if side is not None and (start, end) != (0, padded) and (side.perm or start % side.size or end % side.size):
            what = (
                "no cut through a permutation" if side.perm else f"cuts at multiples of the rotation's size {side.size}"
            )
            raise UnsupportedError(what, f"{start}..{end}", weight=self.name)

    def _check_units(self, side: int, start: int, end: int, padded: int) -> None:
        """A code may stand for several rows or columns: no cut goes through them."""
        for _, term, _ in terms_of(self.entry):
            codec, params = codecs.read_params(term)
            unit = codec.units(params)[side]
            if start % unit or (end % unit and end != padded):
                raise UnsupportedError(f"cuts at multiples of {unit}", f"{start}..{end}", weight=self.name)

    def _cut_part(self, part: Part, along_out: bool, start: int, end: int, padded: int) -> Array:
        axis, unit = (part.out_axis, part.out_unit) if along_out else (part.in_axis, part.in_unit)
        array = self.parts[part.name]
        if axis is None:
            return array
        first, last = Fraction(start) / unit, Fraction(end) / unit
        if first.denominator != 1 or (last.denominator != 1 and end != padded):
            raise UnsupportedError(f"a cut at multiples of {_whole(unit)}", f"{start}..{end}", weight=self.name)
        lead = (slice(None),) * axis
        return array[(*lead, slice(int(first), array.shape[axis] if end == padded else int(last)))]


def _whole(unit: Fraction) -> int:
    """The smallest number of rows or columns that is a whole number of units and of rows or columns."""
    return unit.numerator


def check_parts(entry: Entry, parts: Mapping[str, Array], name: str, file: str = "") -> None:
    """Raise :class:`DamagedError` unless ``parts`` are exactly those of the layout, in dtype and shape."""
    expected = {part.name: part for part in layout(entry)}
    for extra in parts.keys() - expected.keys():
        raise DamagedError("no such part", extra, file=file, weight=name)
    for part in expected.values():
        if part.name not in parts:
            raise DamagedError(f"part {part.name}", "none", file=file, weight=name)
        array = parts[part.name]
        assert isinstance(part.dtype, str)
        if array.dtype != NUMPY[part.dtype] or array.shape != part.shape:
            raise DamagedError(
                f"part {part.name} {part.dtype} {list(part.shape)}",
                f"{array.dtype.name} {list(array.shape)}",
                file=file,
                weight=name,
            )
