"""The native decoders against the reference, bit for bit, and products with packed matrices against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from native_setup import PLAIN, each_variant, matrices, needs_library, packed, random_parts

from qformat import codecs
from qformat.errors import DamagedError
from qformat.kernels import native

CASES = [pytest.param(*case, id=f"{case[0]}-{i}") for i, case in enumerate(matrices())]
MATRIX = ("int", {"bits": 4, "block": [1, 32], "zeros": "uint8"}, (48, 96))


@each_variant
@pytest.mark.parametrize(("codec", "params", "shape"), CASES)
def test_decodes_as_the_reference(variant: str, codec: str, params: dict[str, Any], shape: tuple[int, int]) -> None:
    matrix, expected = packed(codec, params, shape)
    rows = np.array([shape[0] - 1, 0, 1, 1])
    with native.using(variant):
        assert matrix.decode().view(np.uint32).tolist() == expected.view(np.uint32).tolist()
        assert np.array_equal(matrix.decode(1, 3), expected[1:3])
        assert np.array_equal(matrix.embedding(rows), expected[rows])


@each_variant
@pytest.mark.parametrize(("codec", "params", "shape"), CASES[::3])
def test_linear_is_as_exact_as_float32(
    variant: str, codec: str, params: dict[str, Any], shape: tuple[int, int]
) -> None:
    matrix, dense = packed(codec, params, shape)
    x = np.random.default_rng(1).standard_normal((67, shape[1]), dtype=np.float32)
    exact = x.astype(np.float64) @ dense.T.astype(np.float64)
    with native.using(variant):
        y = matrix.linear(x)
        one = matrix.linear(x[5])
    of_float32 = np.sqrt(((x @ dense.T - exact) ** 2).mean())
    assert np.sqrt(((y - exact) ** 2).mean()) <= 2 * of_float32
    assert np.array_equal(one, y[5])  # a row does not depend on its company


@each_variant
def test_any_number_of_threads_gives_the_same(variant: str) -> None:
    matrix, _ = packed("trellis", {"L": 12, "bits": [3], "code": "mul1", "order": PLAIN}, (512, 512))
    x = np.random.default_rng(2).standard_normal((9, 512), dtype=np.float32)
    with native.using(variant):
        results = [(matrix.linear(x, threads=n), matrix.decode(threads=n)) for n in (1, 2, 3, 0)]
    for y, decoded in results[1:]:
        assert np.array_equal(y, results[0][0]) and np.array_equal(decoded, results[0][1])


@needs_library
def test_bytes_beyond_the_codes_are_not_read() -> None:
    codec, params = codecs.read_params({"codec": "int", "bits": 3, "block": [1, -1]})
    parts = random_parts(codec, params, (4, 13))
    page = np.full(4096, 0xFF, np.uint8)
    for at in (0, 7, 4096 - parts["codes"].nbytes):  # neighbours that change must change nothing
        view = page[at : at + parts["codes"].nbytes].reshape(parts["codes"].shape)
        view[:] = parts["codes"]
        matrix = native.matrix("int", params, (4, 13), {**parts, "codes": view})
        assert matrix is not None
        assert np.array_equal(matrix.decode(), codec.decode(params, (4, 13), parts))


@needs_library
@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("codes", lambda a: a[:-1]),
        ("scales", lambda a: a[:, :-1]),
        ("groups", lambda a: a + 3),
        ("groups", lambda a: a - 9),
    ],
)
def test_refuses_parts_that_it_would_read_beyond(part: str, change: Any) -> None:
    codec, params = codecs.read_params({"codec": "int", "bits": 4, "block": [1, 32], "groups": "int32"})
    parts = random_parts(codec, params, (4, 96))
    with pytest.raises(DamagedError, match=part):
        native.matrix("int", params, (4, 96), {**parts, part: change(parts[part])})


@needs_library
def test_refuses_rows_and_inputs_of_the_wrong_size() -> None:
    matrix, _ = packed(*MATRIX)
    for wrong in (np.array([48]), np.array([-1])):
        with pytest.raises(DamagedError, match="rows"):
            matrix.embedding(wrong)
    with pytest.raises(DamagedError, match="96 columns"):
        matrix.linear(np.zeros((2, 95), np.float32))
    with pytest.raises(DamagedError, match="rows within"):
        matrix.decode(0, 49)


@needs_library
@pytest.mark.parametrize(
    "term",
    [
        {"codec": "int", "bits": 4, "block": [1, 32], "rounding": "once", "round_dtype": "float16"},
        {"codec": "int", "bits": 4, "block": [4, 1], "view": [8, 64]},
        {"codec": "table", "bits": 4, "table": "float32", "table_block": [4, -1]},
    ],
)
def test_leaves_to_the_reference_what_it_has_no_kernel_for(term: dict[str, Any]) -> None:
    codec, params = codecs.read_params(term)
    assert native.matrix(term["codec"], params, (8, 64), random_parts(codec, params, (8, 64))) is None
