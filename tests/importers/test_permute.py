"""Bits go where the permutation says, by the native library as by NumPy, wherever blocks lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qformat import bits as fields
from qformat.converters.importers import _permute
from qformat.dtypes import Array
from qformat.kernels import native


def wanted(order: Array, blocks: Array) -> Array:
    """uint32 [blocks, words], bit by bit."""
    before = np.unpackbits(blocks.view(np.uint8), axis=1, bitorder="little")
    after = np.ascontiguousarray(before[:, order.reshape(-1)])
    return np.packbits(after, axis=1, bitorder="little").view(np.uint32)


def arranged(words: Array, how: str) -> Any:
    """uint32 [blocks, words] as arrays [3, 5, 7] of each word, that lie in one of several ways."""
    count = words.shape[1]
    if how == "side by side":
        return list(np.ascontiguousarray(words.T).reshape(count, 3, 5, 7))
    if how == "within blocks":
        return np.moveaxis(words.reshape(3, 5, 7, count), -1, 0)
    if how == "backwards":
        return np.moveaxis(np.ascontiguousarray(words.reshape(3, 5, 7, count)[::-1, :, ::-1])[::-1, :, ::-1], -1, 0)
    raw = np.zeros(words.nbytes + 1, np.uint8)  # from an odd address
    odd = raw[1:].view(np.uint32).reshape(7, 3, count, 5)
    odd[...] = words.reshape(3, 5, 7, count).transpose(2, 0, 3, 1)
    return odd.transpose(2, 1, 3, 0)


WAYS = ("side by side", "within blocks", "backwards", "odd")


@pytest.mark.parametrize("run", [_permute.permute, _permute.in_numpy])
@pytest.mark.parametrize("sources, targets", [(1, 1), (3, 2), (2, 5), (8, 8)])
def test_any_permutation(run: Any, sources: int, targets: int) -> None:
    rng = np.random.default_rng(sources)
    order = rng.integers(0, 32 * sources, 32 * targets)
    order[0] = 32 * sources - 1
    rule = _permute.permutation(order)
    blocks = rng.integers(0, 1 << 32, (105, sources), np.uint32)
    for one in WAYS:
        for other in WAYS:
            made = arranged(np.zeros((105, targets), np.uint32), other)
            run(rule, arranged(blocks, one), made)
            found = np.stack([word.reshape(-1) for word in made], axis=1)
            np.testing.assert_array_equal(found, wanted(order, blocks), f"{one}, {other}")


@pytest.mark.skipif(not native.available(), reason="no native library")
@pytest.mark.parametrize("variant", native.variants())
@pytest.mark.parametrize("blocks", [1, 63, 64, 65, 1000])
def test_the_library_is_numpy(variant: str, blocks: int) -> None:
    rng = np.random.default_rng(blocks)
    order = rng.permutation(7 * 32)
    words = rng.integers(0, 1 << 32, (7, blocks), np.uint32)
    made = np.zeros((2, 7, blocks + 1), np.uint32)  # nothing beyond the last is written
    with native.using(variant):
        _permute.permute(_permute.permutation(order), words, made[0, :, :-1])
    _permute.in_numpy(_permute.permutation(order), words, made[1, :, :-1])
    np.testing.assert_array_equal(made[0], made[1])
    np.testing.assert_array_equal(made[0, :, :-1].T, wanted(order, np.ascontiguousarray(words.T)))


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("shape", [(3, 32), (2, 5, 96), (1, 40), (0, 64)])
def test_pack(bits: int, shape: tuple[int, ...]) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, shape).astype(np.uint8 if bits <= 8 else np.uint16)
    np.testing.assert_array_equal(_permute.pack(codes, bits), fields.pack(codes, bits))


def test_what_does_not_fit_is_a_bug() -> None:
    rule = _permute.permutation(np.arange(64)[::-1])
    words = np.zeros((2, 5), np.uint32)
    for source, target in ((words, words[:, :4]), (words[:1], words), (words, words.view(np.uint16))):
        with pytest.raises(AssertionError):
            _permute.permute(rule, source, target)
