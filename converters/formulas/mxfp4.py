"""MXFP4, as gpt-oss has it (openai/gpt-oss, gpt_oss/torch/weights.py): ``_get_mxfp4_tensor``."""

from __future__ import annotations

import numpy as np

from qformat.checkpoint import Checkpoint
from qformat.dtypes import Array

from ..plan import Item

FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def rows(source: Checkpoint, item: Item, start: int, stop: int) -> Array:
    """Rows [start, stop) of all experts, outputs first: float32 [stop - start, cols]."""
    (blocks,) = (name for name in item.consumes if name.endswith("blocks"))
    (scales,) = (name for name in item.consumes if name.endswith("scales"))
    *lead, groups, size = source.tensors[blocks].shape
    pairs = source.raw(blocks).reshape(-1, groups, size)[start:stop]
    exponents = source.raw(scales).reshape(-1, groups, 1)[start:stop].astype(np.int32) - 127
    values = FP4_VALUES[np.stack([pairs & 15, pairs >> 4], axis=-1)].reshape(-1, groups, 2 * size)
    return np.ldexp(values, exponents).reshape(-1, groups * 2 * size)
