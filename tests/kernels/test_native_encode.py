"""The native encoders against the reference encoders and against searches written here, plain and slow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from native_setup import PLAIN, each_variant, needs_library

from qformat import codecs
from qformat.codecs import _trellis_search, e8p, trellis
from qformat.dtypes import Array
from qformat.kernels import native
from qformat.kernels.cpu import e8p as native_e8p
from qformat.kernels.cpu.trellis import search, search_error

Trellis = tuple[int, int, tuple[int, ...]]
TRELLISES: list[Trellis] = [  # L, V, bits: wide ones, narrow ones, more branches than overlaps, mixed widths
    *((8, 1, (bits,)) for bits in range(1, 9)),
    *((8, 2, (1,)), (8, 2, (2,)), (8, 2, (4,)), (9, 2, (1, 3)), (12, 2, (2,)), (12, 2, (6,))),
    *((10, 1, (2, 2, 2, 3)), (10, 1, (1, 4)), (11, 1, (1, 8)), (13, 1, (5, 1)), (12, 1, (2,)), (12, 1, (4,))),
]


def make(L: int, V: int, bits: tuple[int, ...], tile: tuple[int, int] = (8, 16)) -> trellis.Params:
    table = {"code": "table", "table": "float32"}
    order = " ".join(f"c{i}" for i in range(tile[1].bit_length() - 1))
    order += " " + " ".join(f"r{i}" for i in range(tile[0].bit_length() - 1))
    return trellis.Params(L=L, V=V, bits=bits, order=order, tile=tile, **table)


def sources(params: trellis.Params, tiles: int = 2) -> tuple[Array, Array]:
    rng = np.random.default_rng(params.L)
    targets = rng.standard_normal((tiles, params.steps, params.V), dtype=np.float32)
    return targets, rng.standard_normal((2**params.L, params.V), dtype=np.float32)


def shortest(params: trellis.Params, target: Array, values: Array, overlap: int) -> float:
    """The least squared error of a closed path through ``overlap``: all states of all steps, in float64."""
    widths = np.diff(params.starts)
    state = np.arange(2**params.L)
    cost = np.full(2**params.L, np.inf)
    cost[state & ((1 << (params.L - widths[-1])) - 1) == overlap] = 0
    for u, width in enumerate(widths):
        cost = cost + ((target[u] - values.astype(np.float64)) ** 2).sum(axis=1)
        kept = cost.reshape(-1, 1 << width).min(axis=1)  # by the upper bits, which the next state has as its lower
        cost = kept[state & ((1 << (params.L - width)) - 1)]
    return float(kept[overlap])


@each_variant
@pytest.mark.parametrize(("L", "V", "bits"), TRELLISES)
def test_path_closes_is_the_best_through_its_overlap_and_has_the_error_told(
    variant: str, L: int, V: int, bits: tuple[int, ...]
) -> None:
    params = make(L, V, bits)
    targets, values = sources(params)
    with native.using(variant):
        codes, error = search_error(params, targets, values)
    states = trellis.unpack(params, codes).astype(np.int64)  # windows of a circle: a closed path by construction
    assert np.array_equal(trellis.pack(params, states.astype(np.uint16)), codes)
    found = ((targets - values[states].astype(np.float64)) ** 2).sum(axis=(1, 2))
    assert np.allclose(found, error, rtol=1e-12)
    for i, target in enumerate(targets):
        overlap = int(states[i, 0] & ((1 << (L - V * bits[-1])) - 1))
        assert found[i] <= shortest(params, target, values, overlap) * (1 + 1e-6)


@each_variant
@pytest.mark.parametrize(("L", "V", "bits"), [t for t in TRELLISES if t[1] * max(t[2]) <= 8 and t[0] <= 12])
def test_path_is_that_of_the_reference(variant: str, L: int, V: int, bits: tuple[int, ...]) -> None:
    params = make(L, V, bits)
    targets, values = sources(params)
    with native.using(variant):
        assert np.array_equal(search(params, targets, values), _trellis_search.viterbi(params, targets, values))


@needs_library
def test_variants_and_threads_find_the_same_paths_at_L_16() -> None:
    for V, bits in ((1, (2,)), (1, (1, 3)), (2, (2,)), (2, (5,))):
        params = make(16, V, bits, (2, 16))
        targets, values = sources(params, tiles=20)
        found = []
        for variant in native.variants():
            with native.using(variant):
                found += [search(params, targets, values, threads=n) for n in (1, 2)]
        assert all(np.array_equal(found[0], other) for other in found[1:])


@needs_library
def test_a_short_first_pass_costs_little() -> None:
    params = make(8, 1, (2,), (16, 16))
    targets, values = sources(params, tiles=64)
    _, whole = search_error(params, targets, values)
    codes, short = search_error(params, targets, values, seam=64)
    states = trellis.unpack(params, codes)
    assert np.allclose(((targets - values[states]) ** 2).sum(axis=(1, 2)), short, rtol=1e-5)
    assert whole.sum() <= short.sum() * 1.001 and short.sum() <= whole.sum() * 1.01


@needs_library
def test_gaussian_distortion_of_mul1() -> None:
    params = trellis.Params(L=12, bits=(2,), code="mul1", order=PLAIN)
    targets = np.random.default_rng(0).standard_normal((512, 256, 1), dtype=np.float32)
    _, error = search_error(params, targets, trellis.values(params, {}))
    assert error.sum() / targets.size <= 0.0735  # 4 bits of L less than the 0.0682 measured at L = 16


INTS = [
    {"bits": 1, "block": [1, 64], "zero": 0.5},
    {"bits": 2, "block": [1, 64], "zero": 2},
    {"bits": 8, "block": [1, 64], "zero": 128},
    {"bits": 4, "block": [1, 64], "zeros": "uint8"},
    {"bits": 3, "block": [4, -1], "zeros": "int16", "scales": "bfloat16"},
    {"bits": 4, "block": [1, 32], "zeros": "float16", "scales": "float32"},
    {"bits": 4, "block": [1, 32], "offsets": "float16"},
    {"bits": 4, "block": [8, -1], "zero": 8},
    {"bits": 4, "block": [-1, -1], "zero": 8},
    {"bits": 4, "block": [1, 20], "view": [250, 40], "zero": 8},
]
TABLES = [
    *({"bits": b, "table": f"gauss-p1-n{2**b}", "block": [1, 64], "scales": "float16"} for b in (1, 2, 4, 6, 8)),
    {"bits": 4, "table": "nf4", "block": [1, 64], "scales": "bfloat16"},
    {"bits": 4, "table": "fp4", "block": [-1, -1], "scales": "float16"},
]
GRIDS = [
    {"bits": 8, "p": 2, "table": "higgs-p2-n256", "block": [1, 64], "scales": "float16"},
    {"bits": 8, "p": 2, "table": "higgs-p2-n256", "block": [-1, -1], "scales": "float16"},
    {"bits": 8, "p": 4, "table": "gauss-p4-n256", "block": [1, -1], "scales": "float16"},
    {"bits": 8, "p": 4, "table": "gauss-p4-n256", "block": [-1, -1], "scales": "float32"},
]


def weight() -> Array:
    """float32 [40, 250] with rows and stretches of zeros and an outlier."""
    out = 0.02 * np.random.default_rng(5).standard_normal((40, 252), dtype=np.float32)
    out[2] = 0
    out[:, 64:70] = 0
    out[7, 7] = 3
    return out


@each_variant
@pytest.mark.parametrize(("codec_name", "term"), [*(("int", t) for t in INTS), *(("table", t) for t in TABLES)])
def test_scales_and_codes_are_those_of_the_reference(variant: str, codec_name: str, term: dict[str, Any]) -> None:
    codec, params = codecs.read_params({"codec": codec_name, **term})
    source = weight()[:, :250]
    expected = codec.encode(params, source)
    with native.using(variant):
        found = native.binding(codec_name).encode(params, source)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert np.array_equal(found[name].view(np.uint8), expected[name].view(np.uint8)), name


@each_variant
@pytest.mark.parametrize("term", GRIDS)
def test_vectors_find_an_entry_as_near_as_the_reference(variant: str, term: dict[str, Any]) -> None:
    # the reference multiplies with BLAS, whose rounding differs between machines: equally near is what can be asked
    codec, params = codecs.read_params({"codec": "table", **term})
    source = weight()
    expected = codec.decode(params, source.shape, codec.encode(params, source))
    with native.using(variant):
        parts = native.binding("table").encode(params, source)
    found = codec.decode(params, source.shape, parts)
    assert ((found - source) ** 2).sum() == pytest.approx(((expected - source) ** 2).sum(), rel=1e-5)
    assert (found != expected).mean() < 0.01


@each_variant
@pytest.mark.parametrize("bits", [1, 2])
def test_points_are_those_of_the_reference(variant: str, bits: int) -> None:
    """For vectors near and far, points themselves, and many as near to one point as to another."""
    rng = np.random.default_rng(bits)
    drawn = [size * rng.standard_normal((301, 8)) for size in (0.1, 1, 4, 1e6)]
    vectors = np.concatenate([*drawn, *(rng.integers(-12, 13, (300, 8)) / n for n in (4, 2)), np.zeros((1, 8))])
    vectors = vectors.astype(np.float32)
    expected = e8p.nearest(vectors, bits)
    with native.using(variant):
        for n, threads in ((len(vectors), 1), (len(vectors), 3), (1, 1), (17, 1)):
            assert np.array_equal(native_e8p.nearest(vectors[-n:], bits, threads=threads), expected[-n:])


E8PS: list[dict[str, Any]] = [
    {"bits": 2},
    {"bits": 1, "block": [-1, -1], "scales": "float32"},
    {"bits": 2, "block": [3, 20], "scales": "float16"},
]


@needs_library
@pytest.mark.parametrize("term", E8PS)
def test_e8p_has_the_parts_of_the_reference(term: dict[str, Any]) -> None:
    codec, params = codecs.read_params({"codec": "e8p", **term})
    source = weight()[:, :248]
    expected, found = codec.encode(params, source), native_e8p.encode(params, source)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype and np.array_equal(found[name], expected[name])
