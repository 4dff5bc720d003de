"""What the tests of the native library share."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import making
import numpy as np
import pytest

from qformat import codecs
from qformat.dtypes import NUMPY, Array
from qformat.kernels import native

# Where there is a compiler the library was built and must load.
needs_library = pytest.mark.skipif(
    not native.available() and not shutil.which("c++"), reason="no native library and no compiler"
)


def each_variant(test: Callable[..., Any]) -> Callable[..., Any]:
    """Run the test under every instruction set of this machine."""
    return needs_library(pytest.mark.parametrize("variant", native.variants() or ["missing"])(test))


def random_parts(codec: Any, params: Any, shape: tuple[int, int], seed: int = 0) -> dict[str, Array]:
    """Parts of the layout with random contents: any bits decode."""
    rng = np.random.default_rng(seed)
    parts: dict[str, Array] = {}
    for part in codec.layout(params, shape):
        dtype = NUMPY[part.dtype]
        if part.name == "groups":
            parts[part.name] = rng.integers(0, parts["scales"].shape[1], part.shape).astype(dtype)
        elif dtype.kind in "iu":
            parts[part.name] = rng.integers(0, 2 ** (8 * min(dtype.itemsize, 1)), part.shape).astype(dtype)
        else:
            parts[part.name] = making.numbers(rng, part.dtype, part.shape)
    parts["codes"] = making.finite(parts["codes"], getattr(params, "format", ""))
    return parts


PLAIN = "c0 c1 c2 c3 r0 r1 r2 r3"
KERNEL = "c0 r3 c3 c1 c2 r0 r1 r2"


def matrices() -> Iterator[tuple[str, dict[str, Any], tuple[int, int]]]:
    """(codec, params, shape) of packed matrices that reach every path of the decoders."""
    for bits in range(1, 9):
        yield "int", {"bits": bits, "block": [1, 64], "zero": 2.0}, (33, 200)
        yield "int", {"bits": bits, "block": [-1, 16], "scales": "float32", "zeros": "int16"}, (16, 1100)
    yield "int", {"bits": 4, "block": [1, 32], "scales": "bfloat16", "zeros": "uint8"}, (16, 96)
    yield "int", {"bits": 4, "block": [5, -1], "zeros": "float16"}, (16, 77)
    yield "int", {"bits": 3, "block": [1, 32], "offsets": "float16"}, (16, 77)
    yield "int", {"bits": 4, "block": [1, 32], "zeros": "uint8", "groups": "int32"}, (16, 256)
    yield "int", {"bits": 4, "block": [1, 64], "view": [64, 64], "zeros": "uint8"}, (16, 256)
    yield "int", {"bits": 4, "block": [1, 64], "scales": "float8_e4m3fn"}, (16, 256)
    for bits, p in itertools.product((1, 2, 3, 4, 5, 8, 9, 12), (1, 2, 4)):
        params = {"bits": bits, "p": p, "table": "float16", "block": [1, 64], "scales": "float16"}
        yield "table", params, (9, 200)
    yield "table", {"bits": 4, "table": "nf4", "block": [-1, -1], "scales": "float32"}, (9, 21)
    yield "table", {"bits": 16, "p": 2, "table": "float16"}, (9, 2050)
    yield "table", {"bits": 13, "p": 4, "table": "float32", "block": [2, 4], "scales": "float32"}, (9, 2100)
    for bits, books, group in ((8, 2, [1, 8]), (3, 3, [4, 8]), (12, 1, [1, 16]), (7, 5, [2, 4]), (1, 64, [1, 32])):
        params = {"bits": bits, "books": books, "group": group, "block": [2, 48], "scales": "float16"}
        yield "additive", params, (8, 1088)
    yield "additive", {"bits": 16, "books": 2, "group": [16, 1], "table": "bfloat16"}, (32, 37)
    tiny = {"format": "e2m1", "block": [1, 16], "scales": "float8_e4m3fn", "global_scale": "float32"}
    for form in ("multiply", "divide", "last"):
        yield "float", {**tiny, "global_form": form}, (9, 1056)
        yield "float", {**tiny, "global_form": form, "global_divisor": 2688, "scales": "bfloat16"}, (9, 77)
    for form in ("e4m3fnuz", "e3m2", "e2m3", "e2m2", "e2m1"):
        yield "float", {"format": form, "block": [4, 40], "scales": "float8_e8m0fnu"}, (9, 1100)
        yield "float", {"format": form, "block": [1, 64], "view": [64, 64], "scales": "float32"}, (16, 256)
    yield "float", {"format": "e2m3"}, (9, 77)
    for bits in (1, 2):
        yield "e8p", {"bits": bits}, (9, 1048)
        yield "e8p", {"bits": bits, "block": [2, 5], "scales": "float16"}, (9, 40)
        rounded = {"bits": bits, "scales": "float32", "rounding": "once", "round_dtype": "float16"}
        yield "e8p", rounded, (9, 2056)
    for L in (8, 12, 16):
        yield "trellis", {"L": L, "bits": [2], "code": "mul1", "order": PLAIN}, (32, 64)
        mixed = {"L": L, "bits": [1, 2, 4, 3], "code": "mul1", "order": KERNEL, "reversed": True}
        yield "trellis", {**mixed, "block": [1, 32], "scales": "float16"}, (32, 96)
        pairs = {"L": L, "V": 2, "bits": [2], "code": "table", "table": "float16", "order": KERNEL, "reversed": True}
        yield "trellis", {**pairs, "block": [-1, -1], "scales": "float32"}, (32, 1040)
    small = {"L": 12, "bits": [1], "code": "mul1", "order": "c0 c1 c2 c3 r0", "tile": [2, 16]}
    yield "trellis", small, (6, 64)
    line = " ".join(f"c{i}" for i in range(11))
    yield "trellis", {"L": 16, "bits": [8], "code": "mul1", "order": line, "tile": [1, 2048]}, (3, 4096)


def packed(codec_name: str, term: dict[str, Any], shape: tuple[int, int]) -> tuple[native.Matrix, Array]:
    """A random matrix for the library, and what the reference decodes it to."""
    codec, params = codecs.read_params({"codec": codec_name, **term})
    parts = random_parts(codec, params, shape)
    matrix = native.matrix(codec_name, params, shape, parts)
    assert matrix is not None
    return matrix, codec.decode(params, shape, parts)
