"""A folder that qformat packed: parts go through as they are."""

from __future__ import annotations

import msgspec

from qformat.checkpoint import Checkpoint
from qformat.errors import UsageError
from qformat.manifest import METHOD

from ..plan import Item, Plan, passed

NAME = "qformat"


def detect(source: Checkpoint) -> str:
    return f'quant_method "{METHOD}"' if source.manifest is not None else ""


def plan(source: Checkpoint) -> Plan:
    if source.manifest is None:
        raise UsageError("a folder that qformat packed", "another", file=source.path)
    items = [_item(source, name) for name in (*source, *source.composed)]
    return Plan(
        scheme=str(source.manifest.provenance.get("scheme", NAME)),
        items=(*items, *passed(source, source.dense)),
        config=source.config,
        aliases=source.manifest.aliases,
        activations=source.manifest.activations,
        kv_cache=source.manifest.kv_cache,
        extra=source.manifest.extra,
        settings=source.manifest.provenance.get("settings"),
    )


def _item(source: Checkpoint, name: str) -> Item:
    weight = source[name]
    entry = msgspec.structs.replace(weight.entry, weights=(name,))
    return Item(name, tuple(f"{name}_{part}" for part in weight.parts), lambda: weight.parts, entry)
