"""A packed matrix on a device: how it is decoded and multiplied with. ``MATRICES`` says who does it for which codec."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from qformat import codecs, weight
from qformat.dtypes import NUMPY, Array
from qformat.errors import UnsupportedError
from qformat.kernels import native
from qformat.manifest import Entry, Term, read_term
from qformat.weight import PackedWeight

STRIP = 128  # rows decoded at a time where a matrix has to be decoded to be multiplied with


class Matrix:
    """``[rows, cols]`` as its codec sees it; everything in float32. A kind overrides what it has a better way for."""

    fast = True  # False: the codec's definition in NumPy, for want of a kernel

    def __init__(self, shape: tuple[int, int], strip: int) -> None:
        self.shape, self.strip = shape, strip

    @classmethod
    def of(cls, term: Term, shape: tuple[int, int], parts: Mapping[str, Tensor]) -> Self | None:
        """The matrix that one term's parts hold, or None where this kind cannot."""
        raise NotImplementedError

    def decode(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, multiples of ``strip`` or the end: [stop - start, cols]."""
        raise NotImplementedError

    def strips(self) -> Iterator[tuple[int, int]]:
        rows = self.shape[0]
        return ((start, min(start + self.strip, rows)) for start in range(0, rows, self.strip))

    def linear(self, x: Tensor) -> Tensor:
        """x [n, cols] -> [n, rows]."""
        y = x.new_empty(len(x), self.shape[0])
        for start, stop in self.strips():
            y[:, start:stop] = x @ self.decode(start, stop).mT
        return y

    def linear_transposed(self, y: Tensor) -> Tensor:
        """y [n, rows] -> [n, cols]."""
        x = y.new_zeros(len(y), self.shape[1])
        for start, stop in self.strips():
            x += y[:, start:stop] @ self.decode(start, stop)
        return x

    def take(self, rows: Tensor) -> Tensor:
        """The given rows, int64 [n] -> [n, cols]."""
        out = torch.empty(len(rows), self.shape[1], device=rows.device)
        strips = rows // self.strip
        for strip in strips.unique().tolist():
            start = strip * self.strip
            here = strips == strip
            out[here] = self.decode(start, min(start + self.strip, self.shape[0]))[rows[here] - start]
        return out


class Native(Matrix):
    """The C++ library's kernels."""

    def __init__(self, packed: native.Matrix) -> None:
        super().__init__(packed.shape, STRIP * 8)
        self.packed = packed

    @classmethod
    def of(cls, term: Term, shape: tuple[int, int], parts: Mapping[str, Tensor]) -> Self | None:
        codec, params, _ = read_term(term)
        packed = native.matrix(codec.NAME, params, shape, {n: array(t) for n, t in plain(term, shape, parts).items()})
        return cls(packed) if packed is not None else None

    def decode(self, start: int, stop: int) -> Tensor:
        return torch.from_numpy(self.packed.decode(start, stop, threads=torch.get_num_threads()))

    def linear(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.packed.linear(x.numpy(), threads=torch.get_num_threads()))

    def take(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self.packed.embedding(rows.numpy(), threads=torch.get_num_threads()))


class Triton(Matrix):
    """The Triton kernels: the matrix is decoded for each product and let go."""

    def __init__(self, kernel: Any, params: Any, shape: tuple[int, int], parts: Mapping[str, Tensor]) -> None:
        super().__init__(shape, max(shape[0], 1))
        self.kernel, self.params, self.parts = kernel, params, parts

    @classmethod
    def of(cls, term: Term, shape: tuple[int, int], parts: Mapping[str, Tensor]) -> Self | None:
        codec, params, _ = read_term(term)
        try:
            kernel = importlib.import_module(f"qformat.kernels.gpu.{codec.NAME}")
        except ImportError:  # torch for a GPU that comes without Triton
            return None
        return cls(kernel, params, shape, plain(term, shape, parts))

    def decode(self, start: int, stop: int) -> Tensor:
        whole: Tensor = self.kernel.dequantize(self.params, self.shape, self.parts)
        return whole[start:stop]

    def take(self, rows: Tensor) -> Tensor:
        found: Tensor = self.kernel.dequantize(self.params, self.shape, self.parts, rows=rows)
        return found


class Reference(Matrix):
    """The codec's definition in NumPy, strip by strip: for every codec, on every device, slow."""

    fast = False

    def __init__(self, packed: PackedWeight, device: torch.device) -> None:
        self.packed, self.device = packed, device
        rows, cols = packed.shape
        units = (part.out_unit for part in weight.layout(packed.entry) if part.out_axis is not None)
        unit = math.lcm(*(unit.numerator for unit in units))
        try:
            packed.slice(0, 0, min(unit, rows))
        except UnsupportedError:  # blocks that no cut along rows respects
            unit = rows
        super().__init__((rows, cols), -(-STRIP // unit) * unit)

    @classmethod
    def of(cls, term: Term, shape: tuple[int, int], parts: Mapping[str, Tensor]) -> Self | None:
        inside = {key: value for key, value in term.items() if key != "outside"}
        entry = Entry(weights=("matrix",), shape=shape, dtype="float32", terms=(inside,))
        arrays = {part.name: array(parts[part.name].cpu()) for part in weight.layout(entry)}
        return cls(PackedWeight("", entry, arrays), next(iter(parts.values())).device)

    def decode(self, start: int, stop: int) -> Tensor:
        strip = self.packed if (start, stop) == (0, self.shape[0]) else self.packed.slice(0, start, stop)
        return torch.from_numpy(strip.decode()).to(self.device)


class Sum(Matrix):
    """Several terms, added in order; ``dtype`` rounds after each addition."""

    def __init__(self, terms: list[Matrix], dtype: torch.dtype) -> None:
        super().__init__(terms[0].shape, math.lcm(*(term.strip for term in terms)))
        self.terms, self.dtype = terms, dtype
        self.fast = all(term.fast for term in terms)

    def decode(self, start: int, stop: int) -> Tensor:
        first, *rest = (term.decode(start, stop) for term in self.terms)
        for value in rest:
            first = (first + value).to(self.dtype).float()
        return first


# (device, codec) -> the kinds that can hold it, best first; any other device: Reference
MATRICES: dict[tuple[str, str], tuple[type[Matrix], ...]] = {
    (device, codec): (kind, Reference) for device, kind in (("cpu", Native), ("cuda", Triton)) for codec in codecs.NAMES
}


def matrix(term: Term, shape: tuple[int, int], parts: Mapping[str, Tensor]) -> Matrix:
    """The best matrix for a term whose parts, named as in its layout, lie on one device."""
    device = next(iter(parts.values())).device.type
    for kind in MATRICES.get((device, term["codec"]), (Reference,)):
        if (found := kind.of(term, shape, parts)) is not None:
            return found
    raise UnsupportedError(f"a decoder of {term['codec']} for {device}")


def plain(term: Term, shape: tuple[int, int], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts as the codec's ``decode`` takes them: those that are themselves packed are decoded."""
    codec, params, _ = read_term(term)
    out = {}
    for part in codec.layout(params, shape):
        if isinstance(part.dtype, str):
            out[part.name] = parts[part.name]
            continue
        prefix, flat = part.name + "_", (math.prod(part.shape[:-1]), part.shape[-1])
        inner = {name.removeprefix(prefix): t for name, t in parts.items() if name.startswith(prefix)}
        out[part.name] = matrix(dict(part.dtype), flat, inner).decode(0, flat[0]).reshape(part.shape)
    return out


def array(tensor: Tensor) -> Array:
    """A tensor of the CPU as NumPy sees it, not copied."""
    dtype = NUMPY[str(tensor.dtype).removeprefix("torch.")]
    if dtype.isbuiltin == 1:
        return tensor.numpy()
    # bfloat16 and the types of 8 bits, which torch does not hand over by itself
    bits = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    return tensor.view(bits).numpy().view(dtype)
