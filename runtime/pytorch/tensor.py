"""What a module's ``weight`` is while its parts stay packed: :class:`PackedTensor`, and :class:`Joined` for experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn import functional

from qformat.errors import UnsupportedError

from . import ops
from .prepared import entry_of, one_of, one_of_stack, rows_of, shape_of


class PackedTensor(Tensor):
    """The decoded weight, as far as anyone can tell from outside: its shape, dtype and device.

    Products and look-ups run on the packed parts, an index along a stack gives one of its matrices, any other function
    gets the decoded values, and writing raises :class:`UnsupportedError`: it would be lost.
    """

    parts: Sequence[Tensor]
    spec: str

    @staticmethod
    def __new__(cls, parts: Sequence[Tensor], spec: str, dtype: torch.dtype) -> Self:
        shape, device = shape_of(spec), parts[0].device
        out: Self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        out.parts, out.spec = parts, spec
        return out

    def decode(self) -> Tensor:
        return ops.dequantize_op(self.parts, self.spec).to(self.dtype)

    def is_matrix(self, transposed: bool) -> bool:
        """Whether a product with the weight, turned or not, is one with the matrix that its codec sees."""
        if self.ndim != 2 or (transposed and rows_of(self.spec)):  # which then are columns of it
            return False
        return entry_of(self.spec).transposed == transposed

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] times the transposed matrix that the codec sees: [..., out] in the dtype of x."""
        y: Tensor = ops.linear_op(x, self.parts, self.spec)
        return y

    def take(self, rows: Tensor) -> Tensor:
        """The given rows of that matrix: float32 [..., in]."""
        found: Tensor = ops.embedding_op(rows, self.parts, self.spec)
        return found

    def one(self, index: int) -> Any:
        """A matrix of a stack, packed; NotImplemented where there is none."""
        if entry_of(self.spec).stack != 1:
            return NotImplemented
        first, _ = rows_of(self.spec) or (0, 0)
        return PackedTensor(one_of_stack(self.parts, first + index), one_of(self.spec), self.dtype)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PackedTensor({list(self.shape)}, {self.dtype}, {self.spec})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedTensor:
        return PackedTensor([part.clone() for part in self.parts], self.spec, self.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if _writes(name, args, kwargs):
            raise UnsupportedError("a packed weight that is only read", name)
        with torch._C.DisableTorchFunctionSubclass():
            found = _PACKED[func](*args, **kwargs) if func in _PACKED else NotImplemented
            return func(*args, **kwargs) if found is NotImplemented else found

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What reaches this is no question of shape or dtype: it gets the decoded values."""
        args, kwargs = pytree.tree_map_only(PackedTensor, lambda one: one.decode(), (args, kwargs or {}))
        return func(*args, **kwargs)


class PiecesTensor(PackedTensor):
    """The same for a weight that is stored as several, one after another along ``axis``."""

    pieces: Sequence[PackedTensor]
    axis: int

    @staticmethod
    def __new__(cls, pieces: Sequence[PackedTensor], axis: int, dtype: torch.dtype) -> Self:  # type: ignore[override]
        shape = list(pieces[0].shape)
        shape[axis] = sum(piece.shape[axis] for piece in pieces)
        out: Self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=pieces[0].device)
        out.pieces, out.axis = pieces, axis
        return out

    def decode(self) -> Tensor:
        return torch.cat([piece.decode() for piece in self.pieces], self.axis).to(self.dtype)

    def is_matrix(self, transposed: bool) -> bool:
        return all(piece.is_matrix(transposed) for piece in self.pieces)

    def product(self, x: Tensor) -> Tensor:
        if self.axis == int(self.is_matrix(transposed=True)):  # one below the other, to a codec
            return torch.cat([piece.product(x) for piece in self.pieces], dim=-1)
        inputs = x.float().split([piece.shape[self.axis] for piece in self.pieces], dim=-1)
        products = [piece.product(part) for piece, part in zip(self.pieces, inputs, strict=True)]
        return torch.stack(products).sum(dim=0).to(x.dtype)

    def take(self, rows: Tensor) -> Tensor:
        if self.axis == 1:
            return torch.cat([piece.take(rows) for piece in self.pieces], dim=-1)
        ops.check_rows(rows, self.shape[0])
        out = torch.empty(*rows.shape, self.shape[1], device=rows.device)
        for piece in self.pieces:
            here = (rows >= 0) & (rows < len(piece))
            out[here] = piece.take(rows[here])
            rows = rows - len(piece)
        return out

    def one(self, index: int) -> Any:
        if self.axis:
            ones = [piece.one(index) for piece in self.pieces]
            return (
                NotImplemented
                if any(one is NotImplemented for one in ones)
                else PiecesTensor(ones, self.axis - 1, self.dtype)
            )
        for piece in self.pieces:
            if index < len(piece):
                return piece.one(index)
            index -= len(piece)
        return NotImplemented

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PiecesTensor({list(self.pieces)}, axis={self.axis})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PiecesTensor:
        return PiecesTensor([piece.__deepcopy__(memo) for piece in self.pieces], self.axis, self.dtype)


def _writes(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.startswith("__"))
    target = kwargs.get("out") if not in_place else next(iter((*args, *kwargs.values())), None)
    return isinstance(target, PackedTensor)


_IN_PLACE = {f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()} | {
    "__set__",
    "__setitem__",
}


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not _is_matrix(weight, transposed=False):
        return NotImplemented
    y = weight.product(input)
    return y if bias is None else y + bias


def _matmul(input: Tensor, other: Any) -> Any:
    return other.product(input) if _is_matrix(other, transposed=True) else NotImplemented


def _addmm(input: Tensor, mat1: Tensor, mat2: Any) -> Any:
    return input + mat2.product(mat1) if _is_matrix(mat2, transposed=True) else NotImplemented


def _embedding(input: Tensor, weight: Any, padding_idx: object = None, max_norm: object = None, **rest: object) -> Any:
    if not _is_matrix(weight, transposed=False) or max_norm is not None:
        return NotImplemented
    return weight.take(input).to(weight.dtype)


def _getitem(self: Any, index: Any) -> Any:
    whole = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point())
    if not isinstance(self, PackedTensor) or not whole:
        return NotImplemented
    count = self.shape[0]
    if not -count <= int(index) < count:
        raise IndexError(f"a number below {count} expected, {int(index)} found")
    return self.one(int(index) % count)


def _itself(self: Tensor, *_: object) -> Tensor:
    return self


_PACKED: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    functional.embedding: _embedding,
    Tensor.__matmul__: _matmul,
    Tensor.matmul: _matmul,
    torch.matmul: _matmul,
    torch.addmm: _addmm,
    Tensor.__getitem__: _getitem,
    Tensor.detach: _itself,
    Tensor.data.__get__: _itself,
}


def _is_matrix(weight: Any, transposed: bool) -> bool:
    return isinstance(weight, PackedTensor) and weight.is_matrix(transposed)


class Joined:
    """Experts that are held one by one, as a model's own code finds them: ``[experts, out, in]``, to be indexed.

    Each expert's matrix is the concatenation of ``leaves``, children of the child with its number.
    """

    def __init__(self, experts: torch.nn.Module, leaves: Sequence[str]) -> None:
        self.experts, self.leaves = experts, leaves

    def __getitem__(self, index: int | Tensor) -> Rows:
        expert = self.experts.get_submodule(str(int(index)))
        return Rows([expert.get_submodule(leaf) for leaf in self.leaves])


class Rows:
    """The weights of several linear layers, one below the other."""

    def __init__(self, layers: Sequence[torch.nn.Module]) -> None:
        self.layers = layers

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and len(args) == 2 and isinstance(args[1], Rows):
            return torch.cat([layer(args[0]) for layer in args[1].layers], dim=-1)
        args, kwargs = pytree.tree_map_only(Rows, Rows.decode, (args, kwargs or {}))
        return func(*args, **kwargs)

    def decode(self) -> Tensor:
        return torch.cat([layer.weight for layer in self.layers])
