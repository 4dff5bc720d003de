"""``prove``: what a conversion wrote is opened again, decoded, and compared with the arithmetic of the scheme's authors
on the source's own tensors.

What is compared with what, by target:

- qformat: the stored matrix of each weight, decoded, with ``formulas/<scheme>.py``, which shares no arithmetic with
  importers and codecs. Around a rotated one are the source's own vectors, signs and permutations; they were copied.
- a foreign format: what an import of the written folder gives, with the formula of the source.
- dense: the written tensor with the formula of the source, cast.

Our own decoder stands in for the formula where the source is qformat's, and, but for the first of these, where a
rotation or padding is undone.

Values are compared in the dtype of the source's loader, or of the dense tensor. They must be equal; where a rotation is
undone, which takes float64 and other orders of sums, to the last bit of that dtype.

All values of small weights are compared. Of others it is strips of 128 rows, evenly spread, elsewhere in each weight:
as many as have ``SAMPLE`` values for each matrix, and one at least.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import msgspec
import numpy as np

from qformat import checkpoint, manifest, weight
from qformat.checkpoint import Checkpoint
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError, QformatError, UnsupportedError
from qformat.kernels import native
from qformat.manifest import Entry
from qformat.weight import PackedWeight

from .importers import read
from .plan import Item, Plan

STRIP = 128  # rows
GOLDEN = 0.618033988749895  # its multiples, modulo 1, lie apart
SAMPLE = 1 << 19  # values
Rows = Callable[[int, int], Array]  # start, stop -> these rows of all matrices of a weight, one below another


class Claim(NamedTuple):
    """Two ways to the same rows ``[matrices * rows, cols]``, equal in ``dtype``, or ``close``: to its last bit."""

    wanted: Rows
    found: Rows
    shape: tuple[int, int, int]
    dtype: str
    close: bool
    by_formula: bool


class Place(NamedTuple):
    """A part of a dense tensor."""

    whole: str
    at: tuple[slice, ...] = ()


def prove(source: Checkpoint, plan: Plan, scheme: str, target: str, folder: Path) -> dict[str, Any] | None:
    """Compare the ``folder`` written as ``target`` with ``source``, of which the importer ``scheme`` made ``plan``.

    Returns ``{weights, by_formula, values, of, differ}``: of how many weights, and of how many of these with the
    formula, how many of all values were compared; ``differ`` is 0. None where nothing is packed. Raises
    :class:`DamagedError` with the weight, the row and the column where two differ.
    """
    items = [item for item in plan.items if item.entry is not None and not item.entry.pieces]
    if not items:
        return None
    written = checkpoint.open(folder)
    again = {} if target in ("qformat", "dense") else {item.name: item for item in read(written)[0].items}
    authors = formula(scheme)
    claims: dict[str, Callable[[Item, Rows | None, Checkpoint], Claim]]
    claims = {"qformat": _packed, "dense": functools.partial(_dense, _pieces(plan))}
    claim = claims.get(target, functools.partial(_exported, again))

    def compared(number: int, item: Item) -> tuple[bool, int, int]:
        try:
            rows = functools.partial(authors.rows, source, item) if authors is not None else None
            one = claim(item, rows, written)
            return one.by_formula, _compare(one, number), math.prod(one.shape)
        except QformatError as error:
            raise error.located(weight=item.name) from None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        by_formula, values, of = (
            sum(counts) for counts in zip(*pool.map(compared, itertools.count(), items), strict=True)
        )
    return {"weights": len(items), "by_formula": by_formula, "values": values, "of": of, "differ": 0}


def formula(scheme: str) -> Any:
    """The module of a scheme's own arithmetic; None for those that have none."""
    name = f"{__package__}.formulas.{scheme}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def strips(matrices: int, rows: int, cols: int, number: int) -> Iterator[tuple[int, int]]:
    """Which of all rows are compared in a weight of that number."""
    total = matrices * rows
    count = -(-total // STRIP)
    wanted = min(count, max(1, matrices * SAMPLE // (STRIP * cols)))
    for i in range(wanted):
        strip = int((i + number * GOLDEN % 1) * count / wanted)
        yield strip * STRIP, min(total, (strip + 1) * STRIP)


def _compare(claim: Claim, number: int) -> int:
    """How many values are compared."""
    values = 0
    for start, stop in strips(*claim.shape, number):
        wanted, found = claim.wanted(start, stop), claim.found(start, stop)
        if not wanted.shape == found.shape == (stop - start, claim.shape[2]):
            raise DamagedError(f"{stop - start} rows of {list(wanted.shape)}", str(list(found.shape)))
        if (where := _differs(wanted, found, NUMPY[claim.dtype], claim.close)) is not None:
            expected = f"{float(wanted[where])!r}, as the source has it, at row {start + where[0]}, column {where[1]}"
            raise DamagedError(expected, f"{float(found[where])!r} in what was written")
        values += found.size
    return values


def _differs(wanted: Array, found: Array, dtype: Any, close: bool) -> tuple[int, int] | None:
    """The first place, row and column, where two arrays differ once they are cast."""
    places = np.nonzero(wanted != found)
    a, b = (array[places].astype(dtype) for array in (wanted, found))
    differ = (a != b) & ~(np.isnan(a) & np.isnan(b))
    if close:
        last = float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]
        a, b = a.astype(np.float64), b.astype(np.float64)
        differ &= ~(np.abs(a - b) <= last * (np.abs(a) + last * np.abs(wanted).max(initial=0)))  # what cancels, too
    first = np.flatnonzero(differ)[:1]
    return (int(places[0][first[0]]), int(places[1][first[0]])) if first.size else None


def _packed(item: Item, formula: Rows | None, written: Checkpoint) -> Claim:
    """The matrix as it is stored."""
    entry = _entry(item)
    wanted = formula or rows_of(stored(item.packed()))
    return Claim(wanted, rows_of(stored(written[item.name])), _shape(entry), entry.dtype, False, formula is not None)


def _dense(pieces: Mapping[str, Place], item: Item, formula: Rows | None, written: Checkpoint) -> Claim:
    """The tensor; the tensors that lie in the stored weight; or the part of one that it is."""
    entry = _entry(item)
    names = list(manifest.members({item.name: entry}))
    place = pieces.get(item.name, Place(names[0] if names else item.name))
    tensor = np.concatenate([written.array(name) for name in names]) if names else written.array(place.whole)[place.at]
    return _model(item, formula, laid(entry, tensor), written.tensors[place.whole].dtype)


def _exported(again: Mapping[str, Item], item: Item, formula: Rows | None, written: Checkpoint) -> Claim:
    """The weight that an import of what was written gives."""
    if item.name not in again or again[item.name].entry is None:
        raise DamagedError("the weight, packed, in what was written", "none")
    entry, other = _entry(item), again[item.name].packed()
    alike = all(getattr(entry, key) == getattr(other.entry, key) for key in ("shape", "stack", "transposed"))
    return _model(item, formula, rows_of(other) if alike else laid(entry, other.decode()), entry.dtype)


def _model(item: Item, formula: Rows | None, found: Rows, dtype: str) -> Claim:
    """The weight as the model has it, turned as codecs see it."""
    entry = _entry(item)
    if entry.rotation is not None or entry.stored_shape is not None:
        formula = None
    shape = _shape(msgspec.structs.replace(entry, stored_shape=None))
    wanted = formula or rows_of(item.packed())
    return Claim(wanted, found, shape, dtype, entry.rotation is not None, formula is not None)


def _shape(entry: Entry) -> tuple[int, int, int]:
    return (math.prod(entry.shape[: entry.stack]), *weight.matrix_shape(entry))


def _pieces(plan: Plan) -> dict[str, Place]:
    """Stored weights that are a piece of one of the model's."""
    entries = {item.name: item.entry for item in plan.items if item.entry is not None}
    out = {}
    for whole, names in manifest.composed(entries).items():
        axis, start = entries[whole].axis, 0
        for name in names:
            stop = start + entries[name].shape[axis]
            out[name] = Place(whole, (slice(None),) * axis + (slice(start, stop),))
            start = stop
    return out


def _entry(item: Item) -> Entry:
    assert item.entry is not None
    return item.entry


def stored(whole: PackedWeight) -> PackedWeight:
    """What lies within the rotation, padding included, as a weight of its own."""
    entry = whole.entry
    terms = entry.terms
    if entry.rotation is not None:  # all terms as one sum: no more is asked than that two weights agree
        terms = tuple({key: value for key, value in term.items() if key != "outside"} for term in terms)
    shape = (*entry.shape[: entry.stack], *weight.matrix_shape(entry))
    bare = msgspec.structs.replace(
        entry, shape=shape, terms=terms, stored_shape=None, transposed=False, concat=(), rotation=None
    )
    parts = {part.name: whole.parts[part.name] for part in weight.layout(bare)}
    return replace(whole, entry=bare, parts=parts)


def rows_of(whole: PackedWeight) -> Rows:
    """A packed weight strip by strip; matrix by matrix where it cannot be cut."""
    entry = whole.entry
    lead = entry.shape[: entry.stack]
    one = msgspec.structs.replace(
        entry,
        shape=entry.shape[entry.stack :],
        stored_shape=entry.stored_shape and entry.stored_shape[entry.stack :],
        stack=0,
    )
    height = one.shape[1] if entry.transposed else one.shape[0]

    def matrix(number: int) -> PackedWeight:
        at = np.unravel_index(number, lead) if lead else ()
        return replace(whole, entry=one, parts={name: array[at] for name, array in whole.parts.items()})

    @functools.lru_cache(maxsize=1)
    def uncut(number: int) -> Array:
        return _flat(one, matrix(number).decode(decoder=native.decode))

    def cut(number: int, start: int, stop: int) -> Array:
        try:
            return _flat(one, matrix(number).slice(int(entry.transposed), start, stop).decode(decoder=native.decode))
        except UnsupportedError:
            return uncut(number)[start:stop]

    def rows(start: int, stop: int) -> Array:
        found = []
        while start < stop:
            number, first = divmod(start, height)
            last = min(height, first + stop - start)
            found.append(cut(number, first, last))
            start += last - first
        return np.concatenate(found)

    return rows


def _flat(entry: Entry, array: Array) -> Array:
    return array.T if entry.transposed else array.reshape(len(array), -1)


def laid(entry: Entry, array: Array) -> Rows:
    """The rows of a dense weight as codecs see them."""
    matrices = array.reshape(-1, entry.shape[entry.stack], math.prod(entry.shape[entry.stack + 1 :]))
    matrices = matrices.swapaxes(1, 2) if entry.transposed else matrices

    def rows(start: int, stop: int) -> Array:
        index = np.arange(start, stop)
        found: Array = matrices[index // matrices.shape[1], index % matrices.shape[1]]
        return found

    return rows
