"""The Triton kernels against the reference, bit for bit: interpreted, or compiled where there is a GPU."""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import making
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qformat import codecs
from qformat.codecs import trellis as trellis_codec
from qformat.dtypes import Array, rounded
from qformat.errors import DamagedError, UnsupportedError
from qformat.runtime.pytorch.modules import tensors

pytest.importorskip("triton")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from qformat.kernels.gpu import _tile, trellis  # noqa: E402

Shape = tuple[int, int]
Case = tuple[dict[str, Any], Shape]
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
KERNELS: dict[str, Any] = {name: importlib.import_module(f"qformat.kernels.gpu.{name}") for name in codecs.NAMES}
PLAIN = "c0 c1 c2 c3 r0 r1 r2 r3"
EXL3 = "c0 c3 r3 c1 c2 r0 r1 r2"
few = settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # of the interpreter


def matrices() -> Iterator[Case]:
    """(term, shape) of matrices that reach every path of the kernels."""
    for bits in range(1, 9):
        yield {"codec": "int", "bits": bits, "block": [1, 16], "zeros": "uint8"}, (3, 45)
    four = {"codec": "int", "bits": 4}
    yield {**four, "block": [-1, -1], "scales": "float8_e4m3fn", "zero": 7.5}, (17, 130)
    yield {**four, "block": [2, 3], "scales": "float8_e8m0fnu", "zeros": "int16"}, (5, 7)
    yield {**four, "block": [2, 3], "scales": "float32", "zeros": "bfloat16", "groups": "int32"}, (5, 8)
    yield {**four, "block": [-1, 16], "groups": "int32", "zero": 8}, (2, 16)
    yield {**four, "block": [5, 1], "view": [5, 18], "zeros": "float16"}, (15, 6)
    yield {**four, "block": [1, 8], "view": [1, 96], "offsets": "float32"}, (4, 24)
    for rounding, dtype in itertools.product(("once", "each", "fused"), making.FLOATS):
        more = {"rounding": rounding, "round_dtype": dtype, "scales": "float32"}
        yield {**four, "bits": 8, "block": [1, 4], "offsets": "float32", **more}, (4, 33)
        yield {**four, "bits": 8, "block": [1, 4], "zeros": "float32", **more}, (4, 33)
    for bits, p in ((1, 4), (5, 1), (8, 2), (9, 1), (11, 1), (12, 4), (15, 2), (16, 1)):
        stored = {"codec": "table", "bits": bits, "p": p, "table": "bfloat16" if p == 1 else "float16"}
        yield {**stored, "table_block": [2, 8], "block": [1, 3], "scales": "bfloat16"}, (3, 20)
    yield {"codec": "table", "bits": 4, "table": "nf4", "block": [1, 64], "view": [1, 21 * 9]}, (9, 21)
    yield {"codec": "table", "bits": 4, "table": "fp4", "scales": "float16"}, (1, 33)
    yield (
        {"codec": "table", "bits": 8, "p": 4, "table": "gauss-p4-n256", "block": [-1, -1], "scales": "float32"},
        (5, 12),
    )
    nf4 = {"codec": "table", "bits": 4, "table": "nf4", "block": [2, 2], "scales": "float32"}
    yield {**nf4, "rounding": "once", "round_dtype": "bfloat16"}, (4, 9)
    additive = {"codec": "additive", "scales": "float16"}
    for bits, books, group in ((8, 2, [1, 8]), (12, 1, [1, 8]), (16, 1, [1, 1]), (3, 5, [3, 4]), (1, 3, [1, 2])):
        yield {**additive, "bits": bits, "books": books, "group": group}, (group[0] * 6, 40)
    yield {**additive, "bits": 5, "books": 2, "group": [2, 4], "block": [3, 7], "table": "bfloat16"}, (34, 132)
    tiny = {"codec": "float", "format": "e2m1", "block": [1, 16], "scales": "float8_e4m3fn", "global_scale": "float32"}
    for form, rounding in itertools.product(("multiply", "divide", "last"), ("none", "once", "each")):
        more = {"global_form": form, "global_divisor": 2688, "rounding": rounding, "round_dtype": "float16"}
        yield {**tiny, **more}, (5, 40)
    for form in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e3m2", "e2m3", "e2m2", "e2m1"):
        yield {"codec": "float", "format": form, "block": [2, 7], "scales": "float8_e8m0fnu"}, (5, 45)
    yield {"codec": "float", "format": "e2m3"}, (17, 130)
    for bits in (1, 2):
        yield {"codec": "e8p", "bits": bits}, (17, 136)
        yield {"codec": "e8p", "bits": bits, "block": [2, 5], "scales": "bfloat16"}, (5, 40)
        once = {"scales": "float32", "rounding": "once", "round_dtype": "float16"}
        yield {"codec": "e8p", "bits": bits, **once}, (3, 24)
    for bits in (2, 3, 4):
        yield {"codec": "trellis", **trellis_codec.preset(bits, False, {})}, (16, 48)
    base = {"codec": "trellis", "order": EXL3, "reversed": True}
    for L, code in itertools.product((8, 9, 13, 16), ("1mad", "2mad", "3inst", "mcg", "mul1")):
        yield {**base, "L": L, "bits": [1], "code": code, "block": [3, -1], "scales": "float16"}, (32, 16)
    yield {**base, "L": 16, "bits": [2, 2, 2, 3], "code": "mcg", "multiplier": 5}, (16, 16)
    yield {**base, "L": 16, "bits": [3], "V": 2, "code": "hyb", "index": [9], "table": "hyb-q9"}, (16, 32)
    yield {**base, "L": 9, "bits": [4, 1], "V": 2, "code": "table", "table": "int8"}, (16, 32)
    odd = {"tile": [8, 4], "order": "r2 c1 r0 c0 r1", "bits": [1] * 16 + [1, 2] * 8}  # 40 bits, no whole number of 16
    yield {**base, **odd, "L": 16, "code": "mul1", "block": [-1, 3], "scales": "float8_e4m3fn"}, (16, 4)


def name(case: Case) -> str:
    term = case[0]
    return "-".join(str(term[key]) for key in ("codec", "code", "L", "bits", "rounding", "round_dtype") if key in term)


CASES = list(matrices())


def test_every_codec_is_among_the_cases() -> None:
    assert {term["codec"] for term, _ in CASES} == set(codecs.NAMES)


def run(codec: Any, params: Any, shape: Shape, parts: Mapping[str, Array], **more: Any) -> torch.Tensor:
    on_device = {part: tensor.to(DEVICE) for part, tensor in tensors(parts).items()}
    return KERNELS[codec.NAME].dequantize(params, shape, on_device, **more).cpu()


def decoder(codec: Any, params: Any, shape: Shape, parts: Mapping[str, Array]) -> Array:
    return run(codec, params, shape, parts).numpy()


def bits(values: Array) -> list[Any]:
    """NaN is one number here: which of its bit patterns comes out is not defined."""
    return np.where(np.isnan(values), np.float32("nan"), values).view(np.uint32).tolist()


@pytest.mark.parametrize("case", CASES, ids=name)
def test_decodes_as_the_reference(case: Case) -> None:
    term, shape = case
    codec, params = codecs.read_params(term)
    parts = making.random_parts(np.random.default_rng(1), params, shape)
    expected = codec.decode(params, shape, parts)
    assert bits(run(codec, params, shape, parts).numpy()) == bits(expected)
    for dtype in (torch.float16, torch.bfloat16):
        found = run(codec, params, shape, parts, dtype=dtype)
        assert found.dtype == dtype
        assert bits(found.float().numpy()) == bits(rounded(expected, str(dtype).removeprefix("torch.")))


@few
@given(data=st.data(), rng=making.seeds)
@pytest.mark.parametrize("kind", KERNELS)
def test_decodes_any_params(kind: str, data: st.DataObject, rng: np.random.Generator) -> None:
    """Packed parts too: those within a weight are decoded first, by the same kernels."""
    if kind == "trellis":
        term = data.draw(making.trellis_terms())
        shape = term["tile"][0] * data.draw(st.integers(1, 3)), term["tile"][1] * data.draw(st.integers(1, 3))
    else:
        widths = [8, 80] if kind == "e8p" else [1, 2, 8, 20, 80]
        shape = data.draw(st.tuples(st.integers(1, 20), st.sampled_from(widths)))
        term = data.draw(getattr(making, f"{kind}_terms")(shape))
    weight = making.packed(rng, making.entry(shape, term))
    assert bits(weight.decode(decoder=decoder)) == bits(weight.decode())


@pytest.mark.parametrize("case", CASES[::3], ids=name)
def test_rows_alone(case: Case) -> None:
    term, shape = case
    codec, params = codecs.read_params(term)
    parts = making.random_parts(np.random.default_rng(2), params, shape)
    expected = codec.decode(params, shape, parts)
    last = shape[0] - 1
    for rows in ([last], [0, last, 0], [last] * 17):
        found = run(codec, params, shape, parts, rows=torch.tensor(rows, device=DEVICE))
        assert bits(found.numpy()) == bits(expected[rows])


def test_rows_that_are_not_there_are_nan() -> None:
    codec, params = codecs.read_params({"codec": "int", "bits": 4, "block": [1, 8]})
    parts = making.random_parts(np.random.default_rng(3), params, (4, 16))
    rows = torch.tensor([3, 4, -1, 1 << 30, 0], dtype=torch.int32, device=DEVICE)
    found = run(codec, params, (4, 16), parts, rows=rows)
    assert found.isnan().all(1).tolist() == [False, True, True, True, False]
    assert np.array_equal(found[[0, 4]], codec.decode(params, (4, 16), parts)[[3, 0]])
    assert run(codec, params, (4, 16), parts, rows=rows[:0]).shape == (0, 16)


def test_groups_that_are_not_there_are_nan() -> None:
    codec, params = codecs.read_params({"codec": "int", "bits": 4, "block": [1, 4], "groups": "int32"})
    parts = making.random_parts(np.random.default_rng(4), params, (3, 8))
    parts["groups"][:] = [0, 1, 2, -1, 1 << 30, 1, 0, -(1 << 31)]
    found = run(codec, params, (3, 8), parts)
    assert found.isnan().all(0).tolist() == [False, False, True, True, True, False, False, True]


def test_parts_that_are_views() -> None:
    """Rows of a larger tensor, columns of one, an odd address: what slicing and shards give."""
    codec, params = codecs.read_params({"codec": "trellis", "L": 12, "bits": [2], "code": "mul1", "order": PLAIN})
    parts = making.random_parts(np.random.default_rng(5), params, (32, 64))
    expected = codec.decode(params, (32, 64), parts)
    codes = torch.from_numpy(parts["codes"]).to(DEVICE)
    odd = torch.empty(codes.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].view(codes.shape).copy_(codes)
    for view, rows, cols in (
        (odd, (0, 32), (0, 64)),
        (codes[1:], (16, 32), (0, 64)),
        (codes[:, 1:3], (0, 32), (16, 48)),
    ):
        shape = rows[1] - rows[0], cols[1] - cols[0]
        found = trellis.dequantize(params, shape, {"codes": view}).cpu()
        assert np.array_equal(found, expected[slice(*rows), slice(*cols)])


@pytest.mark.parametrize(
    "term", [{"codec": "int", "bits": 4, "zeros": "uint8"}, {"codec": "table", "bits": 2, "table": "float16"}]
)
def test_refuses_parts_that_it_would_read_beyond(term: dict[str, Any]) -> None:
    codec, params = codecs.read_params(term)
    parts = making.random_parts(np.random.default_rng(6), params, (4, 16))
    for part in parts:
        with pytest.raises(DamagedError, match=part):
            run(codec, params, (4, 16), {**parts, part: parts[part][:-1]})


def test_refuses_what_it_cannot() -> None:
    codec, params = codecs.read_params({"codec": "int", "bits": 1})
    parts = making.random_parts(np.random.default_rng(7), params, (1, 16))
    with pytest.raises(UnsupportedError, match="float64"):
        run(codec, params, (1, 16), parts, dtype=torch.float64)
    shape = (1, _tile.MOST_COLUMNS)
    codes = torch.zeros(1, dtype=torch.uint8).expand(1, shape[1] // 8)
    with pytest.raises(UnsupportedError, match="columns"):
        KERNELS["int"].dequantize(params, shape, {"codes": codes, "scales": torch.ones(1, 1)})


@triton.jit
def round_all(source, half, brain, single, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(source + at)
    tl.store(half + at, _tile.rounded(x, tl.float16))
    tl.store(brain + at, _tile.rounded(x, tl.bfloat16))
    tl.store(single + at, _tile.rounded(x, tl.float32))


@pytest.mark.parametrize("width", [32, 64])
def test_rounds_once_whatever_the_number(width: int) -> None:
    """Random bit patterns, numbers near float16's ends, and ties of either half precision with their neighbours."""
    rng = np.random.default_rng(8)
    source = np.float32 if width == 32 else np.float64
    anything = rng.integers(0, 1 << width, 8192, np.uint64).astype(f"u{width // 8}").view(source)
    near = (rng.standard_normal(8192) * 2.0 ** rng.integers(-26, 17, 8192)).astype(source)
    ties = near.astype(np.float32).view(np.uint32) & np.repeat(np.uint32([0xFFFF0000, 0xFFFFE000]), 4096)
    ties |= np.repeat(np.uint32([0x8000, 0x1000]), 4096)
    ties = ties.view(np.float32).astype(source)
    values = np.concatenate([anything, near, ties, np.nextafter(ties, source(np.inf)), np.nextafter(ties, source(0))])
    values = np.concatenate(
        [values, source([0, -0.0, np.inf, -np.inf, np.nan, 65519.99, 65520]), np.zeros(1017, source)]
    )
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    outs = [torch.empty(values.size, dtype=dtype, device=DEVICE) for dtype in dtypes]
    round_all[(values.size // 1024,)](torch.from_numpy(values).to(DEVICE), *outs, SIZE=1024)
    for out, dtype in zip(outs, dtypes, strict=True):
        with np.errstate(all="ignore"):
            expected = rounded(values, str(dtype).removeprefix("torch."))
        assert bits(out.float().cpu().numpy()) == bits(expected)


@triton.jit
def all_states(out, table, P: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, trellis.stands_for((at // P.V).to(tl.uint32), at % P.V, table, P))


@pytest.mark.parametrize("code", ["1mad", "2mad", "3inst", "mcg", "mul1", "hyb", "lut", "hash", "hash-sum", "table"])
def test_every_state_of_16_bits(code: str) -> None:
    more: dict[str, Any] = {"code": code.partition("-")[0], "V": 2 if code in ("hyb", "lut", "table") else 1}
    if more["code"] == "hash":
        more |= {
            "index": [6, 5],
            "shift": 10,
            "taps": [0, 3, 3, 15, 7],
            "additive": code == "hash-sum",
            "table": "float32",
        }
    elif more["V"] == 2:
        more |= {"index": [12], "table": "float16"} if code in ("hyb", "lut") else {"table": "bfloat16"}
    _, params = codecs.read_params({"codec": "trellis", "L": 16, "bits": [1], "order": PLAIN, **more})
    assert isinstance(params, trellis_codec.Params)
    parts = making.random_parts(np.random.default_rng(9), params, (16, 16))
    if code == "hyb":
        parts["table"][:40] = 0  # the sign of zero is kept
    table_part = tensors(parts)["table"].to(DEVICE) if "table" in parts else None
    out = torch.empty(params.V << 16, device=DEVICE)
    all_states[(params.V << 16 - 13,)](out, table_part, P=trellis._common(params), SIZE=1 << 13)
    assert bits(out.cpu().numpy()) == bits(trellis_codec.values(params, parts).ravel())
