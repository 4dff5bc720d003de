"""``table``: named and stored tables, decoding element by element, encoding, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import entry, packed, random_parts, seeds, table_terms

from qformat import bits, codecs, tables
from qformat.codecs import table as codec
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError, UnsupportedError

PUBLISHED = json.loads((Path(__file__).parents[1] / "data/tables/published.json").read_text())["tables"]
HIGGS = [name for name in PUBLISHED if name.startswith("higgs-grid-")]


def read(**params: Any) -> codec.Params:
    found = codecs.read_params({"codec": "table", **params})[1]
    assert isinstance(found, codec.Params)
    return found


@pytest.mark.parametrize("name", HIGGS)
def test_higgs_grids_are_the_published_ones(name: str) -> None:
    ours, published = tables.named(name.replace("higgs-grid-", "higgs-")), PUBLISHED[name]
    assert list(ours.shape) == published["shape"] and ours.dtype.name == published["dtype"]
    assert hashlib.sha256(ours.tobytes()).hexdigest() == published["sha256"]


@pytest.mark.parametrize("name", ["d4", "hi4b1c"])
def test_grids_of_half_integers_are_the_published_ones(name: str) -> None:
    halves, published = tables.named(name) * 2, PUBLISHED[f"{name}_grid"]
    assert np.array_equal(halves.ravel().astype(np.int8), halves.ravel())
    assert hashlib.sha256(halves.astype(np.int8).tobytes()).hexdigest() == published["sha256"]


def test_nf4_and_fp4_are_those_of_the_kernels() -> None:
    """The constants that bitsandbytes' kernels decode with."""
    nf4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
             -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
             0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
    fp4 = "0 0.0625 8 12 4 6 2 3 -0 -0.0625 -8 -12 -4 -6 -2 -3"
    assert tables.named("nf4").ravel().tolist() == [float(x) for x in nf4.split()]
    want = np.array([float(x) for x in fp4.split()], np.float32) / np.float32(12)
    assert tables.named("fp4").ravel().tobytes() == want.tobytes()  # to the sign of zero


@pytest.mark.parametrize("name", tables.names())
def test_a_named_table_is_a_power_of_two_of_finite_entries(name: str) -> None:
    table = tables.named(name)
    assert table.ndim == 2
    assert name.startswith("hash-") or len(np.unique(table, axis=0)) >= len(table) - 1  # FP4 has two zeros
    assert len(table) & (len(table) - 1) == 0 and np.isfinite(table.astype(np.float32)).all()
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 0


@pytest.mark.parametrize("count", [2, 4, 8, 16, 32, 64, 128, 256])
def test_our_scalar_tables_are_optimal_for_a_gaussian(count: int) -> None:
    """Lloyd's condition: every level is the mean of the Gaussian between its neighbours' middles."""
    levels = np.sort(tables.named(f"gauss-p1-n{count}").ravel().astype(np.float64))
    edges = np.concatenate([[-12], (levels[1:] + levels[:-1]) / 2, [12]])
    for level, low, high in zip(levels, edges, edges[1:], strict=False):
        x = np.linspace(low, high, 4001)
        density = np.exp(-(x**2) / 2)
        assert abs((x * density).sum() / density.sum() - level) < 0.003


def one_by_one(params: codec.Params, shape: tuple[int, int], parts: dict[str, Array]) -> Array:
    rows, cols = params.view or shape
    codes = bits.unpack(parts["codes"], params.bits, shape[1] // params.p)
    out = np.empty(shape, np.float32)
    for i in range(shape[0]):
        for j in range(shape[1]):
            table = (
                tables.named(params.table)
                if not params.stored
                else parts["table"][_of(params.table_block, shape, i, j)]
            )
            value = np.float32(table[codes[i, j // params.p], j % params.p])
            flat = i * shape[1] + j
            y, x = (flat // cols, flat % cols) if params.view else (i, j)
            if params.scales is not None:
                value = value * np.float32(parts["scales"][_of(params.block, (rows, cols), y, x)])
            if params.offsets is not None:
                value = value + np.float32(parts["offsets"][_of(params.block, (rows, cols), y, x)])
            if params.rounding == "once":
                value = np.float32(np.float32(value).astype(NUMPY[params.round_dtype]))
            out[i, j] = value
    return out


def _of(block: tuple[int, int], shape: tuple[int, int], i: int, j: int) -> tuple[int, int]:
    return 0 if block[0] == -1 else i // block[0], 0 if block[1] == -1 else j // block[1]


@st.composite
def cases(draw: st.DrawFn) -> tuple[codec.Params, tuple[int, int]]:
    shape = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    term = draw(table_terms(shape).filter(lambda t: dict not in map(type, (t.get("scales"), t.get("offsets")))))
    return read(**{key: value for key, value in term.items() if key != "codec"}), shape


@given(cases(), seeds)
def test_decode_is_a_look_up(case: tuple[codec.Params, tuple[int, int]], rng: np.random.Generator) -> None:
    params, shape = case
    parts = random_parts(rng, params, shape)
    got = codec.decode(params, shape, parts)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, one_by_one(params, shape, parts))


def mse(params: codec.Params, weight: Array, parts: dict[str, Array] | None = None) -> float:
    parts = codec.encode(params, weight) if parts is None else parts
    assert len(parts) == len(codec.layout(params, weight.shape))
    for part in codec.layout(params, weight.shape):
        assert parts[part.name].shape == part.shape and parts[part.name].dtype == NUMPY[str(part.dtype)]
    codec.check(params, weight.shape, parts)
    return float(((codec.decode(params, weight.shape, parts) - weight) ** 2).mean())


def absmax(params: codec.Params, weight: Array) -> dict[str, Array]:
    """bitsandbytes' way: the scale is the largest magnitude of the block."""
    table = tables.named(params.table).astype(np.float32)[:, 0]
    groups = weight.reshape(weight.shape[0], -1, params.block[1])
    scale = (np.abs(groups).max(axis=-1) / np.abs(table).max()).astype(np.float16)
    codes = np.abs((groups / scale[..., None].astype(np.float32))[..., None] - table).argmin(axis=-1)
    return {"codes": bits.pack(codes.reshape(weight.shape), params.bits), "scales": scale}


@pytest.mark.parametrize("table", ["nf4", "fp4", "gauss-p1-n16", "gauss-p1-n4", "higgs-p1-n8", "gauss-p1-n2"])
def test_encode_beats_absmax(table: str) -> None:
    weight = np.random.default_rng(0).standard_normal((32, 128)).astype(np.float32)
    params = read(bits=int(len(tables.named(table))).bit_length() - 1, table=table, block=[1, 64], scales="float16")
    assert mse(params, weight) < 0.99 * mse(params, weight, absmax(params, weight))


LIMITS = [  # table, bits, p, mean squared error of a Gaussian of variance 1 with one scale: its own, and a little more
    ("gauss-p1-n4", 2, 1, 0.1178),
    ("gauss-p1-n16", 4, 1, 0.0096),
    ("higgs-p2-n16", 4, 2, 0.108),
    ("higgs-p2-n256", 8, 2, 0.0078),
    ("gauss-p4-n256", 8, 4, 0.100),
]


@pytest.mark.parametrize(("table", "width", "p", "limit"), LIMITS)
def test_what_a_table_costs_a_gaussian(table: str, width: int, p: int, limit: float) -> None:
    weight = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    found = mse(read(bits=width, p=p, table=table, block=[-1, -1], scales="float16"), weight)
    assert 0.8 * limit < found < 1.02 * limit


@pytest.mark.parametrize("p", [1, 2, 4])
def test_a_stored_table_beats_a_named_one_on_other_weights(p: int) -> None:
    weight = np.random.default_rng(p).laplace(size=(64, 64)).astype(np.float32) ** 3  # far from a Gaussian
    named = {1: "gauss-p1-n16", 2: "higgs-p2-n256", 4: "gauss-p4-n256"}[p]
    width = {1: 4, 2: 8, 4: 8}[p]
    stored = mse(read(bits=width, p=p, table="float16"), weight)
    assert stored < 0.7 * mse(read(bits=width, p=p, table=named, block=[-1, -1], scales="float16"), weight)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_the_code_is_the_nearest_entry(p: int) -> None:
    rng = np.random.default_rng(0)
    table, vectors = rng.standard_normal((16, p)).astype(np.float32), rng.standard_normal((500, p)).astype(np.float32)
    distance = ((vectors[:, None] - table) ** 2).sum(axis=2)
    np.testing.assert_array_equal(codec.nearest(vectors, table), distance.argmin(axis=1))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scales", ["float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e8m0fnu", None])
@pytest.mark.parametrize("value", [0.0, 0.5, -2.0])
def test_constant_blocks(scales: str | None, value: float) -> None:
    params = read(bits=4, table="nf4", block=[1, 20], scales=scales)
    weight = np.full((4, 40), value, np.float32)
    weight[3] = 0
    parts = codec.encode(params, weight)
    codec.check(params, weight.shape, parts)
    decoded = codec.decode(params, weight.shape, parts)
    assert not decoded[3].any()
    if scales:
        np.testing.assert_allclose(decoded[0], weight[0], rtol=0.2)


@settings(max_examples=30)
@given(st.sampled_from([1, 2, 4]), st.integers(1, 40), st.integers(1, 10), seeds)
def test_encode_any_shape(p: int, rows: int, groups: int, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((rows, groups * p)).astype(np.float32)
    width, table = {1: (4, "nf4"), 2: (4, "higgs-p2-n16"), 4: (8, "gauss-p4-n256")}[p]
    for params in (
        read(bits=width, p=p, table=table, block=[1, 8], scales="float16"),
        read(bits=width, p=p, table=table, block=[-1, -1], scales="float32"),
        read(bits=width, p=p, table="float32"),
    ):
        assert np.isfinite(mse(params, weight))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"bits": 4}, "key `table`, found none"),
        ({"bits": 4, "table": "nf5"}, "one of the tables .*found nf5"),
        ({"bits": 4, "table": "../codecs/int"}, "one of the tables"),
        ({"bits": 3, "table": "nf4"}, "a table of 8 entries of 1, found nf4 with \\[16, 1\\]"),
        ({"bits": 4, "p": 2, "table": "nf4"}, "a table of 16 entries of 2, found nf4"),
        ({"bits": 4, "p": 3, "table": "float16"}, "known value at `\\$.p`, found 3"),
        ({"bits": 17, "table": "float16"}, "<= 16 at `\\$.bits`, found 17"),
        ({"bits": 4, "p": 2, "table": "float16", "table_block": [1, 3]}, "table_block of a multiple of p = 2 columns"),
        ({"bits": 4, "table": "nf4", "table_block": [0, 3]}, "block of positive sizes"),
    ],
)
def test_params_that_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises((DamagedError, UnsupportedError), match=message) as caught:
        read(**params)
    assert caught.value.found


def test_columns_come_p_at_a_time() -> None:
    with pytest.raises(DamagedError, match="columns in multiples of p = 2, found 7"):
        codec.layout(read(bits=8, p=2, table="higgs-p2-n256"), (4, 7))


@pytest.mark.parametrize(
    "params",
    [
        {"bits": 4, "table": "nf4", "rounding": "once"},
        {"bits": 4, "table": "nf4", "view": [2, 4]},
        {"bits": 4, "table": "float16", "scales": "float16"},
        {"bits": 4, "table": "float16", "table_block": [1, -1]},
        {"bits": 4, "table": "nf4", "scales": {"codec": "int", "bits": 8}},
        {"bits": 4, "p": 2, "table": "higgs-p2-n16", "block": [1, 3], "scales": "float16"},
    ],
)
def test_params_that_cannot_be_encoded(params: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        codec.encode(read(**params), np.ones((2, 12), np.float32))
    assert caught.value.found


def test_an_entry_that_is_not_finite() -> None:
    params = read(bits=2, table="float16")
    parts = random_parts(np.random.default_rng(0), params, (2, 8))
    parts["table"][0, 0, 1] = np.inf
    with pytest.raises(DamagedError, match="finite table, found 1 that are not"):
        codec.check(params, (2, 8), parts)


@pytest.mark.parametrize("width", [0, 9, 2.5])
def test_bits_that_table_has_not(width: float) -> None:
    with pytest.raises(UnsupportedError, match="bits"):
        codec.preset(width, False, {})


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("width", range(1, 9))
def test_presets_are_of_their_bits(width: int, rotated: bool) -> None:
    params = read(**codec.preset(width, rotated, {}))
    shape = (64, 256)
    nbytes = sum(part.nbytes for part in codec.layout(params, shape))
    assert width <= 8 * nbytes / (64 * 256) <= width + 0.26


def test_no_cut_goes_through_an_entry() -> None:
    """Sixteen bits for two columns: a byte for each, and yet one code."""
    term = {"codec": "table", "bits": 16, "p": 2, "table": "float32"}
    weight = packed(np.random.default_rng(0), entry((2, 8), term))
    with pytest.raises(UnsupportedError, match=r"cuts at multiples of 2, found 1\.\.3"):
        weight.slice(1, 1, 3)
    assert np.array_equal(weight.slice(1, 2, 4).decode(), weight.decode()[:, 2:4])
