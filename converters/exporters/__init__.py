"""Exporters: one module a target, with ``NAME``, ``PACKED`` (it keeps a manifest) and ``plan(plan, options)``.

Adding one adds a file and a line in ``NAMES``.
"""

from __future__ import annotations

import importlib
from typing import Protocol

from qformat.errors import UsageError

from ..plan import Plan

NAMES = ("qformat", "dense", "gptq", "awq", "exl3", "fp8", "mxfp4")


class Exporter(Protocol):
    NAME: str
    PACKED: bool

    @staticmethod
    def plan(plan: Plan, dtype: str | None) -> Plan: ...


def get(name: str) -> Exporter:
    if name not in NAMES:
        raise UsageError(f"--to one of {', '.join(NAMES)}", name)
    return importlib.import_module(f"{__name__}.{name}")  # type: ignore[return-value]
