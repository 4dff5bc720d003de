"""Bits of words moved to other places: one permutation, the same for very many blocks of words. It is how codes are
re-laid, whatever the scheme: the numbers of a block's bits, as an array, are given the axes of the source and put into
the order of qformat, and blocks lie wherever arrays of any strides say.

Words are little-endian and bits counted from the lowest, as everywhere in qformat (:mod:`qformat.bits`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_int64, c_void_p
from typing import NamedTuple

import numpy as np

from qformat import bits as fields
from qformat.dtypes import Array
from qformat.kernels import native

BLOCK = 32  # codes of b bits fill exactly b words, whatever b is
AXES = 4  # of the blocks, at most
CHUNK = 1 << 15  # words that NumPy makes at a time
Words = Array | Sequence[Array]


class Permutation(NamedTuple):
    """``targets`` words, each the union of ``terms``: bits of one of ``sources`` words, shifted.

    ``terms``: int32 [n, 3] target, source, shift (upward; below 0 downward), in the order of the targets; ``masks``:
    uint32 [n], the bits of the source.
    """

    sources: int
    targets: int
    terms: Array
    masks: Array


def permutation(bits: Array) -> Permutation:
    """From the number, in the source block, of each bit of the target block: 32 for each word, in any shape."""
    source, target = bits.reshape(-1), np.arange(bits.size)
    moves = np.stack([target // 32, source // 32, target % 32 - source % 32], axis=1).astype(np.int32)
    terms, which = np.unique(moves, axis=0, return_inverse=True)
    masks = np.zeros(len(terms), np.uint32)
    np.bitwise_or.at(masks, which.reshape(-1), np.left_shift(np.uint32(1), (source % 32).astype(np.uint32)))
    return Permutation(int(source.max()) // 32 + 1, bits.size // 32, np.ascontiguousarray(terms), masks)


def numbers(*axes: int) -> Array:
    """The numbers of a block's bits as an array of these axes."""
    return np.arange(np.prod(axes)).reshape(axes)


def permute(rule: Permutation, source: Words, target: Words) -> None:
    """The words of all blocks: word i of each in ``source[i]``, arrays of 32 bits of one shape and one set of strides
    with up to four axes, or nested sequences of such; likewise in ``target``, which is written.
    """
    source, target = _listed(source, rule.sources), _listed(target, rule.targets)
    assert len({(one.shape, one.strides) for one in source}) == len({(one.shape, one.strides) for one in target}) == 1
    assert source[0].shape == target[0].shape and source[0].itemsize == target[0].itemsize == 4
    (_native if native.available() else in_numpy)(rule, source, target)


def _listed(words: Words, count: int) -> list[Array]:
    listed = list(words)
    while len(listed) < count:
        listed = [one for some in listed for one in some]
    assert len(listed) == count
    return listed


def in_numpy(rule: Permutation, source: Words, target: Words) -> None:
    """The definition, and what there is without the native library. Some blocks at a time: they stay in the cache."""
    step = max(1, CHUNK * len(source[0]) // max(1, rule.targets * source[0].size))
    for start in range(0, len(source[0]), step):
        words = [np.ascontiguousarray(one[start : start + step]).view(np.uint32) for one in source]
        made = np.zeros((rule.targets, *words[0].shape), np.uint32)
        for (number, origin, up), mask in zip(rule.terms.tolist(), rule.masks, strict=True):
            part = words[origin] & mask
            made[number] |= part << up if up >= 0 else part >> -up
        for one, word in zip(target, made, strict=True):
            one[start : start + step].view(np.uint32)[...] = word


class _Rule(Structure):
    """qf_permutation of qformat.h."""

    _fields_ = [
        *((name, c_int64) for name in ("sources", "targets", "count")),
        ("terms", c_void_p),
        ("masks", c_void_p),
    ]


def _native(rule: Permutation, source: list[Array], target: list[Array]) -> None:
    given = _Rule(rule.sources, rule.targets, len(rule.terms), rule.terms.ctypes.data, rule.masks.ctypes.data)
    shape = np.array((1,) * (AXES - source[0].ndim) + source[0].shape, np.int64)
    places = []
    for words in (source, target):
        strides = (0,) * (AXES - words[0].ndim) + words[0].strides
        places += [np.array([one.ctypes.data for one in words], np.uint64), np.array(strides, np.int64)]
    native.call("qf_permute", ctypes.addressof(given), shape, *places)


def pack(codes: Array, bits: int) -> Array:
    """As :func:`qformat.bits.pack`, of the lowest ``bits`` of integers of 8 or 16 bits, and faster where rows are whole
    blocks of 32 codes.
    """
    *lead, n = codes.shape
    if n % BLOCK:
        return fields.pack(codes & ((1 << bits) - 1), bits)
    rule = permutation(numbers(BLOCK, 8 * codes.itemsize)[:, :bits])
    out = np.empty((n * codes[..., 0].size // BLOCK, bits), np.uint32)
    permute(rule, np.ascontiguousarray(codes).view(np.uint32).reshape(len(out), 8 * codes.itemsize).T, out.T)
    return out.view(np.uint8).reshape(*lead, n * bits // 8)
