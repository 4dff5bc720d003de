"""The native library: found beside this file, loaded with ctypes, absent without harm.

``available()`` says whether it is there and ``why()`` why not. :func:`matrix` makes a packed matrix that the library
can decode and multiply with; it returns None where it cannot, and the caller then uses the codec's own ``decode``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import itertools
import sys
from collections.abc import Iterator, Mapping
from ctypes import Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qformat import blocks, codecs
from qformat.dtypes import Array
from qformat.errors import DamagedError, UnsupportedError

ABI = 8  # of kernels/cpu/qformat.h
OK, UNSUPPORTED, NO_MEMORY = 0, -1, -2
VARIANTS = ("avx512", "avx2", "scalar")
SUFFIXES = (".so", ".pyd", ".dylib")


class Head(Structure):
    """qf_matrix of qformat.h, as Grid is qf_grid and Values qf_values."""

    _fields_ = [(name, c_int64) for name in ("codec", "rows", "cols", "row_unit", "col_unit")]


class Grid(Structure):
    _fields_ = [(name, c_int64) for name in ("rows", "cols", "across")]


class Values(Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int64)]


SIGNATURES: dict[str, list[Any]] = {
    "qf_use": [c_char_p],
    "qf_decode": [c_void_p, c_int64, c_int64, c_void_p, c_int32],
    "qf_embedding": [c_void_p, c_void_p, c_int64, c_void_p, c_int32],
    "qf_linear": [c_void_p, c_void_p, c_int64, c_void_p, c_int32],
    "qf_weight_linear": [c_void_p, c_void_p, c_int64, c_void_p, c_int32],
    "qf_weight_embedding": [c_void_p, c_void_p, c_int64, c_void_p, c_int32],
    "qf_ort_use": [c_void_p],
    "qf_ort_constant": [c_void_p, c_int64, c_void_p, c_void_p],
    "qf_trellis_encode": [
        *(c_void_p, c_int64, c_int64, c_void_p, c_int32, c_int32, c_void_p, c_int32, c_int64, c_int32),
        *(c_void_p, c_void_p),
    ],
    "qf_int_search": [
        *(c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_float, c_float, c_int32),
        *(c_int32, c_void_p, c_void_p),
    ],
    "qf_table_search": [
        *(c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p),
        *(c_int32, c_int32, c_void_p, c_void_p),
    ],
    "qf_e8p_search": [c_void_p, c_int64, c_int64, c_void_p, c_int32, c_void_p],
    "qf_permute": [c_void_p] * 6,
}


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why."""
    folders = [Path(folder) for folder in sys.modules[__package__ or ""].__path__]
    found = [path for folder in folders for path in sorted(folder.glob("_native*")) if path.suffix in SUFFIXES]
    why = f"no library _native in {', '.join(map(str, folders))}"
    for path in found:
        try:
            library = ctypes.CDLL(str(path))
            abi = library.qf_abi()
        except (OSError, AttributeError) as error:
            why = f"{path}: {error}"
            continue
        if abi == ABI:
            for name, types in SIGNATURES.items():
                getattr(library, name).argtypes = types
            library.qf_variant.restype = c_char_p
            return library, ""
        why = f"{path}: expected ABI {ABI}, found {abi}"
    return None, why


def available() -> bool:
    return _load()[0] is not None


def why() -> str:
    """Why the library is not available; empty where it is."""
    return _load()[1]


def path() -> Path:
    """The library's file; to be asked for where it is available."""
    library, why = _load()
    assert library is not None, why
    return Path(library._name)


def variant() -> str:
    """The instruction set in use: avx512, avx2 or scalar; ``numpy`` without the library."""
    library, _ = _load()
    return library.qf_variant().decode() if library else "numpy"


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Another instruction set for a while, in the whole process; :class:`UnsupportedError` where it is lacking."""
    before = variant()
    call("qf_use", name.encode())
    try:
        yield
    finally:
        call("qf_use", before.encode())


def variants() -> list[str]:
    """The instruction sets of this machine, best first; empty without the library."""
    supported = []
    for name in VARIANTS if available() else ():
        with contextlib.suppress(UnsupportedError), using(name):
            supported.append(name)
    return supported


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library. Arrays are passed as they lie in memory and must be C-contiguous.

    Raises :class:`UnsupportedError` where the library has no kernel for the settings, :class:`MemoryError`.
    """
    library, why = _load()
    if library is None:
        raise UnsupportedError("the native library", why)
    passed = [_address(argument) if isinstance(argument, np.ndarray) else argument for argument in arguments]
    status = getattr(library, name)(*passed)
    if status == NO_MEMORY:
        raise MemoryError(name)
    if status != OK:
        raise UnsupportedError(f"settings that {name} has a kernel for")


def give(name: str, function: Any) -> None:
    """Hand the library a ctypes callback, by the function ``name``."""
    library, why = _load()
    assert library is not None, why
    getattr(library, name)(function)


def _address(array: Array) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data


class Operand:
    """What rows can be multiplied with and taken from: ``head`` is its C structure, ``PREFIX`` begins the names of the
    library's functions for it.
    """

    PREFIX = ""
    head: Structure

    @property
    def shape(self) -> tuple[int, int]:
        raise NotImplementedError

    def embedding(self, rows: Array, *, threads: int = 0) -> Array:
        """The given rows, integers [n]: float32 [n, cols]."""
        wanted = np.ascontiguousarray(rows, np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.shape[0]:
            raise DamagedError(f"rows below {self.shape[0]}", f"{wanted.min()} to {wanted.max()}")
        out = np.empty((wanted.size, self.shape[1]), np.float32)
        call(f"{self.PREFIX}_embedding", ctypes.addressof(self.head), wanted, wanted.size, out, threads)
        return out

    def linear(self, x: Array, *, out: Array | None = None, threads: int = 0) -> Array:
        """float32 [..., cols] times the transposed matrix: float32 [..., rows]."""
        rows, cols = self.shape
        if x.shape[-1] != cols or x.dtype != np.float32:
            raise DamagedError(f"float32 of {cols} columns", f"{x.dtype} of {x.shape[-1]}")
        x = np.ascontiguousarray(x)
        if out is None:
            out = np.empty((*x.shape[:-1], rows), np.float32)
        assert out.dtype == np.float32 and out.shape == (*x.shape[:-1], rows)
        call(f"{self.PREFIX}_linear", ctypes.addressof(self.head), x, x.size // cols, out, threads)
        return out


@dataclass(frozen=True)
class Matrix(Operand):
    """A packed matrix ``[rows, cols]`` for the library. ``head`` is its C structure, ``held`` what that points into."""

    PREFIX = "qf"
    head: Structure
    held: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.head.matrix.rows, self.head.matrix.cols

    def decode(self, start: int = 0, stop: int | None = None, *, threads: int = 0) -> Array:
        """Rows start to stop: float32 [stop - start, cols], equal to the codec's ``decode`` bit for bit."""
        rows, cols = self.shape
        stop = rows if stop is None else stop
        if not 0 <= start <= stop <= rows:
            raise DamagedError(f"rows within 0..{rows}", f"{start}..{stop}")
        unit = self.head.matrix.row_unit
        first, last = start // unit * unit, min(rows, -(-stop // unit) * unit)
        out = np.empty((last - first, cols), np.float32)
        call("qf_decode", ctypes.addressof(self.head), first, last, out, threads)
        return out[start - first : stop - first]


def matrix(codec: str, params: Any, shape: tuple[int, int], parts: Mapping[str, Array]) -> Matrix | None:
    """The matrix that ``parts`` (as for the codec's ``decode``) hold, for the library; None where it has no kernel.

    Raises :class:`DamagedError` where the parts are not those of the layout: the library trusts their sizes.
    """
    if not available():
        return None
    for part in codecs.get(codec).layout(params, shape):
        if parts[part.name].shape != part.shape:
            raise DamagedError(f"{part.name} {list(part.shape)}", str(list(parts[part.name].shape)))
    arrays = {name: np.ascontiguousarray(array) for name, array in parts.items()}
    return binding(codec).matrix(params, shape, arrays)  # type: ignore[no-any-return]


def decode(codec: codecs.Codec, params: Any, shape: tuple[int, int], parts: Mapping[str, Array]) -> Array:
    """The codec's ``decode``, by the library where it has a kernel, on one thread."""
    found = matrix(codec.NAME, params, shape, parts)
    return codec.decode(params, shape, parts) if found is None else found.decode(threads=1)


def binding(codec: str) -> Any:
    """The module ``cpu/<codec>.py``: how the codec's params and parts become the library's structures."""
    return importlib.import_module(f"{__package__}.cpu.{codec}")


DTYPES = {"float32": 1, "float16": 2, "bfloat16": 3, "uint8": 4, "int16": 5}  # as numbered in qformat.h


def values(array: Array | None) -> tuple[Values, tuple[Array, ...]]:
    """One value for each block as the library takes it, and what to keep alive. Other dtypes are widened, exactly."""
    if array is None:
        return Values(None, 0), ()
    if array.dtype.name not in DTYPES:
        array = array.astype(np.float32)
    return Values(array.ctypes.data, DTYPES[array.dtype.name]), (array,)


def grid(block: blocks.Block, view: blocks.Block | None, shape: tuple[int, int]) -> Grid | None:
    """How the library finds an element's block; None for views that are not plain blocks of the matrix in disguise."""
    if view is None:
        rows, cols = blocks.size(block, shape)
        return Grid(max(rows, 1), max(cols, 1), blocks.grid(block, shape)[1])
    rows, cols = blocks.size(block, view)
    if rows != 1 or view[1] % cols or shape[1] % cols:
        return None
    return Grid(1, cols, shape[1] // cols)  # runs of `cols` elements, counted through the matrix


def stretches(count: int, size: int = 1 << 14) -> Iterator[slice]:
    """0 to count in stretches of about ``size``, none of a single one unless ``count`` is 1."""
    edges = np.linspace(0, count, max(1, count // size) + 1).astype(int)
    for start, stop in itertools.pairwise(edges):
        yield slice(int(start), int(stop))
