"""``additive``: decoding element by element, cutting, encoding, and what is refused."""

from __future__ import annotations

from typing import Any

import making
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import random_parts, seeds

from qformat import bits as fields
from qformat import codecs
from qformat.codecs import _additive_search as search
from qformat.codecs import additive as codec
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError, UnsupportedError
from qformat.kernels import native


def read(**params: Any) -> codec.Params:
    found = codecs.read_params({"codec": "additive", **params})[1]
    assert isinstance(found, codec.Params)
    return found


def one_by_one(params: codec.Params, shape: tuple[int, int], parts: dict[str, Array]) -> Array:
    down, across = params.group
    count = shape[1] // across * params.books
    size = fields.row_bytes(count, params.bits)
    codes = [fields.unpack(row.ravel()[:size], params.bits, count) for row in parts["codes"]]
    out = np.empty(shape, np.float32)
    for i in range(shape[0]):
        for j in range(shape[1]):
            picked = codes[i // down][j // across * params.books :][: params.books]
            value = np.float32(parts["table"][0, picked[0], i % down, j % across])
            for book in range(1, params.books):
                value = value + np.float32(parts["table"][book, picked[book], i % down, j % across])
            if params.scales is not None:
                rows, cols = (n if b == -1 else b for n, b in zip(shape, params.block, strict=True))
                value = value * np.float32(parts["scales"][i // rows, j // cols])
            out[i, j] = value
    return out


@settings(max_examples=60)
@given(st.data(), seeds)
def test_decode_is_a_sum_of_entries(data: st.DataObject, rng: np.random.Generator) -> None:
    shape = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 24)))
    term = data.draw(making.additive_terms(shape).filter(lambda t: not isinstance(t.get("scales"), dict)))
    params = read(**{key: value for key, value in term.items() if key != "codec"})
    parts = random_parts(rng, params, shape)
    got = codec.decode(params, shape, parts)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, one_by_one(params, shape, parts))


@settings(max_examples=60)
@given(st.data(), seeds)
def test_a_cut_is_the_cut_of_the_values_or_refused(data: st.DataObject, rng: np.random.Generator) -> None:
    """Through every place of both axes: where bytes would divide and tiles would not, there is no cut."""
    shape = data.draw(st.tuples(st.integers(1, 12), st.sampled_from([6, 8, 12, 16, 24])))
    term = {**data.draw(making.additive_terms(shape)), "block": [-1, -1]}
    weight = making.packed(rng, making.entry(shape, term))
    params, whole = codecs.read_params(term)[1], weight.decode()
    assert isinstance(params, codec.Params)
    for axis, unit in ((0, params.group[0]), (1, params.group[1] * params.run)):
        for start in range(shape[axis]):
            stop = data.draw(st.integers(start + 1, shape[axis]))
            if start % unit or (stop % unit and stop != shape[axis]):
                with pytest.raises(UnsupportedError):
                    weight.slice(axis, start, stop)
            else:
                expected = whole[start:stop] if axis == 0 else whole[:, start:stop]
                assert np.array_equal(weight.slice(axis, start, stop).decode(), expected)


def loss(params: codec.Params, weight: Array) -> float:
    """The relative squared error of what is encoded, held against its layout."""
    parts = codec.encode(params, weight)
    shape = (weight.shape[0], weight.shape[1])
    assert {part.name: (part.shape, NUMPY[str(part.dtype)]) for part in codec.layout(params, shape)} == {
        name: (array.shape, array.dtype) for name, array in parts.items()
    }
    codec.check(params, shape, parts)
    error = codec.decode(params, shape, parts).astype(np.float64) - weight
    return float((error**2).sum() / (weight.astype(np.float64) ** 2).sum())


def heavy_tailed(rows: int, cols: int) -> Array:
    """As trained weights are: long tails, rows of different sizes."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(0, 0.5, (rows, 1)))
    return (rng.standard_t(6, (rows, cols)) * sizes * 0.02).astype(np.float32)


def kmeans(weight: Array, books: int, entries: int) -> float:
    """Residual k-means with a scale for each row, in float64, as plainly as can be: what the encoder must beat."""
    scale = np.sqrt((weight.astype(np.float64) ** 2).mean(axis=1, keepdims=True))
    rest = (weight / scale).reshape(-1, 8)
    rng = np.random.default_rng(1)
    for _ in range(books):
        points = rest[rng.choice(len(rest), entries, replace=False)]
        for _ in range(30):
            codes = ((points**2).sum(axis=1) / 2 - rest @ points.T).argmin(axis=1)
            sums = np.stack([np.bincount(codes, column, entries) for column in rest.T], axis=1)
            counts = np.bincount(codes, minlength=entries)[:, None]
            points = np.where(counts > 0, sums / np.maximum(counts, 1), points)
        rest = rest - points[codes]
    return float(((rest.reshape(weight.shape) * scale) ** 2).sum() / (weight.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize(("books", "bits"), [(1, 6), (2, 5), (3, 4)])
def test_encode_beats_residual_k_means(books: int, bits: int) -> None:
    weight = heavy_tailed(48, 256)
    found = loss(read(bits=bits, books=books, scales="float16"), weight)
    assert found < (0.99 if books == 1 else 0.97) * kmeans(weight, books, 2**bits)


def test_more_books_are_better() -> None:
    weight = heavy_tailed(32, 256)
    losses = [loss(read(bits=4, books=books, scales="float16"), weight) for books in (1, 2, 4, 6)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.1


@pytest.mark.parametrize(
    ("params", "shape"),
    [
        ({"bits": 4, "books": 2, "group": [2, 4], "block": [2, -1], "scales": "float16"}, (6, 40)),
        ({"bits": 3, "books": 3, "group": [1, 3]}, (5, 33)),
        ({"bits": 9, "books": 1, "group": [1, 2], "block": [-1, -1], "scales": "bfloat16"}, (3, 10)),
        ({"bits": 2, "books": 2, "group": [4, 1], "block": [4, 8], "scales": "float8_e8m0fnu"}, (8, 20)),
        ({"bits": 5, "books": 1, "table": "float32", "scales": "float32"}, (1, 8)),
    ],
)
def test_encode_any_params(params: dict[str, Any], shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    assert loss(read(**params), weight) < 0.6


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scales", ["float16", "float32", "float8_e8m0fnu", None])
@pytest.mark.parametrize("value", [0.0, 0.5, -2.0])
def test_constant_blocks(scales: str | None, value: float) -> None:
    params, weight = read(bits=4, books=2, scales=scales), np.full((4, 40), value, np.float32)
    weight[3] = 0
    parts = codec.encode(params, weight)
    codec.check(params, weight.shape, parts)
    np.testing.assert_allclose(codec.decode(params, (4, 40), parts), weight, rtol=1e-2, atol=1e-4)


def test_the_nearest_entry_is_found() -> None:
    rng = np.random.default_rng(3)
    vectors, entries = (rng.standard_normal((n, 8)).astype(np.float32) for n in (700, 300))
    entries[7] = entries[200]  # of equals the first
    distances = ((vectors[:, None].astype(np.float64) - entries) ** 2).sum(axis=2)
    np.testing.assert_array_equal(search.nearest(vectors, entries), distances.argmin(axis=1))


@pytest.mark.skipif(not native.available(), reason="no native library")
@pytest.mark.parametrize("group", [(1, 8), (2, 8), (1, 4), (1, 3), (1, 1)])
def test_the_fast_encoder_is_the_reference(group: tuple[int, int]) -> None:
    params = read(bits=5, books=2, group=group, block=[group[0], -1], scales="float16")
    weight = np.random.default_rng(4).standard_normal((8, 96)).astype(np.float32)
    slow, fast = codec.encode(params, weight), native.binding("additive").encode(params, weight)
    assert slow.keys() == fast.keys()
    assert all(slow[name].tobytes() == fast[name].tobytes() for name in slow)


def test_the_books_of_a_large_matrix_come_from_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = heavy_tailed(64, 256)
    whole = loss(read(bits=4, books=2, scales="float16"), weight)
    monkeypatch.setattr(search, "SAMPLE", 1024)
    assert whole < loss(read(bits=4, books=2, scales="float16"), weight) < 1.1 * whole


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "key `bits`, found none"),
        ({"bits": 17}, "<= 16 at `\\$.bits`, found 17"),
        ({"bits": 8, "books": 0}, ">= 1 at `\\$.books`, found 0"),
        ({"bits": 8, "books": 257}, "<= 256 at `\\$.books`, found 257"),
        ({"bits": 8, "group": [1, 0]}, ">= 1 at `\\$.group"),
        ({"bits": 8, "table": "nf4"}, "known value at `\\$.table`"),
        ({"bits": 8, "block": [0, 1]}, "block of positive sizes"),
        ({"bits": 8, "code": "hash"}, "code"),
    ],
)
def test_params_that_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        read(**params)


@pytest.mark.parametrize("shape", [(3, 8), (4, 12), (4, 4)])
def test_tiles_must_fill_the_matrix(shape: tuple[int, int]) -> None:
    with pytest.raises(DamagedError, match="multiples of the group \\[2, 8\\]"):
        codec.layout(read(bits=8, group=[2, 8]), shape)


@pytest.mark.parametrize(
    "params", [{"bits": 4, "block": [1, 12], "scales": "float16"}, {"bits": 4, "scales": {"codec": "int", "bits": 8}}]
)
def test_params_that_cannot_be_encoded(params: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        codec.encode(read(**params), np.ones((2, 24), np.float32))
    assert caught.value.found


@pytest.mark.parametrize("part", ["table", "scales"])
def test_numbers_that_are_not_finite(part: str) -> None:
    params = read(bits=2, books=2, scales="float16")
    parts = random_parts(np.random.default_rng(0), params, (2, 16))
    parts[part].flat[1] = np.nan
    with pytest.raises(DamagedError, match=f"finite {part}, found 1 that are not"):
        codec.check(params, (2, 16), parts)


@pytest.mark.parametrize("width", [0, 9, 2.5])
def test_bits_that_additive_has_not(width: float) -> None:
    with pytest.raises(UnsupportedError, match="bits"):
        codec.preset(width, False, {})


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("width", range(1, 9))
def test_presets_are_of_their_bits(width: int, rotated: bool) -> None:
    params, shape = read(**codec.preset(width, rotated, {})), (4096, 4096)
    nbytes = sum(part.nbytes for part in codec.layout(params, shape))
    assert width < 8 * nbytes / (shape[0] * shape[1]) < width + 0.05


def test_a_preset_takes_tiles_of_several_rows() -> None:
    params = read(**codec.preset(2, False, {"group": [4, 8]}))
    assert params.block == (4, -1)
