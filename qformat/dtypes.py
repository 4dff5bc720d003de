"""The dtypes that a tensor may have: their name here (as in torch and NumPy), in safetensors, and as a NumPy dtype."""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_TABLE = (
    ("bool", "BOOL", np.bool_),
    ("uint8", "U8", np.uint8),
    ("int8", "I8", np.int8),
    ("uint16", "U16", np.uint16),
    ("int16", "I16", np.int16),
    ("uint32", "U32", np.uint32),
    ("int32", "I32", np.int32),
    ("uint64", "U64", np.uint64),
    ("int64", "I64", np.int64),
    ("float16", "F16", np.float16),
    ("bfloat16", "BF16", ml_dtypes.bfloat16),
    ("float32", "F32", np.float32),
    ("float64", "F64", np.float64),
    ("complex64", "C64", np.complex64),
    ("float8_e4m3fn", "F8_E4M3", ml_dtypes.float8_e4m3fn),
    ("float8_e5m2", "F8_E5M2", ml_dtypes.float8_e5m2),
    ("float8_e4m3fnuz", "F8_E4M3FNUZ", ml_dtypes.float8_e4m3fnuz),
    ("float8_e5m2fnuz", "F8_E5M2FNUZ", ml_dtypes.float8_e5m2fnuz),
    ("float8_e8m0fnu", "F8_E8M0", ml_dtypes.float8_e8m0fnu),
)
NUMPY: dict[str, np.dtype[Any]] = {name: np.dtype(scalar) for name, _, scalar in _TABLE}
SAFETENSORS: dict[str, str] = {name: tag for name, tag, _ in _TABLE}
FROM_SAFETENSORS: dict[str, str] = {tag: name for name, tag, _ in _TABLE}

Float = Literal["float16", "bfloat16", "float32"]
Scale = Literal["float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e8m0fnu"]
FLOATS = ("float16", "bfloat16", "float32", "float64")
_NAMES = {dtype: name for name, dtype in NUMPY.items()}


def name_of(dtype: np.dtype[Any] | type) -> str:
    """``float16`` for ``np.dtype("<f2")``; the names of this module's table."""
    return _NAMES[np.dtype(dtype)]


def rounded(values: Array, dtype: str) -> Array:
    """float values rounded once to the nearest value of ``dtype`` (ties to even), widened back to float32."""
    if values.dtype == np.float64 and dtype == "bfloat16":
        values = _to_odd(values)
    with np.errstate(over="ignore"):  # a value beyond float16's reach becomes infinite, which `check` names
        return values.astype(NUMPY[dtype]).astype(np.float32)


def held(values: Array, dtype: str) -> Array:
    """float32 values as a part of ``dtype`` can hold them, widened back. ``float8_e8m0fnu`` has neither a zero nor
    signs: its smallest number, 2**-127, stands for all that is below.
    """
    if dtype == "float8_e8m0fnu":
        values = np.maximum(values, np.float32(2.0**-127))
    with np.errstate(over="ignore"):
        return values.astype(NUMPY[dtype]).astype(np.float32)


def _to_odd(values: Array) -> Array:
    """float64 -> float32 rounded to odd: ml_dtypes goes through float32 to reach bfloat16; this keeps ties apart."""
    with np.errstate(over="ignore"):
        near = values.astype(np.float32)
    inexact = near != values
    near = np.where(np.abs(near) > np.abs(values), np.nextafter(near, np.float32(0)), near)
    odd: Array = (near.view(np.uint32) | inexact).view(np.float32)
    return odd
