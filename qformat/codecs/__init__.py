"""The codecs: one module each, found by name. Adding one adds files with its name and a line in ``NAMES``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from ..dtypes import Array
from ..errors import DamagedError, UnsupportedError
from ..layout import Part
from ..records import Record, read_record

NAMES = ("additive", "e8p", "float", "int", "table", "trellis")
MAX_NESTING = 2  # levels of parts that are themselves packed


class Codec(Protocol):
    """What every codec module holds. ``shape`` is always the matrix ``(out, in)``; parts are NumPy arrays.

    ``preset`` gives the params for ``quantize --bits BITS``, around the ``settings`` that were asked for; ``rotated``
    weights are Gaussian, with one variance throughout. A codec may have ``SUMS``, too: bits -> those of the terms that
    add up to them. ``units`` are the rows and columns that a matrix is padded to multiples of before it can be encoded.
    """

    NAME: str
    Params: type[Record]

    @staticmethod
    def layout(params: Any, shape: tuple[int, int]) -> list[Part]: ...
    @staticmethod
    def decode(params: Any, shape: tuple[int, int], parts: Mapping[str, Array]) -> Array: ...
    @staticmethod
    def encode(params: Any, weight: Array) -> dict[str, Array]: ...
    @staticmethod
    def check(params: Any, shape: tuple[int, int], parts: Mapping[str, Array]) -> None: ...
    @staticmethod
    def units(params: Any) -> tuple[int, int]: ...
    @staticmethod
    def preset(bits: float, rotated: bool, settings: Mapping[str, Any]) -> dict[str, Any]: ...


def get(name: str) -> Codec:
    """The codec module called ``name``; :class:`UnsupportedError` (exit 4) where there is none."""
    if name not in NAMES:
        raise UnsupportedError(f"one of the codecs {', '.join(NAMES)}", repr(name), hint="a newer qformat may know it")
    return importlib.import_module(f"{__name__}.{name}")  # type: ignore[return-value]


def preset(name: str, bits: float, rotated: bool, settings: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The terms, as JSON, for ``quantize --codec NAME --bits BITS``; ``settings`` are those of each."""
    codec = get(name)
    widths = getattr(codec, "SUMS", {}).get(bits, (bits,))
    return tuple({"codec": name, **codec.preset(width, rotated, settings)} for width in widths)


def read_params(term: Mapping[str, Any], depth: int = 0) -> tuple[Codec, Record]:
    """A term as JSON, ``{"codec": ..., param: ...}`` without its ``outside`` key -> the codec and its params, validated
    down to the terms of parts that are themselves packed.
    """
    if depth > MAX_NESTING:
        raise DamagedError(f"at most {MAX_NESTING} levels of packed parts", "more")
    if not isinstance(term.get("codec"), str):
        raise DamagedError("the name of a codec", repr(term.get("codec")))
    codec = get(term["codec"])
    params = read_record(codec.Params, {key: value for key, value in term.items() if key != "codec"})
    for value in map(params.__getattribute__, params.__struct_fields__):
        if isinstance(value, Mapping):
            read_params(value, depth + 1)
    return codec, params
