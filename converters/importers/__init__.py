"""Importers: one module a foreign scheme, with ``NAME``, ``detect(source)`` and ``plan(source)``.

Adding one adds a file and a line in ``NAMES``. ``detect`` says why the folder is of the scheme, or nothing.
"""

from __future__ import annotations

import importlib
from typing import Protocol

from qformat.checkpoint import Checkpoint
from qformat.errors import QformatError, UnsupportedError, UsageError

from ..plan import Plan
from . import _common as common
from . import _ties as ties

# tried in this order; dense is what is left
NAMES = ("qformat", "gptq", "awq", "aqlm", "bitsandbytes", "exl3", "mxfp4", "fp8", "qtip", "higgs", "quip", "dense")


class Importer(Protocol):
    NAME: str

    @staticmethod
    def detect(source: Checkpoint) -> str: ...
    @staticmethod
    def plan(source: Checkpoint) -> Plan: ...


def get(name: str) -> Importer:
    if name not in NAMES:
        raise UsageError(f"--from one of {', '.join(NAMES)}", name)
    return importlib.import_module(f"{__name__}.{name}")  # type: ignore[return-value]


def find(source: Checkpoint) -> tuple[Importer, str]:
    """The importer for a source and why; :class:`UnsupportedError` where its settings name a scheme that none knows."""
    for name in NAMES:
        if reason := get(name).detect(source):
            return get(name), reason
    method = common.method(source)
    found = repr(method) if method else "settings that name no quant_method"
    raise UnsupportedError(f"one of the schemes {', '.join(NAMES)}", found, file=source.path)


def read(source: Checkpoint, scheme: str | None = None) -> tuple[Plan, str, str]:
    """The plan of a source, the name of its importer (``scheme``, or the one that is found), and why that one."""
    importer, reason = (get(scheme), "--from") if scheme else find(source)
    try:
        ties.check(source)
        return importer.plan(source), importer.NAME, reason
    except QformatError as error:
        raise error.located(file=source.path) from None
