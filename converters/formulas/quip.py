"""QuIP#, as its code has it (Cornell-RelaxML/quip-sharp, lib/codebook/): words are taken apart as ``pack_e8p`` and its
siblings put them together, points of E8P are those of ``get_full_grid``, a residual is divided by its scale and added
in float16. What lies between the Hadamard transforms, fused layers whole.
"""

from __future__ import annotations

import functools

import numpy as np

from qformat import tables
from qformat.checkpoint import Checkpoint
from qformat.dtypes import Array

from ..plan import Item

RESIDUAL = {"E8P12RVQ3B": 2.04, "E8P12RVQ4B": 3.45}  # ``opt_resid_scale``
NIBBLES = (28, 12, 24, 8, 20, 4, 16, 0)  # bits of a word of HI4B1C at which the codes of eight columns begin


def rows(source: Checkpoint, item: Item, start: int, stop: int) -> Array:
    """Rows [start, stop) of the stored matrix: float32 [stop - start, cols]."""
    settings = source.config["quip_params"]
    book, words = settings["codebook"], source.array(f"{item.name.removesuffix('.weight')}.Qidxs")
    here: Array = words[start:stop]
    if book == "D4":  # ``decompress_d4``: four codes of a row, then the next row
        return _looked_up("d4", words.reshape(-1, len(words), 4)[:, start:stop].swapaxes(0, 1))
    if book == "HI4B1C":
        codes: Array = here[..., None] >> np.array(NIBBLES) & 15
        return codes.reshape(len(here), -1).astype(np.float32) - np.float32(7.5)
    if book == "E8P12":
        return _looked_up("e8p", _e8p(here))
    override = settings.get("resid_scale_override") or 0
    divisor = override if override > 0 else RESIDUAL[book]
    if book == "E8P12RVQ4B":
        base, rest = np.split(here, 2, axis=1)
        residual = _looked_up("e8p", _e8p(rest), divisor)
    else:
        base, rest = np.split(here, [here.shape[1] * 2 // 3], axis=1)
        residual = _looked_up("e81b", np.ascontiguousarray(rest).view(np.uint8), divisor)
    return (_looked_up("e8p", _e8p(base)) + residual).astype(np.float16).astype(np.float32)


def _looked_up(book: str, codes: Array, divisor: float = 1) -> Array:
    return _points(book, divisor)[codes].reshape(len(codes), -1)


@functools.cache
def _points(book: str, divisor: float) -> Array:
    """The points of all codes, divided in float32 and rounded to float16: float32 [codes, values]."""
    points = _grid() if book == "e8p" else tables.named(book).astype(np.float32)
    return (points / np.float32(divisor)).astype(np.float16).astype(np.float32)


def _grid() -> Array:
    """``get_full_grid``: float32 [65536, 8]."""
    code = np.arange(1 << 16)
    parity = (np.bitwise_count(code & 255) & 1)[:, None]
    flipped = ((code & 255)[:, None] ^ parity) >> np.array([0, 4, 1, 5, 2, 6, 3, 7]) & 1
    pattern = tables.named("e8p").astype(np.float32)[code >> 8]
    points: Array = np.where(flipped, -pattern, pattern) + np.where(parity, np.float32(-0.25), np.float32(0.25))
    return points


def _e8p(words: Array) -> Array:
    """int64 [rows, cols / 32] -> codes [rows, cols / 8]. A word has the codes of 2 x 2 places, row first; 8 x 4 words
    are together: the bytes of patterns in its lower half, signs 4 j + i of code i in its upper one.
    """
    pairs = np.ascontiguousarray(words).view(np.uint32).reshape(len(words) // 16, -1, 8, 4, 2)
    patterns, signs = pairs[..., 0], pairs[..., 1]
    codes = np.empty((2, 2, *patterns.shape), np.uint32)  # column, row; tile row, tile column, row, column
    for i in range(4):
        codes[i // 2, i % 2] = (patterns >> np.uint32(8 * i) & 255) << 8
        for j in range(8):
            codes[i // 2, i % 2] |= (signs >> np.uint32(4 * j + i) & 1) << j
    return codes.transpose(2, 4, 1, 3, 5, 0).reshape(len(words), -1)
