"""The reference encoder of ``additive``: books by residual k-means, refined by turns, and a search for codes.

Nothing here is a part of the format: any codes decode. Sums are made in a fixed order, never by a matrix product, whose
order differs from machine to machine, so that the same weight gives the same bytes everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..dtypes import Array

# (vectors [n, d], entries [m, d]) -> the index of the nearest entry to each vector, uint16 [n]
Nearest = Callable[[Array, Array], Array]

SAMPLE = 1 << 15  # vectors that the books are made from, at most
ROUNDS = 12  # of Lloyd's algorithm for each book on what those before it leave
TURNS = 8  # in which each book is fitted once more to what all others leave
PASSES = 2  # over the codes of all vectors, with the books as they are stored
SEARCHED = 1 << 17  # products of vectors and entries at a time: they stay in the cache


def nearest(vectors: Array, entries: Array) -> Array:
    """float32 [n, d], [m, d] -> uint16 [n]; the first of equals."""
    half = (entries**2).sum(axis=1) / 2
    out = np.empty(len(vectors), np.uint16)
    step = max(1, SEARCHED // len(entries))
    for start in range(0, len(vectors), step):
        part = vectors[start : start + step]
        likeness = part[:, :1] * entries[:, 0]
        for k in range(1, entries.shape[1]):
            likeness += part[:, k, None] * entries[:, k]
        likeness -= half
        out[start : start + step] = likeness.argmax(axis=1)
    return out


def train(vectors: Array, importance: Array, books: int, entries: int, nearest: Nearest) -> Array:
    """Books for vectors [n, d] whose squared errors count ``importance`` [n] times: float32 [books, entries, d]."""
    if len(vectors) > SAMPLE:
        chosen = _scattered(len(vectors))[:SAMPLE]
        vectors, importance = vectors[chosen], importance[chosen]
    table = np.empty((books, entries, vectors.shape[1]), np.float32)
    codes = np.empty((books, len(vectors)), np.uint16)
    rest = vectors.copy()
    for book in range(books):
        table[book] = rest[np.resize(_scattered(len(rest)), entries)]
        for _ in range(ROUNDS):
            codes[book] = nearest(rest, table[book])
            table[book] = _means(rest, importance, codes[book], table[book])
        rest -= table[book][codes[book]]
    for _ in range(TURNS if books > 1 else 0):
        for book in range(books):
            rest += table[book][codes[book]]
            codes[book] = nearest(rest, table[book])
            table[book] = _means(rest, importance, codes[book], table[book])
            rest -= table[book][codes[book]]
    return table


def search(vectors: Array, table: Array, nearest: Nearest) -> Array:
    """Codes [n, books] for vectors [n, d]: for each book the nearest to what the books before it leave, then, by turns,
    to what all others leave.
    """
    codes = np.empty((len(vectors), len(table)), np.uint16)
    rest = vectors.copy()
    for turn in range(1 + (PASSES if len(table) > 1 else 0)):
        for book, entries in enumerate(table):
            if turn:
                rest += entries[codes[:, book]]
            codes[:, book] = nearest(rest, entries)
            rest -= entries[codes[:, book]]
    return codes


def _scattered(count: int) -> Array:
    """0 to count - 1 in an order in which any beginning is spread over the whole."""
    return np.argsort(np.arange(count, dtype=np.uint32) * np.uint32(2654435769), kind="stable")  # 2**32 / golden ratio


def _means(vectors: Array, importance: Array, codes: Array, before: Array) -> Array:
    """The mean of the vectors of each entry; ``before`` where it has none."""
    count = len(before)
    total = np.bincount(codes, weights=importance, minlength=count)
    sums = [np.bincount(codes, weights=importance * column, minlength=count) for column in vectors.T]
    means = np.stack(sums, axis=1) / np.where(total > 0, total, 1)[:, None]
    return np.where(total[:, None] > 0, means, before).astype(np.float32)
