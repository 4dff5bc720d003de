"""``Part``: one tensor of a packed weight, and how it is cut along with rows or columns of the weight.

A codec's ``layout(params, shape)`` is a list of parts. Reader, writer, checker, documentation, exporters and slicing
derive from it; nobody computes a shape twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from .dtypes import NUMPY

Packed = Mapping[str, Any]  # a term: the part is itself packed
PartType = str | Packed  # the name of a dtype, or a term


@dataclass(frozen=True)
class Part:
    """A part of a matrix ``[out, in]``.

    ``out_axis`` is the axis of the part that runs with the rows of the weight (None: none does) and ``out_unit`` the
    rows of the weight for one index along it (a fraction where one index holds only a part of a row's worth);
    ``in_axis`` and ``in_unit`` are the same for columns.
    """

    name: str
    dtype: PartType
    shape: tuple[int, ...]
    out_axis: int | None = None
    out_unit: Fraction = Fraction(0)
    in_axis: int | None = None
    in_unit: Fraction = Fraction(0)

    @property
    def nbytes(self) -> int:
        assert isinstance(self.dtype, str)  # packed parts are expanded before anyone asks for bytes
        return math.prod(self.shape) * NUMPY[self.dtype].itemsize

    def stacked(self, lead: tuple[int, ...]) -> Part:
        """The same part for a stack of matrices: every part gains the leading axes."""
        shift = len(lead)
        return replace(
            self,
            shape=(*lead, *self.shape),
            out_axis=None if self.out_axis is None else self.out_axis + shift,
            in_axis=None if self.in_axis is None else self.in_axis + shift,
        )

    def named(self, prefix: str) -> Part:
        return replace(self, name=prefix + self.name)
