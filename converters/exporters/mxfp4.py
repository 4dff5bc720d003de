"""MXFP4 as gpt-oss has it, from fused experts of the codec ``float`` and with the same values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from qformat.checkpoint import KEY
from qformat.codecs.float import Params
from qformat.dtypes import Array
from qformat.errors import UnsupportedError, UsageError
from qformat.manifest import read_term
from qformat.shards import spec

from ..plan import Item, Plan

NAME = "mxfp4"
PACKED = False
GROUP = 32
MODEL = "gpt_oss"  # of other models loaders do not know this form
FORM = {"format": "e2m1", "block": (1, GROUP), "scales": "float8_e8m0fnu"}
SETTINGS = {
    "quant_method": NAME,
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
HINT = "`quantize --codec float --bits 4 --set block=[1,32] --set scales=float8_e8m0fnu --set global_scale=null`"


def plan(plan: Plan, dtype: str | None) -> Plan:
    if dtype is not None:
        raise UsageError("--dtype only with --to dense")
    if plan.config.get("model_type") != MODEL:
        raise UnsupportedError(f"a model of type {MODEL} for MXFP4", repr(plan.config.get("model_type")))
    exported = {item.name: _item(item) for item in plan.items if item.entry is not None}
    if not exported:
        raise UsageError("packed weights", "none", hint=HINT)
    items = tuple(exported.get(item.name, item) for item in plan.items)
    return replace(plan, items=items, config={**plan.config, KEY: SETTINGS})


def _item(item: Item) -> Item:
    entry = item.entry
    assert entry is not None

    def need(holds: bool, expected: str, found: str) -> None:
        if not holds:
            raise UnsupportedError(f"{expected} for MXFP4", found, weight=item.name, hint=HINT)

    codecs = [str(term["codec"]) for term in entry.terms]
    need(codecs == ["float"] and entry.rotation is None, "one term of codec float, not rotated", " + ".join(codecs))
    fused = entry.stack == 1 and entry.transposed and entry.stored_shape is None
    need(fused and len(entry.shape) == 3, "fused experts, inputs first", f"shape {list(entry.shape)}")
    _, params, _ = read_term(entry.terms[0])
    assert isinstance(params, Params)
    plain = params.view is None and params.global_scale is None and params.rounding == "none"
    found: dict[str, Any] = {name: getattr(params, name) for name in FORM}
    need(plain and found == FORM, f"{FORM} alone", str(found))
    experts, cols, rows = entry.shape
    need(cols % GROUP == 0, f"inputs in {GROUP}s", str(cols))
    foreign = {
        f"{item.name}_blocks": spec("uint8", (experts, rows, cols // GROUP, GROUP // 2)),
        f"{item.name}_scales": spec("uint8", (experts, rows, cols // GROUP)),
    }
    return replace(
        item, entry=None, foreign=foreign, make=partial(_tensors, item, foreign[f"{item.name}_blocks"].shape)
    )


def _tensors(item: Item, shape: tuple[int, ...]) -> Mapping[str, Array]:
    parts = item.make()
    return {f"{item.name}_blocks": parts["codes"].reshape(shape), f"{item.name}_scales": parts["scales"].view(np.uint8)}
