"""safetensors files: a lazy, memory-mapped reader that trusts nothing, and a streaming writer with checksums.

A file is the length of its header (8 bytes, little-endian), a JSON header, and the tensors' bytes. Page:
``spec/README.md``, Files.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import BinaryIO, NamedTuple, Self

import numpy as np
import xxhash

from .dtypes import FROM_SAFETENSORS, NUMPY, SAFETENSORS, Array
from .errors import DamagedError, QformatError, SurroundingsError, UnsupportedError
from .files import POINTER, pointer
from .names import natural
from .records import read_json

MAX_HEADER = 100_000_000  # bytes; other readers refuse more
ALIGN = 64
CHECKSUMS = "qformat.checksums"
_BITS = {tag: NUMPY[name].itemsize * 8 for tag, name in FROM_SAFETENSORS.items()}
_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # without a NumPy dtype of their own: passed through, not computed with


class Tensor(NamedTuple):
    """Where a tensor lies: its safetensors dtype, shape, and bytes [start, stop) of the file."""

    tag: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def dtype(self) -> str:
        """The dtype's name in ``dtypes``, or its tag where that table lacks it."""
        return FROM_SAFETENSORS.get(self.tag, self.tag)


class Shard:
    """One file, opened for reading: ``tensors`` from its checked header, arrays as views of a memory map."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fill: Callable[[int, int], None] | None = None  # brings bytes of a file that holds but its header
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                header, data_start = _read_header(file, size)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            self.metadata, self.tensors = _check_header(header, data_start, size)
        except OSError as error:
            raise SurroundingsError(f"a readable file: {error.strerror}", file=path) from None
        except QformatError as error:
            raise error.located(file=path) from None

    def raw(self, name: str) -> Array:
        """The bytes of a tensor, uint8, not copied."""
        tensor = self.tensors[name]
        if self.fill is not None:
            self.fill(tensor.start, tensor.stop)
        return np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.start)

    def array(self, name: str) -> Array:
        """A read-only view of a tensor; :class:`UnsupportedError` for a dtype that NumPy cannot hold."""
        tensor = self.tensors[name]
        if tensor.tag not in FROM_SAFETENSORS:
            raise UnsupportedError("a dtype that can be computed with", tensor.tag, file=self.path, weight=name)
        return self.raw(name).view(NUMPY[tensor.dtype]).reshape(tensor.shape)

    def checksums(self) -> dict[str, str] | None:
        """Tensor name -> XXH3-128 as stored, or None where a foreign tool re-saved the file without them."""
        if CHECKSUMS not in self.metadata:
            return None
        try:
            stored = read_json(self.metadata[CHECKSUMS])
        except DamagedError as error:
            raise error.located(file=self.path) from None
        if not isinstance(stored, dict):
            raise DamagedError("checksums by tensor name", type(stored).__name__, file=self.path)
        for name in stored.keys() ^ self.tensors.keys():
            found = "none" if name in self.tensors else "one of no tensor"
            raise DamagedError("a checksum of every tensor", found, file=self.path, weight=name)
        return stored

    def check(self) -> None:
        """Raise :class:`DamagedError` naming the first tensor whose bytes differ from their checksum."""
        for name, stored in (self.checksums() or {}).items():
            found = checksum(self.raw(name))
            if found != stored:
                raise DamagedError(f"checksum {stored}", found, file=self.path, weight=name)


def checksum(data: Array) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)


def _read_header(file: BinaryIO, size: int) -> tuple[object, int]:
    """The parsed header and where the data starts; no more is read than the file holds and the limit allows."""
    first = file.read(8)
    if first == POINTER[:8] and first + file.read(len(POINTER) - 8) == POINTER:
        raise pointer(Path(file.name))
    length = int.from_bytes(first, "little")
    if size < 8 or length > size - 8:
        raise DamagedError(f"a header within the file's {size} bytes", f"{length} bytes")
    if length > MAX_HEADER:
        raise DamagedError(f"a header of at most {MAX_HEADER} bytes", f"{length} bytes")
    return read_json(file.read(length)), 8 + length


def _check_header(header: object, data_start: int, size: int) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Offsets must be contiguous from the header to the end of the file and agree with dtype and shape."""
    if not isinstance(header, dict):
        raise DamagedError("a JSON object as header", type(header).__name__)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedError("__metadata__ from strings to strings", repr(metadata))
    tensors = {name: _check_tensor(name, info, data_start) for name, info in header.items()}
    at, previous = data_start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != at:
            how = "overlaps" if tensor.start < at else "leaves a hole after"
            raise DamagedError(
                f"data at byte {at - data_start}", f"{tensor.start - data_start}, which {how} {previous}", weight=name
            )
        at, previous = tensor.stop, name
    if at != size:
        raise DamagedError(f"a file of {at} bytes", f"{size}: truncated or with bytes to spare")
    return metadata, tensors


def _check_tensor(name: str, info: object, data_start: int) -> Tensor:
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise DamagedError("dtype, shape and data_offsets", repr(info), weight=name)
    tag, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(tag, str) or tag not in _BITS:
        raise UnsupportedError("a known dtype", repr(tag), weight=name)
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or len(shape) > 32:
        raise DamagedError("shape and data_offsets of non-negative integers", f"{shape}, {offsets}", weight=name)
    if math.prod(size or 1 for size in shape) >= 1 << 56:  # with a 0 among them too: NumPy refuses it
        raise DamagedError("a shape of fewer than 2**56 elements", str(shape), weight=name)
    bits = math.prod(shape) * _BITS[tag]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise DamagedError(f"{bits // 8} bytes for {tag} {shape}", f"{offsets[1] - offsets[0]}", weight=name)
    return Tensor(tag, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


class Spec(NamedTuple):
    """A tensor to be written: safetensors dtype and shape."""

    tag: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.tag] // 8


def spec(dtype: str, shape: Iterable[int]) -> Spec:
    return Spec(SAFETENSORS[dtype], tuple(shape))


class ShardWriter:
    """Writes one file whose tensors are known beforehand, in any order, at their final place; nothing is held in
    memory. ``missing`` are those still to be put.

    ``done``: checksums of tensors that an earlier writer of the same file has put; those whose bytes have it are kept.

    A context manager: leaving it without an error completes the header, and fails where a tensor was never put.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, Spec],
        metadata: Mapping[str, str],
        done: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.path = path
        self._specs, self._metadata = dict(specs), dict(metadata)
        self._checksums = dict.fromkeys(specs, "0" * 32)  # of their final length, so that the header's is too
        order = sorted(specs, key=lambda name: (specs[name].nbytes % ALIGN != 0, natural(name)))
        self._offsets: dict[str, int] = {}
        at = 0
        for name in order:
            self._offsets[name], at = at, at + specs[name].nbytes
        self._data_start = len(self._header())
        self._file = open(path, "r+b" if done and path.exists() else "w+b")
        self._file.truncate(self._data_start + at)
        for name in specs.keys() & done.keys():
            self._checksums[name] = self._written(name)
        self.missing = {name for name in specs if self._checksums[name] != done.get(name)}

    def _header(self) -> bytes:
        sums = {name: self._checksums[name] for name in sorted(self._checksums, key=natural)}
        header: dict[str, object] = {
            "__metadata__": {**self._metadata, CHECKSUMS: json.dumps(sums, separators=(",", ":"), ensure_ascii=False)}
        }
        for name, start in self._offsets.items():
            tag, shape = self._specs[name]
            header[name] = {"dtype": tag, "shape": shape, "data_offsets": [start, start + self._specs[name].nbytes]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % ALIGN)
        return len(text).to_bytes(8, "little") + text

    def _written(self, name: str) -> str:
        """The checksum of the bytes at a tensor's place."""
        self._file.seek(self._data_start + self._offsets[name])
        return checksum(np.fromfile(self._file, np.uint8, self._specs[name].nbytes))

    def put(self, name: str, data: Array) -> str:
        """Write a tensor, given as its array or as raw uint8 bytes of the same length; its checksum. Threads may put
        tensors at the same time.
        """
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        assert raw.nbytes == self._specs[name].nbytes, (name, raw.nbytes, self._specs[name])
        with open(self.path, "r+b", buffering=0) as file:
            file.seek(self._data_start + self._offsets[name])
            left = raw.data
            while left:  # the system takes 2 GiB at a time
                left = left[file.write(left) :]
        self._checksums[name] = checksum(raw)
        self.missing.discard(name)
        return self._checksums[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                assert not self.missing, sorted(self.missing)[:3]
                self._file.seek(0)
                self._file.write(self._header())
