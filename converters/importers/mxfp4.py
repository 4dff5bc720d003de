"""MXFP4 as gpt-oss has it: fused experts of E2M1 numbers in blocks of 32 with an exponent each, outputs first. The
model holds them inputs first, rows of gate and up alternating; both stay so. Codes and exponents are carried as they
are.
"""

from __future__ import annotations

from functools import partial

from qformat.checkpoint import Checkpoint
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError
from qformat.manifest import Entry
from qformat.shards import Tensor

from ..plan import Item, Plan, passed
from . import _common as common

NAME = "mxfp4"
GROUP = 32
PAIRS = {"_blocks": "_scales", ".blocks": ".scales"}  # transformers' names, and those of the original files
NAN = 255  # the exponent that stands for no number
TERM = {"codec": "float", "format": "e2m1", "block": [1, GROUP], "scales": "float8_e8m0fnu"}


def detect(source: Checkpoint) -> str:
    method = common.method(source)
    if method:
        return f'quant_method "{method}"' if method == NAME and _blocks(source) else ""
    for name in _blocks(source):
        if any(name.removesuffix(blocks) + scales in source.tensors for blocks, scales in PAIRS.items()):
            return f"{name} beside its scales; the settings name no quant_method"
    return ""


def plan(source: Checkpoint) -> Plan:
    found = list(common.settings(source))
    names = _blocks(source)
    if not names:
        raise DamagedError("packed experts: *_blocks", "none", file=source.path)
    items = [_item(source, name) for name in names]
    used = {name for item in items for name in item.consumes}
    for name in source.tensors:
        if name not in used and name.endswith(tuple(PAIRS.values())) and source.tensors[name].tag == "U8":
            raise DamagedError("blocks beside the scales", "none", file=source.file_of(name), weight=name)
    packed = [item.name for item in items]
    return Plan(
        scheme=NAME,
        items=(*items, *passed(source, [name for name in source.tensors if name not in used])),
        config=common.target_config(source, packed),
        notes=(f"{len(items)} x e2m1, exponents of 1 x {GROUP}", *common.notes(source, packed)),
        settings=common.merged(found) or None,
    )


def _blocks(source: Checkpoint) -> list[str]:
    return [name for name, tensor in source.tensors.items() if tensor.tag == "U8" and name.endswith(tuple(PAIRS))]


def _item(source: Checkpoint, blocks: str) -> Item:
    suffix = next(suffix for suffix in PAIRS if blocks.endswith(suffix))
    name = blocks.removesuffix(suffix)
    scales = name + PAIRS[suffix]
    if name in source.tensors:
        raise DamagedError(f"one weight, {blocks} or {name}", "both", file=source.file_of(name), weight=name)
    tensor = source.tensors[blocks]
    if len(tensor.shape) != 4 or tensor.shape[3] != GROUP // 2 or 0 in tensor.shape:
        raise _error(source, blocks, f"[experts, out, in / {GROUP}, {GROUP // 2}]", tensor)
    experts, rows, groups, _ = tensor.shape
    if (found := source.tensors.get(scales)) is None:
        raise DamagedError(f"{scales} beside it", "none", file=source.file_of(blocks), weight=blocks)
    if found.dtype not in ("uint8", "float8_e8m0fnu") or found.shape != tensor.shape[:3]:
        raise _error(source, scales, f"exponents in uint8 {list(tensor.shape[:3])}", found)
    transposed = suffix == "_blocks"  # the original files hold outputs first throughout
    cols = groups * GROUP
    entry = Entry(
        weights=(name,),
        shape=(experts, cols, rows) if transposed else (experts, rows, cols),
        dtype="bfloat16",
        terms=(TERM,),
        label="bit-exact",
        stack=1,
        transposed=transposed,
    )
    return Item(name, (blocks, scales), partial(_parts, source, blocks, scales), entry)


def _error(source: Checkpoint, name: str, expected: str, found: Tensor) -> DamagedError:
    return DamagedError(expected, f"{found.dtype} {list(found.shape)}", file=source.file_of(name), weight=name)


def _parts(source: Checkpoint, blocks: str, scales: str) -> dict[str, Array]:
    """Byte b of a block holds elements 2 b and 2 b + 1, the first in its lower half: qformat's own order."""
    experts, rows, groups, size = source.tensors[blocks].shape
    exponents = source.raw(scales).reshape(experts, rows, groups)
    if count := int((exponents == NAN).sum()):
        raise DamagedError("finite numbers", f"{count} that are not", file=source.file_of(scales), weight=scales)
    codes = source.raw(blocks).reshape(experts, rows, groups * size)
    return {"codes": codes, "scales": exponents.view(NUMPY["float8_e8m0fnu"])}
