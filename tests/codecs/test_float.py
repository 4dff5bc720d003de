"""``float``: formats, decoding element by element, encoding, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import float_terms, random_parts, seeds

from qformat import bits, codecs
from qformat.codecs import float as codec
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError, UnsupportedError
from qformat.kernels import native

PUBLISHED = json.loads((Path(__file__).parents[1] / "data/tables/published.json").read_text())["tables"]
KNOWN = {  # formats that ml_dtypes has, too
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
MXFP4 = {"format": "e2m1", "block": [1, 32], "scales": "float8_e8m0fnu"}
NVFP4 = {"format": "e2m1", "block": [1, 16], "scales": "float8_e4m3fn", "global_scale": "float32"}


def read(**params: Any) -> codec.Params:
    found = codecs.read_params({"codec": "float", **params})[1]
    assert isinstance(found, codec.Params)
    return found


@pytest.mark.parametrize("name", KNOWN)
def test_numbers_are_the_published_ones(name: str) -> None:
    """To the bit, negative zeros included; which codes are no numbers, but not their bits."""
    ours = codec.elements(name)
    published = PUBLISHED[f"float{codec.FORMATS[name].bits}_{name}"]
    assert list(ours.shape) == published["shape"]
    plain = np.where(np.isnan(ours), np.float32(np.nan), ours)
    assert hashlib.sha256(plain.tobytes()).hexdigest() == published["sha256"]


@pytest.mark.parametrize("name", KNOWN)
def test_numbers_are_those_of_ml_dtypes(name: str) -> None:
    codes = np.arange(1 << codec.FORMATS[name].bits, dtype=np.uint8)
    np.testing.assert_array_equal(codec.elements(name), codes.view(KNOWN[name]).astype(np.float32))


def test_e2m2_lies_between_its_neighbours() -> None:
    """Every second number of E2M3, from zero on; no table of it is published."""
    positive = codec.elements("e2m2")[:16]
    np.testing.assert_array_equal(positive, codec.elements("e2m3")[:32:2])
    np.testing.assert_array_equal(codec.elements("e2m2")[16:], -positive)


def one_by_one(params: codec.Params, shape: tuple[int, int], parts: dict[str, Array]) -> Array:
    rows, cols = params.view or shape
    codes = bits.unpack(parts["codes"], params.bits, shape[1])
    out = np.empty(shape, np.float32)

    def each(x: Any, *when: str) -> np.float32:
        return np.float32(np.float32(x).astype(NUMPY[params.round_dtype])) if params.rounding in when else np.float32(x)

    for i in range(shape[0]):
        for j in range(shape[1]):
            value = codec.elements(params.format)[codes[i, j]]
            if params.scales is not None:
                flat = i * shape[1] + j
                y, x = (flat // cols, flat % cols) if params.view else (i, j)
                down, across = (
                    full if one == -1 else one for one, full in zip(params.block, (rows, cols), strict=True)
                )
                scale = np.float32(parts["scales"][y // down, x // across])
                whole = None
                if params.global_scale is not None:
                    whole = np.float32(parts["global_scale"][0]) / np.float32(params.global_divisor)
                    if params.global_form != "last":
                        scale = each(scale * whole if params.global_form == "multiply" else scale / whole, "each")
                value = value * scale
                if whole is not None and params.global_form == "last":
                    value = each(value, "each") * whole
            out[i, j] = each(value, "once", "each")
    return out


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@given(data=st.data(), rng=seeds)
def test_decode_is_a_product(data: st.DataObject, rng: np.random.Generator) -> None:
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    term = data.draw(float_terms(shape).filter(lambda t: not isinstance(t.get("scales"), dict)))
    params = read(**{key: value for key, value in term.items() if key != "codec"})
    parts = random_parts(rng, params, shape)
    found = codec.decode(params, shape, parts)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, one_by_one(params, shape, parts))


def test_orders_of_a_global_scale_differ() -> None:
    """They give nearly the same, and not the same: a decoder that takes one for another is seen."""
    rng = np.random.default_rng(0)
    parts = random_parts(rng, read(**NVFP4), (32, 256))
    forms = ("multiply", "divide", "last")
    whole = np.array([0.00173], np.float32)
    stored = (whole, 1 / whole, whole)
    found = [
        codec.decode(read(**NVFP4, global_form=form), (32, 256), {**parts, "global_scale": one})
        for form, one in zip(forms, stored, strict=True)
    ]
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, rtol=1e-6)
    assert len({one.tobytes() for one in found}) == 3


def mse(params: codec.Params, weight: Array, parts: dict[str, Array] | None = None) -> float:
    parts = codec.encode(params, weight) if parts is None else parts
    assert len(parts) == len(codec.layout(params, weight.shape))
    for part in codec.layout(params, weight.shape):
        assert parts[part.name].shape == part.shape and parts[part.name].dtype == NUMPY[str(part.dtype)]
    codec.check(params, weight.shape, parts)
    return float(((codec.decode(params, weight.shape, parts) - weight) ** 2).mean())


def ocp(weight: Array) -> Array:
    """MXFP4 as its standard quantizes: the exponent from the largest magnitude, the nearest number, saturation."""
    groups = weight.reshape(len(weight), -1, 32)
    scale = 2.0 ** (np.floor(np.log2(np.abs(groups).max(axis=-1, keepdims=True))) - 2)
    return (np.clip(groups / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale).reshape(
        weight.shape
    )


def test_encode_beats_the_standard() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    assert mse(read(**MXFP4), weight) < 0.95 * float(((ocp(weight) - weight) ** 2).mean())


def test_encode_beats_a_cast() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    scale = np.abs(weight).max(axis=1, keepdims=True) / 448
    cast = (weight / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    found = mse(read(format="e4m3fn", scales="float32"), weight)
    assert found < float(((cast - weight) ** 2).mean())


LIMITS = {4: 0.0070, 5: 0.0033, 6: 0.00084, 8: 0.00063}  # mean squared error of a Gaussian of variance 1: a little more


@pytest.mark.parametrize(("width", "limit"), LIMITS.items())
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e3])
def test_what_a_preset_costs_a_gaussian(width: int, limit: float, size: float) -> None:
    weight = np.random.default_rng(0).standard_normal((128, 256)).astype(np.float32) * np.float32(size)
    found = mse(read(**codec.preset(width, False, {})), weight) / size**2
    assert 0.8 * limit < found < limit


@pytest.mark.parametrize("more", [{"global_form": "divide"}, {"global_form": "last"}, {"global_divisor": 2688}])
def test_the_forms_of_a_global_scale_encode_alike(more: dict[str, Any]) -> None:
    weight = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32) / 50
    assert mse(read(**NVFP4, **more), weight) == pytest.approx(mse(read(**NVFP4), weight), rel=0.02)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 0.5, -2.0])
@pytest.mark.parametrize("scales", ["float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e8m0fnu", None])
def test_constant_blocks(scales: str | None, value: float) -> None:
    weight = np.full((4, 40), value, np.float32)
    weight[3] = 0
    params = read(format="e2m1", block=[1, 20], scales=scales)
    decoded = codec.decode(params, weight.shape, codec.encode(params, weight))
    assert not decoded[3].any() and not np.signbit(decoded[weight == 0]).any()
    np.testing.assert_allclose(decoded[:3], weight[:3], rtol=0.04 if scales == "float8_e4m3fn" else 0.01)


@given(form=st.sampled_from(list(codec.FORMATS)), rows=st.integers(1, 9), cols=st.integers(1, 40), rng=seeds)
def test_encode_any_shape(form: str, rows: int, cols: int, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((rows, cols)).astype(np.float32)
    for more in ({}, {"scales": "float16", "block": [-1, 7]}, {"scales": "float8_e8m0fnu", "block": [2, 8]}):
        params = read(format=form, **more)
        parts = codec.encode(params, weight)
        assert np.isfinite(mse(params, weight, parts))
        again = codec.decode(params, weight.shape, parts)
        if not more:  # what the format holds is kept
            np.testing.assert_array_equal(codec.decode(params, again.shape, codec.encode(params, again)), again)


@pytest.mark.skipif(not native.available(), reason="no native library")
@pytest.mark.parametrize("more", [{}, {"global_form": "divide"}, {"global_form": "last"}, {"scales": "bfloat16"}])
@pytest.mark.parametrize("width", codec.PRESETS)
def test_the_library_encodes_the_same(width: int, more: dict[str, Any]) -> None:
    params = read(**codec.preset(width, False, more))
    weight = np.random.default_rng(0).standard_normal((33, 200)).astype(np.float32)
    ours, fast = codec.encode(params, weight), native.binding("float").encode(params, weight)
    assert {name: part.tobytes() for name, part in ours.items()} == {
        name: part.tobytes() for name, part in fast.items()
    }


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "key `format`, found none"),
        ({"format": "e1m2"}, "known value at `\\$.format`, found"),
        ({"format": "e2m1", "global_scale": "float32"}, "scales beside a global_scale, found none"),
        ({**NVFP4, "global_divisor": 0}, ">= 1.* at `\\$.global_divisor`, found 0"),
        ({"format": "e2m1", "block": [0, 3]}, "block of positive sizes"),
    ],
)
def test_params_that_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        read(**params)


@pytest.mark.parametrize("form", [name for name, one in codec.FORMATS.items() if one.special != "none"])
def test_codes_of_no_number(form: str) -> None:
    params = read(format=form)
    for code in range(256):
        parts = {"codes": np.array([[0, code, 1]], np.uint8)}
        if np.isfinite(codec.elements(form)[code]):
            codec.check(params, (1, 3), parts)
            continue
        with pytest.raises(DamagedError, match="codes of finite numbers, found 1 that are not"):
            codec.check(params, (1, 3), parts)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("scales", np.nan, "finite scales"),
        ("global_scale", np.inf, "finite global_scale"),
        ("global_scale", 0, "found 0"),
    ],
)
def test_numbers_that_no_encoder_writes(part: str, value: float, message: str) -> None:
    params = read(**NVFP4, global_form="divide")
    parts = random_parts(np.random.default_rng(0), params, (2, 32))
    codec.check(params, (2, 32), parts)
    parts[part].flat[0] = value
    with pytest.raises(DamagedError, match=message):
        codec.check(params, (2, 32), parts)


@pytest.mark.parametrize("more", [{"rounding": "once"}, {"scales": {"codec": "int", "bits": 8}, "global_scale": None}])
def test_params_that_cannot_be_encoded(more: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        codec.encode(read(**{**NVFP4, **more}), np.ones((2, 12), np.float32))
    assert caught.value.found


@pytest.mark.parametrize("width", [0, 3, 7, 9, 4.5])
def test_bits_that_float_has_not(width: float) -> None:
    with pytest.raises(UnsupportedError, match="bits"):
        codec.preset(width, False, {})


@pytest.mark.parametrize("width", codec.PRESETS)
def test_presets_are_of_their_bits(width: int) -> None:
    params = read(**codec.preset(width, False, {}))
    nbytes = sum(part.nbytes for part in codec.layout(params, (64, 256)))
    assert width <= 8 * nbytes / (64 * 256) <= width + 0.51
