"""FP8, as its writers have it: an element times the scale of its tile (deepseek-ai/DeepSeek-V3, inference/kernel.py,
``weight_dequant``), of its row (FBGEMM), of its expert or tensor, or an exponent for 32 inputs (OCP MX). int8 weights
are pairs of FP4 numbers, as DeepSeek's experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from qformat.checkpoint import Checkpoint
from qformat.dtypes import Array
from qformat.weight import matrix_shape

from ..importers import _common as common
from ..plan import Item

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
GROUP = 32
TILE = (128, 128)  # of scales with four axes


def rows(source: Checkpoint, item: Item, start: int, stop: int) -> Array:
    """Rows [start, stop) of the matrices of all experts, outputs first: float32 [stop - start, cols]."""
    assert item.entry is not None
    weight, (out, cols) = source.array(item.name), matrix_shape(item.entry)
    weight = weight.reshape(-1, *weight.shape[-2:])
    weight = weight.swapaxes(1, 2) if item.entry.transposed else weight
    expert, row = np.divmod(np.arange(start, stop), out)
    elements = weight[expert, row]
    if elements.dtype == np.int8:
        stored = elements.view(np.uint8)
        elements = FP4[np.stack([stored & 15, stored >> 4], axis=-1)].reshape(len(stored), cols)
    scales, (high, wide) = _scales(source, item, len(weight), (out, cols))
    scale: Array = scales[expert % len(scales), row // high][:, np.arange(cols) // wide]
    return elements.astype(np.float32) * scale


def _scales(source: Checkpoint, item: Item, experts: int, shape: tuple[int, int]) -> tuple[Array, tuple[int, int]]:
    """float32 [experts or 1, rows, columns] of scales, and the rows and columns of the weight that share one."""
    assert item.entry is not None
    (out, cols), transposed = shape, item.entry.transposed
    stored = source.array(item.consumes[1])
    if stored.dtype.itemsize == 1:  # ue8m0
        numbers = np.ldexp(np.float32(1), stored.view(np.uint8).astype(np.int32) - 127)
    else:
        numbers = stored.astype(np.float32)
    for high, wide in (TILE,) if stored.ndim == 4 else _tiles(source):
        down, across = -(-out // high), -(-cols // wide)
        if stored.shape[-2:] == ((across, down) if transposed else (down, across)) or stored.ndim == 4:
            grid = numbers.reshape(-1, *((across, down) if transposed else (down, across)))
            return grid.swapaxes(1, 2) if transposed else grid, (high, wide)
    if numbers.size in (1, experts):
        return numbers.reshape(-1, 1, 1), shape
    if numbers.size == experts * out:
        return numbers.reshape(experts, out, 1), (1, cols)
    grid = numbers.reshape(experts, *stored.shape[-2:])
    return grid.swapaxes(1, 2) if transposed and grid.shape[2] == out else grid, (1, GROUP)


def _tiles(source: Checkpoint) -> Iterator[tuple[int, int]]:
    """The tiles that the settings name: ``weight_block_size``, and ``block_structure`` of groups."""
    for settings in common.settings(source):
        groups = settings.values.get("config_groups")
        weights = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
        found = [group.get("block_structure") for group in weights if isinstance(group, Mapping)]
        for tile in (settings.values.get("weight_block_size"), *found):
            if tile is not None:
                high, wide = tile.split("x") if isinstance(tile, str) else tile
                yield int(high), int(wide)
