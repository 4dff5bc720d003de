"""Integer codes in groups, whatever the layout of the source: what an interrupted save leaves of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qformat import bits as fields
from qformat.dtypes import Array

from . import _common as common
from ._common import Module


class Names(NamedTuple):
    """The tensors of a module that hold codes and scales, for errors."""

    codes: str
    scales: str


def check(module: Module, names: Names, bits: int, codes: Array, scales: Array, zeros: Array, group: Array) -> None:
    """:class:`DamagedError` for one code throughout, or scales of 0, that do not mean values of 0.

    ``codes`` are qformat's, uint8 [rows, row bytes]; ``scales`` and ``zeros`` [groups, rows]; ``group`` is the group of
    each column.
    """
    cols = len(group)
    first = fields.unpack(codes[:1], bits, cols)
    code = int(first[0, 0])
    if (first == code).all() and (codes == codes[0]).all() and (zeros != code).any():
        found = f"{code} throughout"
        raise module.error(names.codes, "codes that differ, or all the zero", found, hint=common.PARTIAL)
    rows = np.flatnonzero((scales == 0).any(axis=0))
    if rows.size == 0:
        return
    nonzero = fields.unpack(codes[rows], bits, cols) != zeros[:, rows][group].T
    lost = nonzero & (scales[:, rows] == 0)[group].T
    if lost.any():
        row, column = np.argwhere(lost)[0]
        where = [int(group[column]), int(rows[row])]
        raise module.error(names.scales, "scales other than 0 where codes differ from the zero", f"0 at {where}")
