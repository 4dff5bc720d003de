"""GPTQ, as AutoGPTQ, gptqmodel and optimum write it: checkpoint_format gptq, gptq_v2, gptq_p and marlin.

Codes, scales, zeros and groups are carried as they are; a weight decodes to what the authors' own code gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np

from qformat.checkpoint import Checkpoint
from qformat.dtypes import Array
from qformat.errors import DamagedError, UnsupportedError
from qformat.manifest import Entry

from ..plan import Item, Plan, passed
from . import _common as common
from . import _gptq_layers as layers
from . import _gptq_settings as settings
from . import _groups as groups
from . import _roles as roles
from . import _words as words
from ._gptq_layers import Layer
from ._groups import Names

NAME = "gptq"


def detect(source: Checkpoint) -> str:
    if method := common.method(source):
        return f'quant_method "{method}"' if method == NAME else ""
    if next(common.settings(source), None) is None:
        return ""
    for name, qweight in source.tensors.items():  # settings from before there was a quant_method; AWQ had such, too
        module, _, part = name.rpartition(".")
        scales = source.tensors.get(f"{module}.{'s' if part == 'B' else 'scales'}")
        if part not in ("qweight", "B") or scales is None or len(qweight.shape) != 2 or len(scales.shape) != 2:
            continue
        rows, columns = qweight.shape
        down = qweight.tag == "I32" and scales.shape[1] == columns and scales.shape[0] != rows
        return "codes packed along the input; the settings name no quant_method" if down or part == "B" else ""
    return ""


def plan(source: Checkpoint) -> Plan:
    found = list(common.settings(source))
    rules = settings.read(source, found)
    packed = layers.read(source, rules)
    if not packed:
        raise DamagedError("packed weights: *.qweight", "none", file=source.path)
    items = [_item(source, layer) for layer in packed]
    left_out, notes = _biases(source, packed)
    used = {*left_out, *(name for item in items for name in item.consumes)}
    return Plan(
        scheme=NAME,
        items=(*items, *passed(source, [name for name in source.tensors if name not in used])),
        config=common.target_config(source, packed=[item.name for item in items]),
        left_out=tuple(left_out),
        notes=(*_notes(source, rules, packed), *notes, *common.notes(source, [item.name for item in items])),
        settings=common.merged(found),
    )


def _item(source: Checkpoint, layer: Layer) -> Item:
    module = layer.module
    *_, last = module.name.split(".")
    if last in common.EMBEDDINGS:
        raise UnsupportedError("packed linear layers", "a packed embedding", file=source.path, weight=module.weight)
    transposed = roles.is_conv1d(source.config, module.name)
    entry = Entry(
        weights=(module.weight,),
        shape=(layer.cols, layer.rows) if transposed else (layer.rows, layer.cols),
        dtype=layer.dtype,  # type: ignore[arg-type]
        terms=(layer.term,),
        label="bit-exact",
        transposed=transposed,
    )
    consumes = tuple(f"{module.name}.{part}" for part in module.parts if part != "bias")
    return Item(module.weight, consumes, partial(_parts, layer), entry)


def _parts(layer: Layer) -> dict[str, Array]:
    module = layer.module
    if layer.form == "marlin":
        codes = words.marlin_codes(module.array("B"))
        scales = words.marlin_scales(common.check_finite(module, "s"))
    else:
        codes, beyond = words.repack(module.array("qweight"), layer.bits, layer.cols, layer.form == "planar")
        if beyond:
            part = "g_idx" if "g_idx" in module.parts else "qweight"
            raise module.error(part, "all columns of qweight", f"{layer.cols} columns, and codes beyond them")
        scales = common.check_finite(module, "scales")
    if layer.zeros is None:
        zeros = np.full(scales.shape, layer.zero, np.int16)
    else:
        zeros = layers.stored_zeros(layer, layer.convention)
    group = module.array("g_idx") if layer.scattered else np.arange(layer.cols) // layer.group
    names = Names("B", "s") if layer.form == "marlin" else Names("qweight", "scales")
    groups.check(module, names, layer.bits, codes, scales, zeros, group)
    parts = {"codes": codes, "scales": words.transposed(scales)}
    if layer.zeros is not None:
        parts["zeros"] = words.transposed(zeros).astype(layer.zeros)
    if layer.scattered:
        parts["groups"] = module.array("g_idx")
    return parts


def _biases(source: Checkpoint, packed: Sequence[Layer]) -> tuple[list[str], list[str]]:
    """Biases to leave out, for AutoGPTQ gives every layer one, of zeros where the model has none; and notes on them."""
    spare: list[str] = []
    strange: list[str] = []
    for layer in packed:
        name = f"{layer.module.name}.bias"
        if "bias" in layer.module.parts and roles.has_bias(source.config, layer.module.name) is False:
            (strange if layer.module.array("bias").astype(np.float32).any() else spare).append(name)
    notes = []
    if spare:
        notes.append(f"left out {common.count(spare, 'bias')} of zeros that the model has no place for")
    if strange:
        notes.append(f"kept {common.count(strange, 'bias')} though by config.json the model has none")
    return spare, notes


def _notes(source: Checkpoint, rules: settings.Rules, packed: Sequence[Layer]) -> list[str]:
    notes = [f"{number} x {form}" for form, number in Counter(map(str, packed)).items()]
    lost = [layer.module.name for layer in packed if _lost(layer)]
    if lost:
        notes.append(f"zeros of 0 were destroyed when {common.count(lost, 'layer')} were written, and read as 2**bits")
    excluded = [layer.module.name for layer in packed if rules.override(layer.module.name) is None]
    if excluded:
        notes.append(f"packed though dynamic excludes them: {common.count(excluded, 'layer')}")
    return notes


def _lost(layer: Layer) -> bool:
    """Whether a zero of 0 was written minus one without a borrow."""
    if layer.convention != "plus one" or layer.zero not in (None, 1 << layer.bits):
        return False
    return bool((layers.stored_zeros(layer, "plus one") == 1 << layer.bits).any())
