"""``e8p``: its points, decoding element by element, the nearest point, encoding, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import making
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import random_parts, seeds

from qformat import codecs
from qformat.codecs import e8p as codec
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError, UnsupportedError

PUBLISHED = json.loads((Path(__file__).parents[1] / "data/tables/published.json").read_text())["tables"]
EVERY = {1: np.arange(256, dtype=np.uint8)[:, None], 2: np.arange(65536, dtype="<u2")[:, None].view(np.uint8)}


def read(**params: Any) -> codec.Params:
    found = codecs.read_params({"codec": "e8p", **params})[1]
    assert isinstance(found, codec.Params)
    return found


@pytest.mark.parametrize(("bits", "name", "unit"), [(2, "e8p12_full", 4), (1, "e81b_grid", 2)])
def test_points_are_the_published_ones(bits: int, name: str, unit: int) -> None:
    points = codec.points(EVERY[bits])
    units = (points * unit).astype(np.int8)
    assert np.array_equal(units, points * unit) and list(units.shape) == PUBLISHED[name]["shape"]
    assert hashlib.sha256(units.tobytes()).hexdigest() == PUBLISHED[name]["sha256"]


def test_points_lie_on_the_lattice() -> None:
    """Twice a point, a quarter taken away, is of odd numbers whose sum is a multiple of 4: D8 + 1/2."""
    points = codec.points(EVERY[2]).astype(np.float64)
    assert len(np.unique(points, axis=0)) == 65536
    for shift in (0.25, -0.25):
        doubled = 2 * (points - shift)
        inside = (np.abs(doubled % 2) == 1).all(axis=1)
        assert inside.sum() == 32768 and not (doubled[inside].sum(axis=1) % 4).any()


def one_by_one(params: codec.Params, shape: tuple[int, int], parts: dict[str, Array]) -> Array:
    points = codec.points(EVERY[params.bits])
    out = np.empty(shape, np.float32)
    for i in range(shape[0]):
        for j in range(shape[1]):
            code = int.from_bytes(parts["codes"][i, j // 8].tobytes(), "little")
            value = points[code, j % 8]
            if params.scales is not None:
                rows, cols = (n if b == -1 else b for n, b in zip(shape, params.block, strict=True))
                value = value * np.float32(parts["scales"][i // rows, j // cols])
            if params.rounding == "once":
                value = np.float32(np.float32(value).astype(NUMPY[params.round_dtype]))
            out[i, j] = value
    return out


@settings(max_examples=50)
@given(st.data(), seeds)
def test_decode_is_a_look_up(data: st.DataObject, rng: np.random.Generator) -> None:
    shape = data.draw(st.integers(1, 6)), 8 * data.draw(st.integers(1, 3))
    term = data.draw(making.e8p_terms(shape).filter(lambda t: not isinstance(t.get("scales"), dict)))
    params = read(**{key: value for key, value in term.items() if key != "codec"})
    parts = random_parts(rng, params, shape)
    got = codec.decode(params, shape, parts)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, one_by_one(params, shape, parts))


@pytest.mark.parametrize("bits", [1, 2])
def test_the_code_is_the_nearest_point(bits: int) -> None:
    """Of all points, for vectors near the origin, far from it, and on borders between points."""
    rng = np.random.default_rng(bits)
    points = codec.points(EVERY[bits]).astype(np.float64)
    vectors = np.concatenate(
        [rng.standard_normal((60, 8)), 4 * rng.standard_normal((30, 8)), np.eye(8), np.zeros((1, 8))]
    )
    vectors = np.concatenate([vectors, rng.integers(-4, 5, (20, 8)) / 2]).astype(np.float32)
    found = ((vectors - codec.points(codec.nearest(vectors, bits))) ** 2).sum(axis=1)
    best = np.array([((vector - points) ** 2).sum(axis=1).min() for vector in vectors.astype(np.float64)])
    np.testing.assert_allclose(found, best, rtol=1e-5, atol=1e-6)


def test_a_point_is_nearest_to_itself() -> None:
    for bits, codes in EVERY.items():
        codes = codes[::37]
        np.testing.assert_array_equal(codec.nearest(codec.points(codes), bits), codes)


def error(weight: Array, *widths: int) -> float:
    """The relative mean squared error of a sum of terms, each one encoding what is left over."""
    rest = weight.copy()
    for bits in widths:
        params = read(**codec.preset(bits, True, {}))
        parts = codec.encode(params, rest)
        codec.check(params, weight.shape, parts)
        for part in codec.layout(params, weight.shape):
            assert parts[part.name].shape == part.shape and parts[part.name].dtype == NUMPY[str(part.dtype)]
        rest -= codec.decode(params, weight.shape, parts)
    return float((rest**2).mean() / (weight**2).mean())


LIMITS = [((2,), 0.0925), ((1,), 0.322), ((2, 1), 0.0308), ((2, 2), 0.0098)]


@pytest.mark.parametrize(("widths", "limit"), LIMITS)
def test_what_terms_cost_a_gaussian(widths: tuple[int, ...], limit: float) -> None:
    """0.0916 at 2 bits for a large matrix (`bench/distortion.py`); this one is small."""
    weight = np.random.default_rng(0).standard_normal((128, 256)).astype(np.float32)
    assert 0.9 * limit < error(weight, *widths) < limit


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scales", ["float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e8m0fnu", None])
def test_blocks_of_zeros(scales: str | None) -> None:
    params = read(block=[1, 16], scales=scales)
    weight = np.ones((3, 24), np.float32)
    weight[1] = 0
    decoded = codec.decode(params, weight.shape, codec.encode(params, weight))
    assert np.isfinite(decoded).all()
    if scales:
        assert np.abs(decoded[1]).max() < 1e-30 and abs(decoded[0].mean() - 1) < 0.3


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"bits": 3}, "known value at `\\$.bits`, found 3"),
        ({"block": [0, -1]}, "block of positive sizes"),
        ({"scales": "float64"}, "scales"),
        ({"table": "e8p"}, "known keys, found `table`"),
    ],
)
def test_params_that_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        read(**params)


def test_columns_come_eight_at_a_time() -> None:
    with pytest.raises(DamagedError, match="columns in multiples of 8, found 12"):
        codec.layout(read(), (4, 12))
    assert codec.units(read()) == (1, 8)


def test_scales_that_are_not_finite() -> None:
    params = read(scales="float16")
    parts = random_parts(np.random.default_rng(0), params, (2, 8))
    parts["scales"][0, 0] = np.inf
    with pytest.raises(DamagedError, match="finite scales, found 1 that are not"):
        codec.check(params, (2, 8), parts)


def test_what_cannot_be_encoded() -> None:
    with pytest.raises(UnsupportedError, match="parts with a dtype"):
        codec.encode(read(scales={"codec": "int", "bits": 8}), np.ones((2, 16), np.float32))
    for bits in (0.5, 2.5, 5):
        with pytest.raises(UnsupportedError, match="1, 2, 3 or 4 bits"):
            codecs.preset("e8p", bits, True, {})


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_presets_are_of_their_bits(bits: int, rotated: bool) -> None:
    terms = [codecs.read_params(term)[1] for term in codecs.preset("e8p", bits, rotated, {})]
    nbytes = sum(part.nbytes for params in terms for part in codec.layout(params, (64, 256)))
    assert bits <= 8 * nbytes / (64 * 256) <= bits + 0.07 * len(terms)
