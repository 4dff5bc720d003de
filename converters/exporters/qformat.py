"""Packed weights as they are."""

from __future__ import annotations

from qformat.errors import UsageError

from ..plan import Plan

NAME = "qformat"
PACKED = True


def plan(plan: Plan, dtype: str | None) -> Plan:
    if dtype is not None:
        raise UsageError("--dtype only with --to dense")
    if not any(item.entry is not None for item in plan.items):
        raise UsageError("packed weights", "none", hint="`qformat quantize` packs a dense model")
    return plan
