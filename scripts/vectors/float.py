"""Vectors of the codec ``float``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qformat import bits as fields
from qformat.codecs import float as codec
from qformat.dtypes import NUMPY, Array

from . import foreign
from .case import Draft, Stream, entry, packed, refused


def term(form: str, **params: Any) -> dict[str, Any]:
    return {"codec": "float", "format": form, **params}


NVFP4 = term("e2m1", block=[1, 16], scales="float8_e4m3fn", global_scale="float32")


def codes(name: str, form: str, shape: tuple[int, int]) -> Array:
    """Codes of finite numbers, drawn by the name of the case."""
    finite = np.flatnonzero(np.isfinite(codec.elements(form))).astype(np.uint8)
    picked = Stream(f"{name}/codes").integers(shape, 0, len(finite) - 1)
    return fields.pack(finite[picked], codec.FORMATS[form].bits)


def case(name: str, what: str, rules: str, of: dict[str, Any], shape: tuple[int, int], **more: Any) -> Draft:
    """A case with finite codes."""
    parts = {"codes": codes(name, of["format"], shape), **more.pop("parts", {})}
    return packed(f"float/{name}", what, rules, of, shape, parts=parts, **more)


def drafts() -> Iterator[Draft]:
    yield example()
    yield from _formats()
    yield from _scales()
    yield from _global()
    yield from _shapes()
    yield from _invalid()
    yield from foreign.drafts("float")


def example() -> Draft:
    """The example of the page."""
    return packed(
        "float/example",
        "the example of the page: E2M1 in blocks of four, and a global scale",
        "float-1 float-2 float-4",
        term("e2m1", block=[1, 4], scales="float8_e4m3fn", global_scale="float32"),
        (1, 6),
        parts={
            "codes": np.array([[0x21, 0xF7, 0x8C]], np.uint8),
            "scales": np.array([[1, 3]], NUMPY["float8_e4m3fn"]),
            "global_scale": np.array([0.25], np.float32),
        },
        dtype="bfloat16",
    )


def _formats() -> Iterator[Draft]:
    for name, form in codec.FORMATS.items():
        every = np.flatnonzero(np.isfinite(codec.elements(name))).astype(np.uint8)[None]
        yield packed(
            f"float/{name}-every-code",
            f"every code of {name} that is a finite number once, no scales",
            "C1 float-1 float-2 float-3",
            term(name),
            every.shape,
            parts={"codes": fields.pack(every, form.bits)},
        )
        yield case(f"{name}-row", "a scale for each row", "float-3", term(name, scales="float32"), (3, 21))


def _scales() -> Iterator[Draft]:
    for dtype in ("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e8m0fnu"):
        yield case(
            f"scales-{dtype}", f"scales of {dtype}", "float-3", term("e2m1", block=[1, 8], scales=dtype), (4, 20)
        )
    yield case(
        "scales-smallest",
        "the smallest exponents: products that are subnormal, and zeros that keep their sign",
        "float-3",
        term("e2m1", block=[1, 4], scales="float8_e8m0fnu"),
        (2, 16),
        parts={"scales": np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.uint8).view(NUMPY["float8_e8m0fnu"])},
    )
    yield case(
        "tile-short",
        "tiles of 4 rows and 6 columns, the last of each axis short",
        "C2 float-3",
        term("e4m3fn", block=[4, 6], scales="float32"),
        (6, 20),
    )
    yield case("scale-whole", "one scale", "C2 float-3", term("e5m2", block=[-1, -1], scales="bfloat16"), (4, 9))
    yield case(
        "scales-packed",
        "scales that are packed themselves: FP8 with a scale of their own",
        "V4 float-3",
        term("e2m1", block=[1, 4], scales=term("e4m3fn", block=[-1, -1], scales="float32")),
        (2, 16),
        parts={"scales_codes": codes("scales-packed/scales", "e4m3fn", (2, 4))},
    )
    for dtype in ("float16", "bfloat16"):
        yield case(
            f"rounding-once-{dtype}",
            f"the product rounded once to {dtype}",
            "float-5",
            term("e4m3fn", block=[1, -1], scales=dtype, rounding="once", round_dtype=dtype),
            (4, 24),
        )


def _global() -> Iterator[Draft]:
    for form in ("multiply", "divide", "last"):
        yield case(f"global-{form}", f"a global scale, {form}", "float-4", {**NVFP4, "global_form": form}, (3, 48))
    yield case(
        "global-divisor",
        "a global scale that is divided first (MLX)",
        "float-4",
        {**NVFP4, "global_divisor": 2688},
        (3, 48),
    )
    for form in ("multiply", "divide", "last"):
        yield case(
            f"global-each-{form}",
            "both results rounded to bfloat16",
            "float-4 float-5",
            {**NVFP4, "global_scale": "float16", "global_form": form, "rounding": "each", "round_dtype": "bfloat16"},
            (3, 48),
        )


def _shapes() -> Iterator[Draft]:
    yield case(
        "view-flat",
        "flat blocks of 10 that cross rows of 14",
        "C3 float-3",
        term("e3m2", block=[1, -1], view=[7, 10], scales="float32"),
        (5, 14),
    )
    yield case(
        "slices",
        "6 bits: four columns are three bytes; a global scale goes with every cut",
        "V10",
        term("e2m3", block=[2, 8], scales="float16", global_scale="float32"),
        (4, 32),
        slices=[(0, 2, 4), (1, 8, 24), (1, 24, 32), (1, 4, 8, "unsupported"), (0, 1, 2, "unsupported")],
    )
    experts = (2, 16, 6)
    name = "experts-transposed"
    drawn = np.stack([codes(f"{name}/{i}", "e2m1", (6, 16)) for i in range(2)])
    yield packed(
        f"float/{name}",
        "a stack that the model holds inputs first (gpt-oss)",
        "V5 V7 float-3",
        term("e2m1", block=[1, 8], scales="float8_e8m0fnu"),
        experts,
        parts={"codes": drawn},
        stack=1,
        transposed=True,
    )


def _invalid() -> Iterator[Draft]:
    def bad(name: str, what: str, wrong: dict[str, Any], like: dict[str, Any], rules: str = "M4 float-6") -> Draft:
        return refused(f"float/invalid-{name}", what, rules, entry(wrong, (2, 16)), like=entry(like, (2, 16)))

    plain = term("e2m1")
    yield bad("format", "a format that there is not", term("e1m2"), plain)
    yield bad("global-alone", "a global scale without scales", {**plain, "global_scale": "float32"}, plain, "float-6")
    yield bad("global-form", "a form that there is not", {**NVFP4, "global_form": "first"}, NVFP4)
    yield bad("divisor", "a divisor of 0", {**NVFP4, "global_divisor": 0}, NVFP4)
    for form, code in (("e4m3fn", 0xFF), ("e5m2", 0x7C), ("e4m3fnuz", 0x80), ("e5m2fnuz", 0x80)):
        wrong = codes(f"invalid-{form}-code", form, (2, 16))
        wrong[1, 5] = code
        yield packed(
            f"float/invalid-{form}-code",
            "a code of no finite number",
            "float-7",
            term(form),
            (2, 16),
            parts={"codes": wrong},
            error="damaged",
        )
    yield case(
        "invalid-global-zero",
        "a global scale of 0 to divide by",
        "float-7",
        {**NVFP4, "global_form": "divide"},
        (2, 16),
        parts={"global_scale": np.zeros(1, np.float32)},
        error="damaged",
    )
    yield case(
        "invalid-scale-nan",
        "an exponent of 255",
        "V9",
        term("e2m1", block=[1, 8], scales="float8_e8m0fnu"),
        (2, 16),
        parts={"scales": np.full((2, 2), 255, np.uint8).view(NUMPY["float8_e8m0fnu"])},
        error="damaged",
    )
