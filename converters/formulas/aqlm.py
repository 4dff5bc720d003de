"""AQLM and PV-Tuning, as ``_dequantize_weight`` of the authors' package has it (Vahe1994/AQLM,
inference_lib/src/aqlm/utils.py): the entries of all books summed, then multiplied by the scale of their rows.
"""

from __future__ import annotations

import numpy as np

from qformat.checkpoint import Checkpoint
from qformat.dtypes import Array

from ..plan import Item


def rows(source: Checkpoint, item: Item, start: int, stop: int) -> Array:
    """Rows [start, stop) of the matrix: float32 [stop - start, cols]."""
    part = {name.rpartition(".")[2]: source.array(name) for name in item.consumes}
    codes, codebooks, scales = part["codes"], part["codebooks"], part["scales"]
    if codes.shape[0] != len(scales) == codes.shape[1]:  # the package's CPU kernel turns them in place
        codes = codes.transpose(1, 0, 2)
    _, entries, high, wide = codebooks.shape
    first, last = start // high, -(-stop // high)  # rows of groups
    index = codes[first:last].astype(np.int32) % entries  # ``unpack_int_data``
    groups = np.zeros((*index.shape[:2], high, wide), np.float32)
    for book, chosen in zip(codebooks, np.moveaxis(index, 2, 0), strict=True):
        groups += book[chosen].astype(np.float32)
    groups *= scales[first:last].astype(np.float32)
    matrix = groups.swapaxes(1, 2).reshape((last - first) * high, -1)
    return matrix[start - first * high : stop - first * high]
