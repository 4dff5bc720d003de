"""``prepared``: a packed matrix made ready for its device, from the tensors and the text that operators are given."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence

import msgspec
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qformat import weight
from qformat.errors import DamagedError
from qformat.manifest import Entry
from qformat.records import read_record, write_record
from qformat.weight import matrix_shape

from . import rotate
from .matrix import Matrix, Sum, matrix

ROWS_AT_A_TIME = 4096  # of an embedding whose output side is rotated


def spec(entry: Entry, rows: tuple[int, int] | None = None) -> str:
    """What the operators need to know of a weight, as one text; equal for all weights that are packed alike. ``rows``:
    the weight is these rows, first and end, of what ``entry`` says.
    """
    record = {**write_record(entry), "weights": ["weight"]}
    record.pop("label", None)
    if entry.concat:
        record["concat"] = [{"weights": ["weight"], "rows": piece.rows} for piece in entry.concat]
    if rows is not None:
        record["rows"] = rows
    return json.dumps(record, separators=(",", ":"), sort_keys=True)


@functools.cache
def _read(text: str) -> tuple[Entry, tuple[int, int] | None]:
    record = json.loads(text)
    rows = record.pop("rows", None)
    return read_record(Entry, record), rows and (rows[0], rows[1])


def entry_of(text: str) -> Entry:
    """The entry of :func:`spec`."""
    return _read(text)[0]


def rows_of(text: str) -> tuple[int, int] | None:
    """The rows of :func:`spec`."""
    return _read(text)[1]


@functools.cache
def whole_of(text: str) -> str:
    """The spec of rows -> that of what they are rows of."""
    return spec(entry_of(text))


@functools.cache
def pieces_of(text: str) -> list[tuple[int, int]]:
    """First row and end of each weight that lies in this one."""
    ends = list(itertools.accumulate(piece.rows for piece in entry_of(text).concat))
    return list(zip([0, *ends], ends, strict=False))


@functools.cache
def shape_of(text: str) -> tuple[int, ...]:
    """The weight's shape, as the model has it."""
    shape, rows = entry_of(text).shape, rows_of(text)
    return shape if rows is None else (rows[1] - rows[0], *shape[1:])


@functools.cache
def one_of(text: str) -> str:
    """The spec of a stack's matrices -> that of each."""
    entry = entry_of(text)
    stored = entry.stored_shape and entry.stored_shape[entry.stack :]
    return spec(
        msgspec.structs.replace(entry, shape=entry.shape[entry.stack :], stored_shape=stored, stack=0, concat=())
    )


@functools.cache
def names_of(text: str) -> tuple[str, ...]:
    """The parts, in the order in which the operators take them."""
    return tuple(part.name for part in weight.layout(entry_of(text)))


@functools.cache
def features(text: str) -> tuple[int, int]:
    """Rows and columns of the matrix as codecs see it, without padding: what a linear layer calls out and in."""
    entry = entry_of(text)
    rows, *rest = shape_of(text)[entry.stack :]
    cols = math.prod(rest)
    return (cols, rows) if entry.transposed else (rows, cols)


class Prepared:
    """The terms of one matrix on their device, with the rotation around them. All values are float32.

    Holds the tensors' storages, not the tensors: it lives as long as the first of them.
    """

    def __init__(self, text: str, parts: Mapping[str, Tensor]) -> None:
        self.entry, self.features = entry_of(text), features(text)
        parts = {name: part.data for name, part in parts.items()}  # a `detach` would keep its tensor alive
        inside: list[Matrix] = []
        outside: list[Matrix] = []
        for i, term in enumerate(self.entry.terms):
            prefix = "" if len(self.entry.terms) == 1 else f"{i}_"
            mine = {name.removeprefix(prefix): part for name, part in parts.items() if name.startswith(prefix)}
            (outside if term.get("outside", False) else inside).append(matrix(term, matrix_shape(self.entry), mine))
        if self.entry.rotation is None:
            inside, outside = inside + outside, []
        if not inside:
            raise DamagedError("a term that is not outside the rotation")
        self.stored = inside[0] if len(inside) == 1 else Sum(inside, getattr(torch, self.entry.sum_dtype))
        self.outside = outside
        rotation = self.entry.rotation
        self.into, self.out = (rotation.in_, rotation.out) if rotation is not None else (None, None)
        self.parts = {name: part for name, part in parts.items() if name.startswith(("in_", "out_"))}

    @property
    def matrices(self) -> list[Matrix]:
        return [self.stored, *self.outside]

    def linear(self, x: Tensor) -> Tensor:
        """x [n, in] -> [n, out]: ``D·P·U (Ŵ (Uᵀ·Pᵀ·D x))``."""
        x = _padded(x, self.stored.shape[1])
        y = rotate.undo("out", self.out, self.parts, self.stored.linear(rotate.apply("in", self.into, self.parts, x)))
        for term in self.outside:
            y = y + term.linear(x)
        return y[:, : self.features[0]]

    def linear_transposed(self, y: Tensor) -> Tensor:
        """y [n, out] -> [n, in]."""
        y = _padded(y, self.stored.shape[0])
        turned = rotate.apply("out", self.out, self.parts, y)
        x = rotate.undo("in", self.into, self.parts, self.stored.linear_transposed(turned))
        for term in self.outside:
            x = x + term.linear_transposed(y)
        return x[:, : self.features[1]]

    def take(self, rows: Tensor) -> Tensor:
        """The given rows of W, int64 [n] -> [n, in]."""
        stored = rotate.undo("in", self.into, self.parts, self._turned_rows(rows))
        if self.out is not None and self.out.scale is not None:
            stored = stored * self.parts["out_scale"][rows, None]
        for term in self.outside:
            stored = stored + term.take(rows)
        return stored[:, : self.features[1]]

    def _turned_rows(self, rows: Tensor) -> Tensor:
        """Rows of ``P·U·Ŵ``: each mixes the rows of its block, which are decoded a bounded number at a time."""
        side = self.out
        if side is None or (side.size == 1 and side.perm is None):
            return self.stored.take(rows)
        if side.perm is not None:
            rows = torch.argsort(self.parts["out_perm"])[rows]
        out = torch.empty(len(rows), self.stored.shape[1], device=rows.device)
        blocks, place = rows // side.size, rows % side.size
        for some in blocks.unique().split(max(1, ROWS_AT_A_TIME // side.size)):
            wanted = some[:, None] * side.size + torch.arange(side.size, device=rows.device)
            mixed = rotate.mix(side, self.parts, self.stored.take(wanted.flatten()).unflatten(0, wanted.shape))
            here = torch.isin(blocks, some)
            out[here] = mixed[torch.searchsorted(some, blocks[here]), place[here]]
        return out

    def decode(self) -> Tensor:
        """W as the model holds it, ``entry.shape``: the rotation undone in float64, then rounded once."""
        value = self.stored.decode(0, self.stored.shape[0])
        if self.entry.rotation is not None:
            value = rotate.undo("in", self.into, self.parts, value.double())
            value = rotate.undo("out", self.out, self.parts, value.mT).mT
            for term in self.outside:
                value = value + term.decode(0, term.shape[0])
            value = value.float()
        value = value[: self.features[0], : self.features[1]]
        return (value.mT if self.entry.transposed else value).reshape(self.entry.shape).contiguous()


def _padded(x: Tensor, size: int) -> Tensor:
    return x if x.shape[-1] == size else torch.nn.functional.pad(x, (0, size - x.shape[-1]))


# first part -> what it was made of, what was made of it; gone with the part
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_stacks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def prepared(parts: Sequence[Tensor], text: str) -> Prepared:
    """Made once for as long as the parts stay where and what they are."""
    state = text, state_of(parts)
    found = _known.get(parts[0])
    if found is None or found[0] != state:
        found = state, Prepared(text, dict(zip(names_of(text), parts, strict=True)))
        _known[parts[0]] = found
    ready: Prepared = found[1]
    return ready


def one_of_stack(parts: Sequence[Tensor], index: int) -> list[Tensor]:
    """The parts of a matrix of a stack: the same tensors every time, for :func:`prepared` to know them again."""
    state = state_of(parts)
    found = _stacks.get(parts[0])
    if found is None or found[0] != state:
        found = state, {}
        _stacks[parts[0]] = found
    views: list[Tensor] = found[1].setdefault(index, None) or [part.data[index] for part in parts]
    found[1][index] = views
    return views


def state_of(parts: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(part.data_ptr(), 0 if part.is_inference() else part._version) for part in parts]
