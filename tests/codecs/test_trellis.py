"""``trellis``: every code, decoding step by step, the order of elements, encoding, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from making import random_parts, seeds, trellis_terms

from qformat import codecs, tables
from qformat.codecs import trellis as codec
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError, QformatError, UnsupportedError
from qformat.kernels import native

PUBLISHED = json.loads((Path(__file__).parents[1] / "data/tables/published.json").read_text())["tables"]
PLAIN = "c0 c1 c2 c3 r0 r1 r2 r3"
ORDERS = {  # the orders of the specification, and the place of element number 0b10110010 in each
    "c0 c3 r3 c1 c2 r0 r1 r2": (0b0101, 0b1100),
    "c0 r3 c3 c1 c2 r0 r1 r2": (0b1101, 0b0100),
    "c0 c1 c2 c3 r0 r1 r2 r3": (0b1011, 0b0010),
    "c2 c3 c0 c1 r0 r1 r2 r3": (0b1011, 0b1000),
    "c0 c1 r0 r1 r2 r3 c2 c3": (0b1100, 0b1010),
    "c2 c0 c1 r0 r1 r2 r3 c3": (0b0110, 0b1001),
}


def read(**params: Any) -> codec.Params:
    found = codecs.read_params({"codec": "trellis", "order": PLAIN, **params})[1]
    assert isinstance(found, codec.Params)
    return found


EXPANDED = {
    "qtip_1mad_L16": {"code": "1mad"},
    "qtip_3inst_L16": {"code": "3inst"},
    "exl3_mcg": {"code": "mcg"},
    "exl3_mul1": {"code": "mul1"},
    "qtip_hyb_L16": {"code": "hyb", "V": 2, "index": [9], "table": "hyb-q9"},
}


@pytest.mark.parametrize("name", EXPANDED)
def test_codes_are_those_of_their_authors(name: str) -> None:
    published = PUBLISHED[name]
    values = codec.values(read(L=16, bits=[2], **EXPANDED[name]), {})
    assert values.dtype == np.float32
    stored = values.astype(published["dtype"])
    np.testing.assert_array_equal(stored.astype(np.float32), values)  # nothing is lost in the published dtype
    assert hashlib.sha256(stored.tobytes()).hexdigest() == published["sha256"]


def test_the_hyb_table_is_the_published_one() -> None:
    published = PUBLISHED["qtip_hyb_tlut_q9v2"]
    assert hashlib.sha256(tables.named("hyb-q9").tobytes()).hexdigest() == published["sha256"]


@pytest.mark.parametrize("code", ["1mad", "2mad", "3inst", "mcg", "mul1"])
@pytest.mark.parametrize("L", [8, 11])
def test_a_shorter_state_is_the_same_function(code: str, L: int) -> None:
    long, short = (codec.values(read(L=length, bits=[2], code=code), {}) for length in (16, L))
    np.testing.assert_array_equal(short, long[: 2**L])


def test_2mad_and_lut_by_hand() -> None:
    values = codec.values(read(L=16, bits=[2], code="2mad"), {})[:, 0]
    table = np.arange(64, dtype=np.float16).reshape(32, 2)
    pairs = codec.values(read(L=16, V=2, bits=[2], code="lut", index=[5], table="float16"), {"table": table})
    for s in (0, 1, 4711, 65535):
        x = (s * 264435761 + 1013904223) % 2**32
        x = (x + (x * 1664525 >> 32)) % 2**32
        assert values[s] == np.float32(sum(x.to_bytes(4, "little")) - 510) / np.float32(147.800537109375)
        assert pairs[s].tolist() == table[s * (s + 1) // 2**11 % 32].tolist()
    assert abs(values.mean()) < 0.01 and abs((values**2).mean() - 1) < 0.01


def test_hash_by_hand() -> None:
    table = np.arange(-8, 8, dtype=np.int8)[:, None]
    params = read(L=12, bits=[2], code="hash", shift=7, taps=[0, 2, 10], index=[2, 2], table="int8")
    values = codec.values(params, {"table": table})
    for s in (0, 1, 0b101101110011, 4095):
        u, v = s >> 7 & 3, (s ^ s >> 2 ^ s >> 10) & 3
        assert values[s, 0] == table[u | v << 2, 0]
    both = read(L=12, bits=[2], code="hash", shift=7, taps=[0, 2, 10], index=[2, 2], table="int8", additive=True)
    values = codec.values(both, {"table": table[:8]})
    for s in (0, 1, 0b101101110011, 4095):
        u, v = s >> 7 & 3, (s ^ s >> 2 ^ s >> 10) & 3
        assert values[s, 0] == float(table[u, 0]) + float(table[4 + v, 0])


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_elements(order: str) -> None:
    place = codec.place(read(L=8, bits=[2], code="1mad", order=order))
    assert sorted(place) == list(range(256))
    row, col = ORDERS[order]
    assert place[0b10110010] == 16 * row + col
    reverse = codec.place(read(L=8, bits=[2], code="1mad", order=order, reversed=True))
    np.testing.assert_array_equal(reverse, place[::-1])


def test_reversed_turns_the_steps_and_not_the_values_of_one() -> None:
    hyb = {"L": 8, "V": 2, "bits": [2], "code": "hyb", "index": [9], "table": "hyb-q9"}
    place = codec.place(read(**hyb)).reshape(-1, 2)
    reverse = codec.place(read(**hyb, reversed=True)).reshape(-1, 2)
    np.testing.assert_array_equal(reverse, place[::-1])


def by_steps(params: codec.Params, shape: tuple[int, int], parts: dict[str, Array]) -> Array:
    """The page's rule, bit by bit."""
    values, place = codec.values(params, parts), codec.place(params)
    high, wide = params.tile
    out = np.empty(shape, np.float32)
    for row in range(shape[0] // high):
        for col in range(shape[1] // wide):
            codes = parts["codes"][row, col]
            string = [int(codes[j // 8]) >> j % 8 & 1 for j in range(8 * len(codes))]
            start = 0
            tile = np.empty(high * wide, np.float32)
            for u in range(params.steps):
                state = sum(string[(start + i) % len(string)] << i for i in range(params.L))
                start += params.V * params.bits[u % len(params.bits)]
                tile[place[u * params.V : (u + 1) * params.V]] = values[state]
            assert start == len(string)
            out[row * high : (row + 1) * high, col * wide : (col + 1) * wide] = tile.reshape(high, wide)
    if params.scales is None:
        return out
    block = [n if b == -1 else min(b, n) for b, n in zip(params.block, shape, strict=True)]
    scale = parts["scales"].astype(np.float32)
    for i in range(shape[0]):
        for j in range(shape[1]):
            out[i, j] *= scale[i // block[0], j // block[1]]
    return out


@settings(max_examples=50)
@given(trellis_terms(((8, 16), (4, 8), (16, 16))), seeds)
def test_decode_is_the_rule(term: dict[str, Any], rng: np.random.Generator) -> None:
    params = codecs.read_params(term)[1]
    assert isinstance(params, codec.Params)
    shape = params.tile[0], 2 * params.tile[1]
    parts = random_parts(rng, params, shape)
    got = codec.decode(params, shape, parts)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, by_steps(params, shape, parts))


@settings(max_examples=50)
@given(trellis_terms(), seeds)
def test_a_random_string_is_a_closed_path(term: dict[str, Any], rng: np.random.Generator) -> None:
    params = codecs.read_params(term)[1]
    assert isinstance(params, codec.Params)
    codes = rng.integers(0, 256, (3, params.string_bits // 8), np.uint8)
    states = codec.unpack(params, codes)
    np.testing.assert_array_equal(codec.pack(params, states), codes)
    weight = rng.standard_normal((params.tile[0], 2 * params.tile[1])).astype(np.float32)
    steps = codec.to_steps(params, weight)
    assert steps.shape == (2, params.steps, params.V)
    np.testing.assert_array_equal(codec.from_steps(params, steps, weight.shape), weight)


HASH = {"code": "hash", "shift": 4, "taps": [0, 9], "index": [3, 3], "table": "hash-64"}
ENCODED: list[dict[str, Any]] = [
    {"L": 12, "bits": [2], "code": "hash", "shift": 7, "taps": [0, 2, 10], "index": [2, 2], "table": "hash-16"},
    {"L": 12, "bits": [3], **HASH},
    {"L": 12, "bits": [2, 2, 2, 3], **HASH},
    {"L": 10, "bits": [2], "code": "1mad"},
    {"L": 10, "bits": [2], "code": "3inst"},
    {"L": 10, "bits": [3, 2], "code": "mcg"},
    {"L": 10, "bits": [4], "code": "mul1"},
    {"L": 10, "bits": [1], "code": "mul1", "reversed": True, "order": "c0 c3 r3 c1 c2 r0 r1 r2"},
    {"L": 10, "bits": [8], "code": "mul1"},
    {"L": 12, "V": 2, "bits": [2], "code": "hyb", "index": [9], "table": "hyb-q9"},
    {"L": 12, "V": 2, "bits": [5], "code": "hyb", "index": [9], "table": "hyb-q9"},
    {"L": 12, "V": 2, "bits": [1, 2], "code": "hyb", "index": [9], "table": "hyb-q9", "tile": [8, 16],
     "order": "c0 c1 c2 c3 r0 r1 r2"},
    {"L": 8, "bits": [2], "code": "table", "table": "float16"},
    {"L": 8, "bits": [2], "code": "table", "table": "int8"},
    {"L": 8, "V": 2, "bits": [2], "code": "table", "table": "float32"},
]  # fmt: skip
RATE = {1: 0.45, 2: 0.125, 2.25: 0.10, 2.5: 0.07, 3: 0.035, 4: 0.012, 5: 0.012, 8: 0.012, 1.5: 0.26}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("params", ENCODED, ids=[f"{one['code']} {one['bits']}" for one in ENCODED])
@pytest.mark.parametrize("scales", ["float16", "float8_e8m0fnu"])
def test_encode_is_close(params: dict[str, Any], scales: str) -> None:
    found = read(**params, block=[-1, -1], scales=scales)
    shape = 2 * found.tile[0], found.tile[1]
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    parts = codec.encode(found, weight)
    assert parts.keys() == {part.name for part in codec.layout(found, shape)}
    for part in codec.layout(found, shape):
        assert parts[part.name].shape == part.shape and parts[part.name].dtype == NUMPY[str(part.dtype)]
    codec.check(found, shape, parts)
    error = float(((codec.decode(found, shape, parts) - weight) ** 2).mean())
    coarse = 1.6 if scales == "float8_e8m0fnu" else 1
    assert error < coarse * RATE[float(np.mean(found.bits))]


@pytest.mark.skipif(not native.available(), reason="no native library: the search would take minutes")
@pytest.mark.parametrize(
    ("bits", "settings", "limit"),
    [
        (2, {}, 0.0735),
        (3, {}, 0.0187),
        (4, {}, 0.0053),
        (2, {"code": "mul1", "L": 12}, 0.0735),
        (2.25, {"L": 12}, 0.0545),
    ],
)
def test_what_a_gaussian_costs(bits: float, settings: dict[str, Any], limit: float) -> None:
    """Relative squared error of 65536 numbers; a scalar quantizer of 2 bits has 0.1175."""
    from qformat.converters.quantize.weight import encoder

    weight = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    params = read(**codec.preset(bits, True, settings))
    parts = encoder(codec)(params, weight)  # type: ignore[arg-type]
    error = float(((codec.decode(params, weight.shape, parts) - weight) ** 2).mean() / (weight**2).mean())
    assert 0.9 * limit < error < 1.02 * limit


def test_a_tile_of_zeros() -> None:
    params = read(L=8, bits=[2], code="1mad", scales="float16", block=[1, -1])
    weight = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
    weight[5] = 0
    parts = codec.encode(params, weight)
    decoded = codec.decode(params, weight.shape, parts)
    assert not decoded[5].any() and decoded[4].any()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"L": 7}, ">= 8 at `\\$.L`, found 7"),
    ({"L": 17}, "<= 16 at `\\$.L`, found 17"),
    ({"L": 2**70}, "<= 16 at `\\$.L`"),
    ({"bits": []}, "length >= 1"),
    ({"bits": [2, 2, 3]}, "bits whose number divides 32, .*found \\[2, 2, 3\\]"),
    ({"bits": [9]}, "<= 8"),
    ({"bits": [2] * 64}, "length <= 32"),
    ({"V": 2}, "V = 1 for code 1mad, found 2"),
    ({"V": 3}, "known value at `\\$.V`, found 3"),
    ({"code": "4mad"}, "known value at `\\$.code`, found '4mad'"),
    ({"tile": [16, 15]}, "a tile of powers of two"),
    ({"tile": [4, 4], "order": "c0 c1 r0 r1"}, "a tile of powers of two with 32 to 4096 elements"),
    ({"tile": [4096, 4096]}, "a tile of powers of two with 32 to 4096 elements"),
    ({"tile": [2**70, 1]}, "<= 4096"),
    ({"order": "c0 c1"}, "order of the bits of a 16 x 16 tile, found 'c0 c1'"),
    ({"order": PLAIN + " r0"}, "order of the bits"),
    ({"order": PLAIN.replace("r3", "r2")}, "order of the bits"),
    ({"L": 16, "bits": [1], "tile": [1, 8], "order": "c0 c1 c2"}, "tile of powers of two"),
    ({"multiplier": 5}, "no multiplier beside code 1mad, found 5"),
    ({"code": "mcg", "multiplier": 2**32}, "< 4294967296|<= 4294967295"),
    ({"code": "mcg", "multiplier": -1}, ">= 0"),
    ({"taps": [0]}, "no taps beside code 1mad"),
    ({"table": "float16"}, "no table beside code 1mad"),
    ({"code": "hash"}, "index beside code hash, found none"),
    ({"code": "hash", "index": [2, 2], "taps": [0]}, "table beside code hash, found none"),
    ({"code": "hash", "index": [2, 2], "table": "hash-16"}, "taps beside code hash, found none"),
    ({"code": "hash", "index": [2], "taps": [0], "table": "hash-16"}, "an index of 2 numbers"),
    ({"code": "hash", "index": [2, 2], "taps": [9], "table": "hash-16"}, "within the L = 8 bits .* found 10"),
    ({"code": "hash", "index": [2, 2], "taps": [0], "shift": 7, "table": "hash-16"}, "within the L = 8 bits"),
    ({"code": "hash", "index": [3, 3], "taps": [0], "table": "hash-16"}, "a table of shape \\[64, 1\\], found hash-16"),
    ({"code": "hash", "index": [13, 3], "taps": [0], "table": "int8"}, "<= 12"),
    ({"code": "hyb", "index": [9], "table": "hyb-q9"}, "V = 2 for code hyb, found 1"),
    ({"code": "hyb", "V": 2, "table": "hyb-q9"}, "index beside code hyb"),
    ({"code": "hyb", "V": 2, "index": [8], "table": "hyb-q9"}, "a table of shape \\[256, 2\\]"),
    ({"code": "lut", "index": [9]}, "table beside code lut"),
    ({"code": "lut", "V": 1, "index": [9], "table": "hyb-q9"}, "a table of shape \\[512, 1\\]"),
    ({"code": "table"}, "table beside code table"),
    ({"code": "table", "table": "hyb-q9"}, "a table of shape"),
    ({"code": "table", "table": "hyb"}, "one of the tables"),
    ({"block": [0, 1]}, "block of positive sizes"),
]  # fmt: skip


@pytest.mark.parametrize(("params", "message"), REFUSED, ids=range(len(REFUSED)))
def test_params_that_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(QformatError, match=message) as caught:
        read(**{"L": 8, "bits": [2], "code": "1mad", **params})
    assert caught.value.found


def test_a_matrix_comes_in_whole_tiles() -> None:
    with pytest.raises(DamagedError, match="whole 16 x 16 tiles, found 60 x 100") as caught:
        codec.layout(read(L=8, bits=[2], code="1mad"), (60, 100))
    assert "stored_shape" in caught.value.hint


@pytest.mark.parametrize("bits", [0, 9, 2.1, 0.5])
def test_bits_that_trellis_has_not(bits: float) -> None:
    with pytest.raises(UnsupportedError, match="eighths of bits from 1 to 8"):
        codec.preset(bits, True, {})


@pytest.mark.parametrize("bits", [1, 1.5, 2, 2.125, 2.25, 2.5, 3, 3.875, 4, 5, 6, 7, 8])
def test_presets_are_of_their_bits(bits: float) -> None:
    params = read(**codec.preset(bits, True, {}))
    assert np.mean(params.bits) == bits and 32 % len(params.bits) == 0
    assert max(params.bits) - min(params.bits) <= 1
    nbytes = sum(part.nbytes for part in codec.layout(params, (256, 256)))
    assert bits <= 8 * nbytes / 256**2 < bits + 0.01
