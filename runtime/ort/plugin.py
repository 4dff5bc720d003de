"""The plugin: the native library as ONNX Runtime's kernels for ``qformat::Linear_N`` and ``qformat::Embedding_N``.

:func:`register` adds it to a session's options, and makes any graph that ``qformat export`` wrote run from its packed
weights where they lie. Each weight is prepared once, when the session is made, from the node's attributes and its
constant inputs; runs are in C++, on the session's own threads. Importing this module is enough for a program that
registers the library by itself, :func:`library` says which file.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import threading
import weakref
from collections.abc import Iterator
from ctypes import c_char_p, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from qformat import weight
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError, QformatError, UnsupportedError, UsageError
from qformat.kernels import native
from qformat.kernels.cpu.weight import Weight
from qformat.kernels.cpu.weight import weight as native_weight
from qformat.manifest import Entry
from qformat.records import read_record

_always: list[Weight] = []  # of sessions whose end nobody tells us
_registered: weakref.WeakSet[Any] = weakref.WeakSet()  # options
_here = threading.local()  # .weights: of the session that this thread is making


def library() -> Path:
    """The file to register; :class:`UnsupportedError` where the native library was not built."""
    if not native.available():
        raise UnsupportedError("the native library", native.why(), hint="`qformat doctor` says more")
    return native.path()


def register(options: Any) -> None:
    """Add the plugin to an ``onnxruntime.SessionOptions``.

    Raises :class:`UsageError` for options that have it, :class:`UnsupportedError` where it cannot be had.
    """
    if options in _registered:
        raise UsageError("options without the plugin", "options that it was added to")
    try:
        options.register_custom_ops_library(str(library()))
    except Exception as error:  # ONNX Runtime's own have no base in common
        raise UnsupportedError("ONNX Runtime that takes the plugin", str(error).strip().splitlines()[0]) from None
    _registered.add(options)


@contextlib.contextmanager
def making() -> Iterator[list[Weight]]:
    """The weights of the sessions that this thread makes in the block. They must be kept for as long as those are."""
    _here.weights = []
    try:
        yield _here.weights
    finally:
        del _here.weights


def entry_of(text: str) -> Entry:
    """The inverse of :func:`.functions.text`; :class:`DamagedError` for what is no entry."""
    fields = json.loads(text)
    return read_record(Entry, {**fields, "weights": ["weight"], "dtype": "float32"})


@ctypes.CFUNCTYPE(c_void_p, c_char_p, c_char_p, c_void_p, c_void_p, c_int64)
def _prepare(text: bytes, name: bytes, node: int, message: int, size: int) -> int | None:
    """qf_prepare of qformat.h: called by the library when a session is made."""
    try:
        entry = entry_of(text.decode())
        parts = {part.name: _constant(node, i, part) for i, part in enumerate(weight.layout(entry), 1)}
        made = native_weight(entry, parts, name.decode())
    except Exception as error:  # of any kind: there is no other way out of here
        found = error.located(weight=name.decode()) if isinstance(error, QformatError) else error
        short = f"qformat: {found}".encode()[: size - 1]
        ctypes.memmove(message, short + b"\0", len(short) + 1)
        return None
    getattr(_here, "weights", _always).append(made)
    return ctypes.addressof(made.head)


def _constant(node: int, index: int, part: Any) -> Array:
    """Input ``index`` of a node, an initializer: a view of it where it lies."""
    data, count = c_void_p(), c_int64()
    native.call("qf_ort_constant", node, index, ctypes.byref(data), ctypes.byref(count))
    dtype, wanted = NUMPY[part.dtype], math.prod(part.shape)
    if count.value != wanted or (wanted and not data.value):
        found = f"{count.value}" if data.value else "none, or one that is no initializer"
        raise DamagedError(f"{wanted} elements of {part.name}", found)
    buffer = (ctypes.c_char * (wanted * dtype.itemsize)).from_address(data.value or 0) if wanted else b""
    return np.frombuffer(buffer, dtype).reshape(part.shape)


if native.available():
    native.give("qf_ort_use", _prepare)
