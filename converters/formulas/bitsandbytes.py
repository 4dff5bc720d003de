"""bitsandbytes, as its code has it (bitsandbytes-foundation/bitsandbytes, bitsandbytes/functional.py):
``dequantize_4bit``, with ``dequantize_blockwise`` before it where the scales are quantized themselves, and
``int8_vectorwise_dequant``.
"""

from __future__ import annotations

import numpy as np

from qformat.checkpoint import Checkpoint
from qformat.dtypes import Array
from qformat.records import read_json

from ..plan import Item


def rows(source: Checkpoint, item: Item, start: int, stop: int) -> Array:
    """Rows [start, stop) of the matrix [out, in], Conv1D's too: float32 [stop - start, cols]."""
    part = {name.rpartition(".")[2]: name for name in item.consumes}
    if "SCB" in part:
        largest = source.array(part["SCB"])[start:stop, None]
        return source.array(item.name)[start:stop] * largest * np.float32(7.874015718698502e-3)
    (state,) = (read_json(source.raw(part[kind]).tobytes()) for kind in part if kind.startswith("bitsandbytes__"))
    cols = state["shape"][1]
    first, last = start * cols, stop * cols
    stored = source.raw(item.name).reshape(-1)[first // 2 : -(-last // 2)]
    codes = np.stack([stored >> 4, stored & 15], axis=1).reshape(-1)[first % 2 :][: last - first]
    block = np.arange(first, last) // state["blocksize"]
    absmax = source.array(part["absmax"])[block[0] : block[-1] + 1]
    if "nested_absmax" in part:
        of = np.arange(block[0], block[-1] + 1) // state["nested_blocksize"]
        absmax = source.array(part["nested_quant_map"])[absmax] * source.array(part["nested_absmax"])[of]
        absmax = absmax + np.float32(state["nested_offset"])
    values: Array = source.array(part["quant_map"])[codes] * absmax[block - block[0]]
    return values.reshape(stop - start, cols)
