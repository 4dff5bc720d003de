"""``session``: an ``onnxruntime.InferenceSession`` of a model that ``qformat export`` wrote."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime  # type: ignore[import-untyped]

from qformat.errors import DamagedError, SurroundingsError, UnsupportedError, UsageError
from qformat.kernels import native
from qformat.shards import Shard

from . import plugin
from .functions import DOMAIN, FILE, VERSION

MODES = {
    "plugin": "weights stay packed; products are made from them in C++",
    "fold": "weights are decoded once, when the session is made: fast, with all of the dense model in memory",
    "stream": "weights stay packed and are decoded at every run: small, and slow",
}


def session(path: str | Path, mode: str | None = None, options: Any = None) -> Any:
    """The session of an exported folder or its ``.onnx``, on the CPU.

    ``mode``: ``plugin``, ``fold`` or ``stream``, see ``MODES``; by default ``plugin`` where the native library is, else
    ``stream``, of which a warning tells. ``options``: ``onnxruntime.SessionOptions``, which the mode is added to.

    Raises :class:`UsageError` for another mode or a path without a model, :class:`DamagedError` where shards are
    missing or no longer those that were exported, :class:`UnsupportedError` for a graph of another version, or one that
    ONNX Runtime refuses.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    _check(file)
    if mode is None:
        mode = "plugin" if native.available() else "stream"
        if mode == "stream":
            warnings.warn(f"{file}: no native library: {MODES[mode]}; mode='fold': {MODES['fold']}", stacklevel=2)
    if mode not in MODES:
        raise UsageError(f"mode {', '.join(MODES)}", mode)
    options = onnxruntime.SessionOptions() if options is None else options
    if mode == "plugin":
        plugin.register(options)
    if mode == "stream":
        options.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
    try:
        with plugin.making() as weights:
            made = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own have no base in common
        why = str(error).strip().splitlines()[0].rpartition(" : ")[2]
        why = why.rpartition(") ")[2] if "/onnxruntime_src/" in why else why  # the place in its source
        hint = "the library was registered in these options already" if "Domain already" in why else ""
        raise UnsupportedError(
            f"a model that ONNX Runtime {onnxruntime.__version__} takes", why, file=file, hint=hint
        ) from None
    made.weights = weights  # the session's kernels point into them
    if dense := sum(not weight.packed for weight in weights):
        warnings.warn(f"{file}: {dense} weights have no kernel and lie in memory decoded", stacklevel=2)
    return made


def _check(file: Path) -> None:
    """The graph's version, and that its weights are where it says."""
    if not file.is_file():
        raise UsageError(f"an exported folder, or its {FILE}", file=file, hint="`qformat export` makes one")
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as error:  # protobuf's
        raise DamagedError("an ONNX model", str(error).partition("\n")[0], file=file) from None
    versions = {one.domain: one.version for one in model.opset_import}
    if versions.get(DOMAIN, VERSION) != VERSION:
        hint = "export it again, or use the qformat that exported it"
        raise UnsupportedError(f"operators of version {VERSION}", str(versions[DOMAIN]), file=file, hint=hint)
    _check_shards(file.parent, [one for one in model.graph.initializer if one.external_data])


def _check_shards(folder: Path, tensors: Iterable[onnx.TensorProto]) -> None:
    """Every external tensor must be the one of that name in its shard."""
    shards: dict[str, Shard] = {}
    for tensor in tensors:
        where = {entry.key: entry.value for entry in tensor.external_data}
        location = where.get("location", "")
        file = folder / location
        if location not in shards:
            if not file.is_file():
                raise SurroundingsError("the shard that the model refers to", "no such file", file=file)
            shards[location] = Shard(file)
        found = shards[location].tensors.get(tensor.name)
        if found is None or (str(found.start), str(found.nbytes)) != (where.get("offset", "0"), where.get("length")):
            hint = "the shards were written anew: export again"
            raise DamagedError("the tensor where the model has it", file=file, weight=tensor.name, hint=hint)
