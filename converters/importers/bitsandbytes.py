"""bitsandbytes: NF4 and FP4, nested (double quantization) or not, and LLM.int8.

4-bit weights are carried exactly. Of LLM.int8 codes are; its two factors, the row's largest magnitude and 1/127, become
one scale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from qformat import bits as fields
from qformat import blocks, tables
from qformat.checkpoint import Checkpoint
from qformat.dtypes import Array
from qformat.errors import DamagedError, QformatError, UnsupportedError
from qformat.kernels.native import stretches
from qformat.manifest import Entry
from qformat.records import read_json
from qformat.shards import Tensor

from ..plan import Item, Plan, passed
from . import _common as common
from . import _roles as roles

NAME = "bitsandbytes"
STATE = ".quant_state.bitsandbytes__"  # <weight><STATE>nf4: the JSON object that describes a 4-bit weight
KINDS = ("nf4", "fp4")
STORAGE = ("uint8", *common.FLOATS)  # quant_storage: what the bytes of codes are called
NESTED = ("nested_absmax", "nested_quant_map")
SIDE = ("absmax", "quant_map", *NESTED)
MAP_SIZE = 256
ZERO = 128  # qformat's codes are unsigned
INVERSE = np.float32(1 / 127)
AT_ONCE = 1 << 16  # bytes that are re-laid at a time


def detect(source: Checkpoint) -> str:
    if method := common.method(source):
        return f'quant_method "{method}"' if method == NAME else ""
    found = next((name for name in source.tensors if STATE in name or name.endswith(".SCB")), "")
    return f"{found}, and settings that name no quant_method" if found else ""


def plan(source: Checkpoint) -> Plan:
    items = [*_four_bits(source), *_int8(source)]
    used = {name for item in items for name in item.consumes}
    rest = [name for name in source.tensors if name not in used]
    _check_rest(source, rest)
    found = list(common.settings(source))
    notes = [f"{number} x {kind}" for kind, number in Counter(_kind(item) for item in items).items()]
    if not items:
        notes.append("weights are floats: bitsandbytes would quantize them when it loads them")
    packed = [item.name for item in items]
    return Plan(
        scheme=NAME,
        items=(*items, *passed(source, rest)),
        config=common.target_config(source, packed=packed),
        notes=(*notes, *common.notes(source, packed)),
        settings=common.merged(found),
    )


def _kind(item: Item) -> str:
    assert item.entry is not None
    (term,) = item.entry.terms
    if term["codec"] == "int":
        return "LLM.int8, its two factors made one scale"
    return f"{term['table']}{'' if term['scales'] == 'float32' else ', nested'}"


def _check_rest(source: Checkpoint, names: Collection[str]) -> None:
    """:class:`DamagedError` for what belongs to a packed weight that has lost its other tensors."""
    for name in names:
        weight, _, part = name.rpartition(".")
        if part in (*SIDE, "SCB", "weight_format"):
            raise _error(source, name, "a packed weight that it belongs to", "none")
        if part == "weight" and source.tensors[name].dtype in ("uint8", "int8"):
            raise _error(source, name, f"{name}{STATE}nf4, or {weight}.SCB beside it", "none")


def _error(source: Checkpoint, name: str, expected: str, found: str) -> DamagedError:
    return DamagedError(expected, found, file=source.file_of(name), weight=name)


def _tensor(source: Checkpoint, name: str, dtypes: Collection[str], shape: tuple[int, ...] | None) -> Tensor:
    """:class:`DamagedError` unless the tensor is there, of one of the dtypes and of the shape, if one is given."""
    expected = " or ".join(dtypes) + (f" {list(shape)}" if shape is not None else "")
    if name not in source.tensors:
        raise DamagedError(expected, "no such tensor", file=source.path, weight=name)
    tensor = source.tensors[name]
    if tensor.dtype not in dtypes or (shape is not None and tensor.shape != shape):
        raise _error(source, name, expected, f"{tensor.dtype} {list(tensor.shape)}")
    return tensor


def _finite(source: Checkpoint, name: str) -> Array:
    values = source.array(name)
    if not np.isfinite(values).all():
        raise _error(source, name, "finite numbers", f"{int((~np.isfinite(values)).sum())} that are not")
    return values


def _item(
    source: Checkpoint,
    name: str,
    shape: tuple[int, int],
    term: Mapping[str, Any],
    make: Any,
    consumes: Collection[str],
    **more: Any,
) -> Item:
    """``shape`` is [out, in]; the model has Conv1D's the other way round."""
    module = name.rpartition(".")[0]
    transposed = roles.is_conv1d(source.config, module)
    shown = shape[::-1] if transposed else shape
    entry = Entry(weights=(name,), shape=shown, terms=(dict(term),), transposed=transposed, **more)
    return Item(name, tuple(consumes), make, entry)


@dataclass(frozen=True)
class State:
    """A 4-bit weight ``[rows, cols]``. Blocks of its flat elements; nested: blocks of the flat scales, too."""

    source: Checkpoint
    weight: str
    kind: str
    rows: int
    cols: int
    block: int
    dtype: str
    nested: int | None = None  # scales of a block
    offset: float = 0.0

    @property
    def count(self) -> int:
        return self.rows * self.cols

    @property
    def blocks(self) -> int:
        return -(-self.count // self.block)

    @property
    def name(self) -> str:
        return f"{self.weight}{STATE}{self.kind}"

    @property
    def grid(self) -> tuple[int, int]:
        """Of the scales."""
        return _grid((self.rows, self.cols), self.block)

    def part(self, name: str) -> str:
        return f"{self.weight}.{name}"

    @property
    def term(self) -> dict[str, Any]:
        term = {"codec": "table", "bits": 4, "table": self.kind, **_blocks((self.rows, self.cols), self.block)}
        if self.nested is None:
            return term | {"scales": "float32"}
        inner = {"codec": "table", "bits": 8, "table": "float32", **_blocks(self.grid, self.nested)}
        return term | {"scales": inner | {"scales": "float32", "offsets": "float32"}}


def _blocks(shape: tuple[int, int], size: int) -> dict[str, Any]:
    """Runs of ``size`` flat elements as params: as blocks of the matrix where they are that, so that it can be cut."""
    rows, cols = shape
    if cols % size == 0:
        return {"block": [1, size]}
    if size % cols == 0:
        return {"block": [size // cols, -1]}
    return {"block": [1, size], "view": [1, rows * cols]}


def _grid(shape: tuple[int, int], size: int) -> tuple[int, int]:
    found = _blocks(shape, size)
    return blocks.grid(tuple(found["block"]), tuple(found.get("view", shape)))


def _four_bits(source: Checkpoint) -> list[Item]:
    kinds: dict[str, str] = {}
    for name in source.tensors:
        weight, found, kind = name.partition(STATE)
        if found and weight in kinds:
            raise _error(source, name, "one quant_state for a weight", f"{weight}{STATE}{kinds[weight]}, too")
        if found:
            kinds[weight] = kind
    return [_four_bit_item(source, _state(source, weight, kind)) for weight, kind in kinds.items()]


def _four_bit_item(source: Checkpoint, state: State) -> Item:
    names = [state.part(part) for part in (SIDE if state.nested is not None else SIDE[:2])]
    consumes = (state.weight, state.name, *names)
    more = {"dtype": state.dtype, "label": "bit-exact"}
    shape = (state.rows, state.cols)
    return _item(source, state.weight, shape, state.term, partial(_four_bit_parts, state), consumes, **more)


def _state(source: Checkpoint, weight: str, kind: str) -> State:
    """The description of a weight, held against its tensors."""
    name = f"{weight}{STATE}{kind}"
    _tensor(source, name, ("uint8",), None)
    if kind not in KINDS:
        raise UnsupportedError(f"quant_type {' or '.join(KINDS)}", repr(kind), file=source.file_of(name), weight=name)
    try:
        blob = read_json(source.raw(name).tobytes())
    except QformatError as error:
        raise error.located(file=source.file_of(name), weight=name) from None
    if not isinstance(blob, Mapping):
        raise _error(source, name, "a JSON object", type(blob).__name__)

    def value(key: str, expected: str, holds: Any) -> Any:
        found = blob.get(key)
        if not holds(found):
            raise _error(source, name, f"{key} {expected}", repr(found))
        return found

    def size(found: Any) -> bool:
        return type(found) is int and 0 < found < 1 << 32

    value("quant_type", f"{kind}, as the tensor's name has it", lambda found: found == kind)
    shape = value("shape", "[out, in]", lambda found: isinstance(found, list) and bool(found) and all(map(size, found)))
    if len(shape) != 2:
        raise UnsupportedError("a shape [out, in]", str(shape), file=source.file_of(name), weight=name)
    state = State(
        source,
        weight,
        kind,
        rows=shape[0],
        cols=shape[1],
        block=value("blocksize", "above 0", size),
        dtype=value("dtype", " or ".join(common.FLOATS), lambda found: found in common.FLOATS),
    )
    if "nested_blocksize" in blob or "nested_offset" in blob:
        value("nested_dtype", "float32", lambda found: found in (None, "float32"))
        nested = value("nested_blocksize", "above 0", size)
        offset = value("nested_offset", "a finite number", _is_finite)
        state = replace(state, nested=nested, offset=float(offset))
    _check_state(state)
    return state


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < float(np.finfo(np.float32).max)  # NaN is not


def _check_state(state: State) -> None:
    source = state.source
    stored = _tensor(source, state.weight, STORAGE, None)
    if stored.nbytes != -(-state.count // 2):
        found = f"{2 * stored.nbytes} values in {state.weight}"
        expected = f"shape {[state.rows, state.cols]} with as many values as there are codes"
        raise _error(source, state.name, expected, found)
    _tensor(source, state.part("quant_map"), ("float32",), (16,))
    _tensor(source, state.part("absmax"), ("uint8" if state.nested is not None else "float32",), (state.blocks,))
    if state.nested is not None:
        _tensor(source, state.part("nested_absmax"), ("float32",), (-(-state.blocks // state.nested),))
        _tensor(source, state.part("nested_quant_map"), ("float32",), (MAP_SIZE,))
    # the library decodes with its own constants, whatever the file says
    if not np.array_equal(source.array(state.part("quant_map")), tables.named(state.kind)[:, 0]):
        name = state.part("quant_map")
        raise UnsupportedError(f"the table of {state.kind}", "another", file=source.file_of(name), weight=name)


def _four_bit_parts(state: State) -> dict[str, Array]:
    source = state.source
    stored = source.raw(state.weight).reshape(-1)
    codes = np.empty_like(stored)
    for here in stretches(len(stored), AT_ONCE):
        codes[here] = stored[here] >> 4 | stored[here] << 4  # the first of two codes is the high one
    if state.cols % 2:
        codes = fields.pack(fields.unpack(codes, 4, state.count).reshape(state.rows, state.cols), 4)
    parts = {"codes": codes.reshape(state.rows, -1)}
    if state.nested is None:
        return parts | {"scales": _finite(source, state.part("absmax")).reshape(state.grid)}
    scales = _finite(source, state.part("nested_absmax")).reshape(_grid(state.grid, state.nested))
    return parts | {
        "scales_codes": source.array(state.part("absmax")).reshape(state.grid),
        "scales_table": _finite(source, state.part("nested_quant_map")).reshape(1, 1, MAP_SIZE, 1),
        "scales_scales": scales,
        "scales_offsets": np.full_like(scales, state.offset),
    }


def _int8(source: Checkpoint) -> list[Item]:
    return [_int8_item(source, name.removesuffix(".SCB")) for name in source.tensors if name.endswith(".SCB")]


def _int8_item(source: Checkpoint, module: str) -> Item:
    """Codes of a row times its largest magnitude over 127."""
    weight, largest, form = f"{module}.weight", f"{module}.SCB", f"{module}.weight_format"
    shape = _tensor(source, weight, ("int8",), None).shape
    if len(shape) != 2:
        raise _error(source, weight, "int8 [out, in]", str(list(shape)))
    _tensor(source, largest, ("float32",), (shape[0],))
    consumes = [weight, largest]
    if form in source.tensors:
        _tensor(source, form, ("uint8",), ())
        if stored := int(source.array(form)):
            expected = "weight_format 0, rows as they are"
            raise UnsupportedError(expected, str(stored), file=source.file_of(form), weight=form)
        consumes.append(form)
    term = {"codec": "int", "bits": 8, "block": [1, -1], "scales": "float32", "zero": ZERO}
    stated = source.config.get("dtype", source.config.get("torch_dtype"))
    dtype = stated if stated in common.FLOATS else "float16"
    make = partial(_int8_parts, source, weight, largest)
    return _item(source, weight, (shape[0], shape[1]), term, make, consumes, dtype=dtype, label="rounded")


def _int8_parts(source: Checkpoint, weight: str, largest: str) -> dict[str, Array]:
    codes, scales = source.array(weight), _finite(source, largest)
    lost = np.flatnonzero((scales == 0) & codes.any(axis=1))
    if lost.size:
        raise _error(source, largest, "magnitudes other than 0 where codes are not 0", f"0 at [{lost[0]}]")
    return {"codes": codes.view(np.uint8) ^ np.uint8(ZERO), "scales": (scales * INVERSE)[:, None]}
