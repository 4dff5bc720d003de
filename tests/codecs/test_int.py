"""``int``: decoding element by element, encoding, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import int_terms, random_parts, seeds

from qformat import bits, codecs
from qformat.codecs import int as codec
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError, UnsupportedError


def read(**params: Any) -> codec.Params:
    found = codecs.read_params({"codec": "int", **params})[1]
    assert isinstance(found, codec.Params)
    return found


def one_by_one(params: codec.Params, shape: tuple[int, int], parts: dict[str, Array]) -> Array:
    """The page's formula for each element, in exact numbers that are rounded where it says so."""
    rows, cols = params.view or shape
    high, wide = (n if b == -1 else min(b, n) for b, n in zip(params.block, (rows, cols), strict=True))
    codes = bits.unpack(parts["codes"], params.bits, shape[1])
    out = np.empty(shape, np.float32)

    def rounded(value: Any, dtype: str) -> np.float32:
        return np.float32(np.float32(value).astype(NUMPY[dtype]))

    for i in range(shape[0]):
        for j in range(shape[1]):
            flat = i * shape[1] + j
            y, x = (flat // cols, flat % cols) if params.view else (i, j)
            at = y // high, int(parts["groups"][j]) if "groups" in parts else x // wide
            code, scale = np.float32(codes[i, j]), np.float32(parts["scales"][at])
            each = params.round_dtype if params.rounding == "each" else "float32"
            last = params.round_dtype if params.rounding != "none" else "float32"
            if "offsets" in parts:
                offset = np.float32(parts["offsets"][at])
                if params.rounding == "fused":
                    exact = float(code) * float(scale) + float(offset)
                    out[i, j] = np.float32(NUMPY[last].type(exact)) if last != "bfloat16" else np.nan
                else:
                    out[i, j] = rounded(rounded(code * scale, each) + offset, last)
            else:
                zero = np.float32(parts["zeros"][at]) if "zeros" in parts else np.float32(params.zero)
                out[i, j] = rounded(rounded(code - zero, each) * scale, last)
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[codec.Params, tuple[int, int]]:
    shape = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    term = draw(int_terms(shape, depth=0).filter(lambda t: not any(isinstance(v, dict) for v in t.values())))
    return read(**{key: value for key, value in term.items() if key != "codec"}), shape


@given(cases(), seeds)
def test_decode_is_the_formula(case: tuple[codec.Params, tuple[int, int]], rng: np.random.Generator) -> None:
    params, shape = case
    parts = random_parts(rng, params, shape)
    want = one_by_one(params, shape, parts)
    got = codec.decode(params, shape, parts)
    assert got.dtype == np.float32
    known = ~np.isnan(want)
    np.testing.assert_array_equal(got[known], want[known])


def mse(params: codec.Params, weight: Array, parts: dict[str, Array] | None = None) -> float:
    parts = codec.encode(params, weight) if parts is None else parts
    for part in codec.layout(params, weight.shape):
        assert parts[part.name].shape == part.shape and parts[part.name].dtype == NUMPY[str(part.dtype)]
    assert len(parts) == len(codec.layout(params, weight.shape))
    codec.check(params, weight.shape, parts)
    return float(((codec.decode(params, weight.shape, parts) - weight) ** 2).mean())


def absmax(params: codec.Params, weight: Array) -> dict[str, Array]:
    """What most tools do: the scale that reaches the largest magnitude, then rounding."""
    groups = weight.reshape(weight.shape[0], -1, params.block[1])
    top = 2 ** (params.bits - 1) - 1
    scale = (np.abs(groups).max(axis=-1) / top).astype(np.float16)
    codes = np.clip(np.rint(groups / scale[..., None].astype(np.float32)), -top - 1, top) + top + 1
    packed = bits.pack(codes.reshape(weight.shape).astype(np.uint8), params.bits)
    return {"codes": packed, "scales": scale}


@pytest.mark.parametrize("width", range(2, 9))
def test_encode_beats_absmax_rounding(width: int) -> None:
    weight = np.random.default_rng(width).standard_normal((32, 128)).astype(np.float32)
    params = read(bits=width, block=[1, 64], zero=2 ** (width - 1))
    assert mse(params, weight) < 0.99 * mse(params, weight, absmax(params, weight))


FORMS: list[dict[str, Any]] = [
    {"zero": 8},
    {"zero": 7.5},
    {},
    {"zeros": "uint8"},
    {"zeros": "int16"},
    {"zeros": "float16"},
    {"zeros": "bfloat16"},
    {"offsets": "float16"},
    {"offsets": "float32"},
    {"zeros": "uint8", "scales": "bfloat16"},
    {"zeros": "uint8", "scales": "float8_e4m3fn"},
    {"zero": 8, "scales": "float8_e8m0fnu"},
    {"zero": 8, "scales": "float32", "view": [16, 60]},
    {"zeros": "float32", "block": [16, 16]},
    {"offsets": "bfloat16", "block": [-1, 7]},
    {"zero": 8, "block": [-1, -1]},
]


@pytest.mark.parametrize("form", FORMS, ids=[" ".join(f"{key}={form[key]}" for key in form) for form in FORMS])
@pytest.mark.parametrize("mean", [0.0, 1.5])
def test_every_form_can_be_encoded(form: dict[str, Any], mean: float) -> None:
    """The error is at most that of 16 even levels over what the form must span."""
    weight = (np.random.default_rng(0).standard_normal((24, 40)) * 0.25 + mean).astype(np.float32)
    params = read(bits=4, **{"block": [1, 20], **form})
    high, low = max(weight.max(), 0), min(weight.min(), 0)
    if params.zeros or params.offsets:
        span = high - low
    elif params.zero:
        span = 2 * max(high, -low)
    elif mean:
        span = high
    else:
        return  # without a zero-point a block of both signs has no codes for one of them
    coarse = 2 if params.scales == "float8_e8m0fnu" else 1  # powers of two
    assert mse(params, weight) < 1.1 * (coarse * span / 15) ** 2 / 12


@pytest.mark.parametrize("form", [{"zeros": "uint8"}, {"zeros": "float16"}, {"offsets": "float16"}])
def test_a_zero_point_helps_where_the_block_is_skewed(form: dict[str, Any]) -> None:
    weight = np.random.default_rng(0).exponential(size=(16, 128)).astype(np.float32)
    assert mse(read(bits=4, block=[1, 32], **form), weight) < 0.5 * mse(read(bits=4, block=[1, 32], zero=8), weight)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", FORMS, ids=range(len(FORMS)))
@pytest.mark.parametrize("value", [0.0, 0.5, -2.0, 1e-7])
def test_constant_blocks(form: dict[str, Any], value: float) -> None:
    params = read(bits=4, **{"block": [1, 20], **form})
    weight = np.full((24, 40), value, np.float32)
    weight[3] = 0
    parts = codec.encode(params, weight)
    codec.check(params, weight.shape, parts)
    decoded = codec.decode(params, weight.shape, parts)
    if params.scales != "float8_e8m0fnu" and not (params.zero == 7.5 and value == 0) and abs(value) > 1e-6:
        np.testing.assert_allclose(decoded[0], weight[0], rtol=0.08)
    if value == 0 and params.zero != 7.5:
        assert not decoded.any()


@settings(max_examples=30)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 40), seeds)
def test_encode_any_shape(width: int, rows: int, cols: int, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((rows, cols)).astype(np.float32)
    params = read(**codec.preset(width, False, {}))
    parts = codec.encode(params, weight)
    codec.check(params, weight.shape, parts)
    for part in codec.layout(params, weight.shape):
        assert parts[part.name].shape == part.shape
    again = codec.encode(params, codec.decode(params, weight.shape, parts))
    first = codec.decode(params, weight.shape, parts)
    np.testing.assert_allclose(codec.decode(params, weight.shape, again), first, atol=np.abs(first).max() * 0.05)


@pytest.mark.parametrize(
    "params", [{"groups": "int32", "block": [1, 8]}, {"rounding": "once"}, {"scales": {"codec": "int", "bits": 8}}]
)
def test_params_that_cannot_be_encoded(params: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError):
        codec.encode(read(bits=4, **params), np.ones((2, 8), np.float32))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"bits": 0}, ">= 1 at `\\$.bits`, found 0"),
        ({"bits": 9}, "<= 8 at `\\$.bits`, found 9"),
        ({"bits": 4, "zero": 8, "zeros": "uint8"}, "at most one of zero, zeros, offsets, found zero and zeros"),
        ({"bits": 4, "offsets": "float16", "zeros": "uint8"}, "found zeros and offsets"),
        ({"bits": 4, "groups": "int32"}, "groups beside blocks of columns"),
        ({"bits": 4, "groups": "int32", "block": [1, 8], "view": [2, 4]}, "groups beside blocks of columns"),
        ({"bits": 4, "block": [0, 1]}, "block of positive sizes or -1, found \\[0, 1\\]"),
        ({"bits": 4, "block": [1, -2]}, "block of positive sizes or -1"),
        ({"bits": 4, "view": [0, 8]}, "view of positive sizes, found \\[0, 8\\]"),
        ({"bits": 4, "scales": "int8"}, "scales"),
        ({"bits": 4, "zeros": "int32"}, "zeros"),
    ],
)
def test_params_that_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(DamagedError, match=message) as caught:
        read(**params)
    assert caught.value.found


def test_a_view_of_other_elements_is_refused() -> None:
    with pytest.raises(DamagedError, match="view of 16 elements, found \\[3, 5\\]"):
        codec.layout(read(bits=4, view=[3, 5]), (2, 8))


@pytest.mark.parametrize("bad", [-1, 2, 2**31 - 1])
def test_groups_that_have_no_scale(bad: int) -> None:
    params = read(bits=4, block=[1, 8], groups="int32")
    parts = random_parts(np.random.default_rng(0), params, (2, 16))
    parts["groups"][3] = bad
    with pytest.raises(DamagedError, match=f"groups from 0 to 1, found {bad}"):
        codec.check(params, (2, 16), parts)


@pytest.mark.parametrize("name", ["scales", "zeros", "offsets"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite(name: str, bad: float) -> None:
    params = read(bits=4, **({"scales": "float32"} | ({name: "float32"})))
    parts = random_parts(np.random.default_rng(0), params, (2, 8))
    parts[name][1, 0] = bad
    with pytest.raises(DamagedError, match=f"finite {name}, found 1 that are not"):
        codec.check(params, (2, 8), parts)


@pytest.mark.parametrize("width", [0, 9, 2.5])
def test_bits_that_int_has_not(width: float) -> None:
    with pytest.raises(UnsupportedError, match="whole bits from 1 to 8"):
        codec.preset(width, False, {})
