"""AWQ, as its tools have it: AutoAWQ (``unpack_awq``, the packers of ``WQLinear_GEMV`` and ``WQLinear_GEMVFast``),
gptqmodel (other widths than 4 bits), Marlin. Scale times code minus zero; version gemv_fast stores minus scale times
zero, which is added to scale times code in one operation.
"""

from __future__ import annotations

import numpy as np

from qformat.checkpoint import Checkpoint
from qformat.dtypes import Array

from ..importers import _common as common
from ..importers import _gptq_settings as settings
from ..plan import Item
from . import _words as words

PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # of eight columns in their word


def rows(source: Checkpoint, item: Item, start: int, stop: int) -> Array:
    """Rows [start, stop) of the matrix: float32 [stop - start, cols]."""
    assert item.entry is not None
    part = {name.rpartition(".")[2]: source.array(name) for name in item.consumes}
    qweight, scales, cols = part["qweight"], part["scales"], item.entry.shape[1]
    if "qzeros" not in part:
        return words.marlin(qweight, scales, start, stop)
    if qweight.dtype == np.int16:
        return _gemv_fast(part, start, stop, _size(source, item, cols, None))
    if len(qweight) == len(part["qzeros"]) == len(scales):  # gemv
        group = np.arange(cols) // _size(source, item, cols, None)
        codes = words.stream(qweight[start:stop].T, np.arange(cols), 4).T
        zeros = words.stream(part["qzeros"][start:stop].T, np.arange(group[-1] + 1), 4).T
        scale = scales[start:stop]
    else:
        group = np.arange(cols) // _size(source, item, cols, len(scales))
        bits = 32 * qweight.shape[1] // scales.shape[1]
        index = np.arange(start, stop)
        if bits == 4:
            index = index // 8 * 8 + PLACES[index % 8]
        first, last = int(index.min()) * bits // 32, -(-(int(index.max()) + 1) * bits // 32)
        codes, zeros = (
            words.stream(np.ascontiguousarray(part[name][:, first:last].T), index - 32 * first // bits, bits)
            for name in ("qweight", "qzeros")
        )
        scale = scales[:, start:stop].T
    steps = codes.astype(np.int32) - zeros.astype(np.int32)[:, group]
    return np.ascontiguousarray(scale.astype(np.float32)[:, group] * steps, np.float32)


def _size(source: Checkpoint, item: Item, cols: int, groups: int | None) -> int:
    """Columns of a group, by the settings; by the number of ``groups`` where they give none."""
    found = list(common.settings(source))
    stated = {"group_size": common.agreed(source, found, "group_size", "q_group_size")}
    dynamic = settings.dynamic_of(source, common.agreed(source, found, "dynamic"))
    rules = settings.Rules(dynamic=dynamic, **settings.checked(source, stated)).of(item.name.removesuffix(".weight"))
    size = rules.group_size or (-(-cols // groups) if groups else cols)
    return cols if size == -1 else size


def _gemv_fast(part: dict[str, Array], start: int, stop: int, size: int) -> Array:
    """int16 [out / 4, in]: four rows by 64 columns are together, whose codes are shuffled twice in each 32."""
    held = np.ascontiguousarray(part["qweight"][start // 4 : stop // 4]).view(np.uint16)
    cols = held.shape[1]
    nibbles = held[:, :, None] >> np.arange(0, 16, 4, dtype=np.uint16) & 15
    four = nibbles.reshape(-1, cols // 64, 4, 2, 4, 2, 4).swapaxes(-1, -2)  # 0 2 4 6 1 3 5 7
    four = four.reshape(-1, cols // 64, 4, 2, 4, 4, 2).swapaxes(-2, -3)
    codes = four.reshape(-1, cols // 64, 4, 64).swapaxes(1, 2).reshape(stop - start, cols)
    group = np.arange(cols) // size
    scale, offset = (part[name][:, start:stop].T.astype(np.float64)[:, group] for name in ("scales", "qzeros"))
    return (codes * scale + offset).astype(part["scales"].dtype).astype(np.float32)
