"""HIGGS, as FLUTE has it (HanGuo97/flute, flute/utils.py): words are taken apart as ``_pack_2bit``, ``_pack_3bit`` and
``_pack_4bit`` put them together, two inputs look up a pair in ``tables2``, which is multiplied by the scale of their
group in the stored dtype. What the rotated inputs meet.
"""

from __future__ import annotations

import numpy as np

from qformat.checkpoint import Checkpoint
from qformat.dtypes import Array

from ..importers import _common as common
from ..plan import Item


def rows(source: Checkpoint, item: Item, start: int, stop: int) -> Array:
    """Rows [start, stop) of the stored matrix, padded columns too: float32 [stop - start, cols]."""
    part = {name.rpartition(".")[2]: source.array(name) for name in item.consumes}
    words, scales = part["weight"].view(np.uint32), part["scales"]
    bits = 16 * len(words) // len(scales)
    tuned = common.agreed(source, common.settings(source), "tune_metadata")[item.name.removesuffix(".weight")]
    tile = _tile_p(bits, tuned["template_id"])
    fields = _fields(words, bits, tile, np.arange(start, stop))
    pairs = part["tables2"].view(scales.dtype)[fields >> bits, fields & (1 << bits) - 1]
    values: Array = pairs.reshape(stop - start, -1, 2 * words.shape[1] // scales.shape[1]).astype(np.float32)
    values *= scales[start:stop, :, None].astype(np.float32)
    return values.astype(scales.dtype).astype(np.float32).reshape(stop - start, -1)


def _tile_p(bits: int, template: int) -> int:
    """``TileP`` of a template: of each run of 12 of 2 bits and 48 of 4 bits, the first third has tiles of 64."""
    run = {2: 12, 3: 0, 4: 48}[bits]
    return 64 if run and template % run < run // 3 else 32


def _fields(words: Array, bits: int, tile: int, row: Array) -> Array:
    """uint32 words of all rows -> the codes of two inputs, that of the even one above: [rows, in / 2]."""
    if bits != 3:  # a word has a field of each of the chunk's tiles
        chunk, within = np.divmod(row, 16 // bits * tile)
        place, at = np.divmod(within, tile)
        found: Array = words[chunk * tile + at] >> (2 * bits * place[:, None]).astype(np.uint32)
        return found & (1 << 2 * bits) - 1
    chunk, within = np.divmod(row, 16 * tile)  # three words have five fields each and two bits of the sixteenth
    place, at = np.divmod(within, tile)
    second = len(words) // 3 + 2 * tile * chunk + at
    three = np.stack([tile * chunk + at, second, second + tile])
    found = words[three[place % 3, np.arange(len(row))]] >> (6 * (place // 3)[:, None]).astype(np.uint32) & 63
    last = place == 15
    found[last] = sum(words[one[last]] >> np.uint32(30) << np.uint32(2 * i) for i, one in enumerate(three))
    return found
