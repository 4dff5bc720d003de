"""The reference encoder of ``trellis``: a Viterbi search in NumPy, tail-biting in two passes (QTIP's procedure).

The search is not part of the format: any path decodes. It defines what the fast encoders must reach.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..dtypes import Array

if TYPE_CHECKING:
    from .trellis import Params

# (params, targets [tiles, steps, V], values [2**L, V]) -> packed bit strings uint8 [tiles, bytes]
Search = Callable[["Params", Array, Array], Array]


def viterbi(params: Params, targets: Array, values: Array) -> Array:
    """Tail-biting paths of small squared error. The first pass starts half a tile in, free at both ends; the overlap
    that it has at the seam is what both ends of the second pass are held to.
    """
    from .trellis import pack

    steps = params.steps
    widths = np.diff(params.starts)
    half = steps // 2
    rolled = np.roll(np.arange(steps), -half)
    free = _pass(params.L, targets[:, rolled], widths[rolled], values, None)
    seam = free[:, steps - half] & ((1 << (params.L - widths[-1])) - 1)  # what the last and the first state share
    return pack(params, _pass(params.L, targets, widths, values, seam))


def _pass(L: int, targets: Array, widths: Array, values: Array, seam: Array | None) -> Array:
    """States [tiles, steps] of the best path; with ``seam`` [tiles] both ends share those L - width bits.

    Between two states that share bits q (the upper bits of the one, the lower of the next) cost[tile, q] is the best
    so far.
    """
    tiles, steps, _ = targets.shape
    before = widths[-1]
    cost = np.zeros((tiles, 1 << (L - before)), np.float32)
    if seam is not None:
        cost[:] = np.inf
        cost[np.arange(tiles), seam] = 0
    choice = []
    for u in range(steps):
        here = ((targets[:, u, None, :] - values) ** 2).sum(axis=-1)  # [tiles, states]
        here = (
            here.reshape(tiles, 1 << before, -1) + cost[:, None]
        )  # a state's low L - before bits are the q it came from
        here = here.reshape(tiles, -1, 1 << widths[u])  # its low bits are those that the step leaves behind
        choice.append(here.argmin(axis=-1).astype(np.uint16))
        cost, before = here.min(axis=-1), widths[u]
    q = cost.argmin(axis=-1) if seam is None else seam
    states = np.empty((tiles, steps), np.uint16)
    for u in reversed(range(steps)):
        states[:, u] = (q << widths[u]) | choice[u][np.arange(tiles), q]
        q = states[:, u].astype(np.int64) & ((1 << (L - widths[u - 1])) - 1)
    return states
