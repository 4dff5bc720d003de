"""A folder of ordinary float tensors: everything goes through."""

from __future__ import annotations

from qformat.checkpoint import Checkpoint
from qformat.errors import DamagedError

from ..plan import Plan, passed
from . import _common as common

NAME = "dense"
PACKED_NAMES = {"qweight", "qzeros", "trellis", "weight_packed", "codes", "Qidxs", "B", "_data"}  # no float model's


def detect(source: Checkpoint) -> str:
    if source.settings is not None or common.method(source):
        return ""
    packed = [name for name in source.tensors if name.rpartition(".")[2] in PACKED_NAMES]
    if packed and next(common.settings(source), None) is None:
        expected = "float tensors, as no quantization settings were found"
        raise DamagedError(expected, packed[0], file=source.file_of(packed[0]))
    return "" if packed else "no quantization settings, no packed tensors"


def plan(source: Checkpoint) -> Plan:
    return Plan(scheme=NAME, items=tuple(passed(source, source.tensors)), config=source.config)
