"""``export``: a packed decoder or encoder as ``model.onnx`` beside its own shards.

The file holds the graph alone: every initializer of a weight points into the safetensors shards, packed parts as they
are, dense tensors too, cast in the graph where they are of another dtype: rows of an embedding when they have been
gathered, the matrix of a product as a whole, which folded takes the memory of one in float32. The functions that decode
lie in the model, so that plain ONNX Runtime runs it.

Plain ONNX Runtime folds the functions when it loads: dense weights in memory, at 45 bytes a weight on the way there,
as each step's values are kept until the last is done. :func:`.session` runs the same file from its packed weights.

onnx's own tools refuse weights in a file with several links: copy the folder for them, or load the graph alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from onnxscript import ir

import qformat
from qformat import files, sources, weight
from qformat.checkpoint import Checkpoint
from qformat.errors import DamagedError, QformatError, UnsupportedError, UsageError
from qformat.manifest import Rows
from qformat.staging import staged

from . import trace
from .body import TYPES
from .functions import DOMAIN, FILE, Kind, function, text
from .trace import Stand

DTYPES = ("float32", "float16")


def export(
    source: str | Path, target: str | Path, *, dtype: str = "float32", overwrite: bool = False
) -> dict[str, Any]:
    """Write the folder ``target``: ``model.onnx``, hard links to the shards (copies where the file system has none),
    the config and the tokenizer. ``dtype`` is that of activations, of the cache and of the logits.

    Returns the report that ``qformat export --json`` prints. Raises :class:`UnsupportedError` for a model that is no
    decoder or encoder of text made of linear layers and embeddings, :class:`DamagedError` for a tensor that the model
    needs and the shards lack.
    """
    opened, target = sources.open(source), Path(target)
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {' or '.join(DTYPES)}", dtype)
    if opened.manifest is None:
        hint = "`qformat convert` or `qformat quantize` makes one"
        raise UsageError("a qformat model", "another", file=opened.path, hint=hint)
    if not (opened.path / files.CONFIG).is_file():
        raise UsageError("a model folder with config.json", file=opened.path)
    if several := next(iter(opened.composed), ""):
        hint = "`qformat convert SRC DST --to dense` makes a model whose weights are whole"
        raise UnsupportedError("whole weights, for ONNX", "one in pieces", file=opened.path, weight=several, hint=hint)
    with staged(target, overwrite) as (folder, _):
        try:
            proto = graph(opened, dtype)
        except QformatError as error:
            raise error.located(file=opened.path) from error.__cause__
        (folder / FILE).write_bytes(proto.SerializeToString(deterministic=True))
        bring_files(opened, folder)
    return {"path": str(target), "onnx_bytes": (target / FILE).stat().st_size, "bytes": opened.nbytes}


def graph(opened: Checkpoint, dtype: str) -> Any:
    """The ``onnx.ModelProto`` of a checkpoint."""
    model = trace.skeleton(opened.path, getattr(torch, dtype))
    places = _places(opened, model)
    functions: dict[tuple[Kind, str], Any] = {}
    for parameter, name in places.items():
        if name in opened:
            _stand_in(opened, model, parameter, name, functions)
    traced = trace.trace(model, places)
    _attach(traced.graph, opened, places)
    for item in (traced, traced.graph, *traced.graph, *(value for node in traced.graph for value in node.outputs)):
        item.metadata_props.clear()  # where in the Python code each node comes from
    traced.producer_name, traced.producer_version = "qformat", qformat.__version__
    proto = ir.serde.serialize_model(traced)
    proto.graph.ClearField("value_info")  # a third of the file, and every runtime infers it
    proto.functions.extend(functions.values())
    return proto


def _places(opened: Checkpoint, model: Any) -> dict[str, str]:
    """Parameter of the model -> the packed weight or the dense tensor that it is; tied parameters are the same one."""
    assert opened.manifest is not None
    aliases = opened.manifest.aliases
    packed = {name for name in opened if not opened[name].entry.concat} | opened.members.keys()
    known = packed | set(opened.dense)
    tied: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        tied.setdefault(id(tensor), []).append(name)
    stored = trace.paths(model, known | aliases.keys())
    places: dict[str, str] = {}
    missing = []
    for names in tied.values():
        found = [aliases.get(stored[name], stored[name]) for name in names if name in stored]
        places |= dict.fromkeys(names, found[0]) if found else {}
        missing += [] if found else names[:1]
    homeless = known.difference(places.values())
    if homeless & packed or (homeless and missing):
        what = f"{trace.architecture(model.config)}, which has no parameter of this name"
        raise UnsupportedError("an architecture of linear layers and embeddings, for ONNX", what, weight=min(homeless))
    if missing:
        raise DamagedError("a tensor that the model needs", "none", weight=missing[0])
    for parameter, name in places.items():
        shape = opened[name].shape if name in packed else opened.tensors[name].shape
        if shape != tuple(state[parameter].shape):
            raise DamagedError(f"the model's shape {list(state[parameter].shape)}", str(list(shape)), weight=name)
        if name not in packed and "float8" in opened.tensors[name].dtype:
            raise UnsupportedError(
                "dense tensors of 16 bits or more, for ONNX", opened.tensors[name].dtype, weight=name
            )
    return places


def _stand_in(
    opened: Checkpoint, model: Any, parameter: str, name: str, functions: dict[tuple[Kind, str], Any]
) -> None:
    """Put the packed weight ``name`` in place of a module's, with a function for its entry where there is none yet."""
    module = parameter.rpartition(".")[0]
    kind = trace.kind_of(model, module)
    if kind is None:
        found = type(model.get_submodule(module)).__name__
        raise UnsupportedError("linear layers and embeddings, for ONNX", found, weight=name)
    entry = opened[name].entry
    rows = opened.members.get(name, Rows(name, 0, entry.shape[0]))
    key = kind, text(entry)
    if key not in functions:
        try:
            functions[key] = function(kind, f"{kind}_{len(functions)}", entry)
        except QformatError as error:
            raise error.located(weight=name) from None
    width = entry.shape[0 if kind == "Linear" else 1]
    trace.stand_in(model, module, Stand(kind, functions[key].name, key[1], width, rows))


def _attach(graph: ir.Graph, opened: Checkpoint, places: Mapping[str, str]) -> None:
    """Bring in the initializers, from the shards."""
    for value in list(graph.initializers.values()):
        if value.name not in places:
            continue
        del graph.initializers[value.name]
        tensor = _external(graph, opened, places[value.name])
        if tensor.dtype != value.dtype:
            tensor = _cast(graph, tensor, value)
        ir.convenience.replace_all_uses_with(value, tensor)
    times = Counter[str]()
    for node in graph:
        if node.domain == DOMAIN:
            name = node.attributes["weight"].as_string()
            node.name = f"{node.op_type}/{name}"
            times[node.name] += 1
            if times[node.name] > 1:  # layers that share a weight
                node.name += f"/{times[node.name]}"
            parts = [_external(graph, opened, f"{name}_{part.name}") for part in weight.layout(opened[name].entry)]
            node.resize_inputs(1 + len(parts))
            for number, part in enumerate(parts, 1):
                node.replace_input_with(number, part)


def _cast(graph: ir.Graph, tensor: ir.Value, value: ir.Value) -> ir.Value:
    """``tensor`` in the dtype of ``value``. Rows are cast after they have been gathered: a runtime that folds constants
    would keep the whole of an embedding a second time.
    """
    for node, _ in value.uses():
        if node.op_type == "Gather" and node.inputs[0] is value and node.attributes.get_int("axis", 0) == 0:
            gather = ir.node("Gather", [tensor, node.inputs[1]], {"axis": 0})
            cast = ir.node("Cast", [gather.outputs[0]], {"to": value.dtype})
            gather.outputs[0].name = f"{node.outputs[0].name}_{tensor.dtype.name.lower()}"
            ir.convenience.replace_nodes_and_values(graph, node, [node], [gather, cast], node.outputs, cast.outputs)
    cast = ir.node("Cast", [tensor], {"to": value.dtype})
    cast.outputs[0].name = f"{tensor.name}_{value.dtype.name.lower()}"
    cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
    if value.uses():
        graph.insert_before(graph[0], cast)
    return cast.outputs[0]


def _external(graph: ir.Graph, opened: Checkpoint, name: str) -> ir.Value:
    """The initializer that is a tensor of the shards, where it lies."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor, file = opened.tensors[name], opened.file_of(name)
    if tensor.dtype not in TYPES:
        raise UnsupportedError("a dtype that ONNX has", tensor.dtype, weight=name)
    data = ir.ExternalTensor(
        file.relative_to(opened.path).as_posix(),
        tensor.start,
        tensor.nbytes,
        ir.DataType(TYPES[tensor.dtype]),
        shape=ir.Shape(tensor.shape),
        name=name,
    )
    value = ir.Value(name=name, shape=data.shape, type=ir.TensorType(data.dtype), const_value=data)
    graph.register_initializer(value)
    return value


def bring_files(opened: Checkpoint, folder: Path) -> None:
    for file in opened.files():
        source, copy = opened.path / file.name, folder / file.name
        if file.fate == "left out":
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source in opened.weight_files:
            with contextlib.suppress(OSError):  # another file system, or one without links
                os.link(source.resolve(), copy)
                continue
        shutil.copyfile(source, copy)
