"""The decoders of this installation beside the reference, as ``conformance`` holds them against the vectors."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

from qformat.codecs import Codec
from qformat.dtypes import Array
from qformat.errors import UnsupportedError
from qformat.weight import Decoder, PackedWeight

from . import native


class Unable(Exception):
    """The kernels do not cover this weight."""


def decoders() -> dict[str, Callable[[PackedWeight, bool], Array | None]]:
    """``native`` where the C++ library is; ``triton`` where there is a GPU, or its interpreter is asked for."""
    found: dict[str, Decoder] = {}
    if native.available():
        found["native"] = _native
    if importlib.util.find_spec("triton") and importlib.util.find_spec("torch") and _can_launch():
        found["triton"] = _triton
    return {name: _weights(decoder) for name, decoder in found.items()}


def _weights(decoder: Decoder) -> Callable[[PackedWeight, bool], Array | None]:
    def decode(weight: PackedWeight, rotated: bool) -> Array | None:
        try:
            return weight.decode(rotated, decoder)
        except Unable:
            return None

    return decode


def _native(codec: Codec, params: Any, shape: tuple[int, int], parts: Mapping[str, Array]) -> Array:
    matrix = native.matrix(codec.NAME, params, shape, parts)
    if matrix is None:
        raise Unable
    return matrix.decode()


def _can_launch() -> bool:
    import torch

    return os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()


def _triton(codec: Codec, params: Any, shape: tuple[int, int], parts: Mapping[str, Array]) -> Array:
    import torch

    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    tensors = {name: _tensor(part).to(device) for name, part in parts.items()}
    try:
        kernel = importlib.import_module(f"{__package__}.gpu.{codec.NAME}")
        out: Array = kernel.dequantize(params, shape, tensors).to(torch.float32).cpu().numpy()
    except UnsupportedError:
        raise Unable from None
    return out


def _tensor(part: Array) -> Any:
    """A tensor of the same dtype; a copy, as the file's memory is read-only."""
    import torch

    from qformat.dtypes import name_of

    bits = part.copy() if part.dtype.isbuiltin == 1 else part.copy().view(f"i{part.dtype.itemsize}")
    return torch.from_numpy(bits).view(getattr(torch, name_of(part.dtype)))
