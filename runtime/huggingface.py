"""transformers: ``load``, and what makes ``from_pretrained`` and ``save_pretrained`` work on packed models.

Importing this module registers the quantizer; ``import qformat`` has it imported when transformers needs it.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    apply_renamings,
    rename_source_key,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qformat import checkpoint, manifest, sources
from qformat.errors import DamagedError, QformatError, UnsupportedError, UsageError
from qformat.kernels import native
from qformat.manifest import Entry, Manifest
from qformat.shards import Shard
from qformat.weight import check_parts, layout

from .pytorch import modules, ops
from .pytorch.modules import Packed
from .pytorch.prepared import Prepared, entry_of, one_of, one_of_stack, prepared
from .pytorch.tensor import Joined, PackedTensor

logger = logging.getLogger("qformat")
PackedTensor._is_hf_initialized = Joined._is_hf_initialized = True  # what transformers' initializers go by


def load(
    path: str | Path, dtype: torch.dtype | str | None = None, device: str | None = None, *, activations: str = "float"
) -> Any:
    """A transformers model whose weights stay packed, in eval mode.

    ``path`` is a folder or ``org/name[@revision]`` on the Hub; ``dtype`` that of activations and dense weights, by
    default the config's. Raises :class:`UsageError` where the model is not packed by qformat, :class:`DamagedError`
    naming the tensor where one is missing, misshapen or unknown to the model.
    """
    ops.check_activations(activations)
    folder = sources.local(path)
    if not folder.is_dir():
        raise UsageError("a model folder", "a file" if folder.exists() else "none", file=path)
    if checkpoint.open(folder).manifest is None:
        raise _another(path)
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
    model, info = kind.from_pretrained(
        folder,
        dtype=dtype or "auto",
        device_map=None if device is None else {"": device},
        ignore_mismatched_sizes=True,  # they are reported here, by name
        output_loading_info=True,
    )
    if not isinstance(getattr(model, "hf_quantizer", None), QformatQuantizer):
        raise _another(path)
    for name, found, expected in info["mismatched_keys"]:
        raise DamagedError(f"shape {list(expected)}", str(list(found)), file=path, weight=name)
    for name in sorted(info["missing_keys"]):
        raise DamagedError("a tensor that the model needs", "none", file=path, weight=name)
    for name in sorted(info["unexpected_keys"]):
        raise DamagedError("only tensors that the model has a place for", "another", file=path, weight=name)
    return model.eval()


def _another(path: str | Path) -> UsageError:
    return UsageError("a qformat model", "another", file=path, hint="`qformat quantize` and `qformat convert` make one")


@register_quantization_config(manifest.METHOD)
class QformatConfig(QuantizationConfigMixin):
    """The manifest, as its JSON object: what it does not know it keeps."""

    quant_method = manifest.METHOD  # type: ignore[assignment]

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.settings)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.to_dict().items())


@register_quantizer(manifest.METHOD)
class QformatQuantizer(HfQuantizer):
    """Packs what the manifest names before its tensors are loaded; checks, before and after, that none is lacking."""

    is_trainable = True  # of what is dense: adapters
    requires_calibration = True  # nothing is packed here: transformers refuses models that are not

    def __init__(self, quantization_config: QformatConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.manifest = manifest.read(quantization_config.settings)
        self.unfused: set[str] = set()  # what experts that are held one by one were fused to

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise UnsupportedError("a model on one device, or spread by device_map", "a distributed one")
        self.ties = dict(model.all_tied_weights_keys)
        places = _Places(model)
        entries = _checked(self.manifest, checkpoint_files)
        pieces = {piece for stored in manifest.composed(entries).values() for piece in stored}
        for name, entry in ((name, entry) for name, entry in entries.items() if name not in pieces):
            try:
                if entry.concat:
                    places.share(name, entry)
                elif entry.pieces:
                    places.compose(name, entry, entries)
                else:
                    places.pack(places.path(name), entry)
            except QformatError as error:
                raise error.located(file=model.name_or_path, weight=name) from None
        places.tie(self.manifest.aliases)
        if places.experts:
            model.set_experts_implementation("eager")  # the one that takes experts one by one
        self.unfused = places.unfused
        _keep_dtype(model)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        return [one for one in weight_conversions if one.target_patterns[0] not in self.unfused]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for path, module in _packed(model):
            for name, parameter in module.named_parameters(recurse=False):
                if not (parameter.is_meta or getattr(parameter, "_is_hf_initialized", False)):  # meta: left on disk
                    where = {"file": model.name_or_path, "weight": f"{path}.{name}"}
                    raise DamagedError("a tensor that was loaded", "none", **where)
            for name in module.part_names():
                module.get_parameter(name).requires_grad_(False)
            if any(info.held and module.parts(name)[0].is_meta for name, info in module.packed.items()):
                where = {"file": model.name_or_path, "weight": path}
                raise UnsupportedError("what a module holds for others, in memory", "left on disk", **where)
        _prepare(model)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        packed = sorted(_packed(model), key=lambda item: any(info.held for info in item[1].packed.values()))
        for path, module in packed:
            modules.unpack(module)
            if type(module) is nn.Module:  # there for what it held alone
                parent, _, name = path.rpartition(".")
                del model.get_submodule(parent)._modules[name]
        for part in _models(model):
            vars(part).pop("_tied_weights_keys", None)
        model.all_tied_weights_keys = self.ties
        model.tie_weights(recompute_mapping=False)
        return model


def _models(model: nn.Module) -> Iterator[Any]:
    """The model and the models inside it."""
    return (part for part in model.modules() if isinstance(part, transformers.PreTrainedModel))


def _packed(model: nn.Module) -> list[tuple[str, Packed]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Packed)]


def _checked(described: Manifest, files: Sequence[str] | None) -> dict[str, Entry]:
    """The entry of every packed weight. Raises :class:`DamagedError` unless the files hold its parts, in dtype and
    shape: what they lack would become random numbers, and another dtype would be cast without a word.
    """
    shards = [Shard(Path(file)) for file in files or ()]
    where = {tensor: shard for shard in shards for tensor in shard.tensors}
    entries = described.names(limit=len(where) if files else 1 << 20)
    for member in (manifest.members(entries).keys() | manifest.composed(entries).keys()) & where.keys():
        raise DamagedError("a weight that other ones hold, stored once", "a tensor too", weight=member)
    for name, entry in entries.items() if files else ():
        names = {part.name: f"{name}_{part.name}" for part in layout(entry)}
        present = {part: where[tensor].array(tensor) for part, tensor in names.items() if tensor in where}
        file = next((where[tensor].path for tensor in names.values() if tensor in where), shards[0].path.parent)
        check_parts(entry, present, name, str(file))
    return entries


class _Places:
    """Where a model keeps the weights that its checkpoint has under other names, or one by one."""

    def __init__(self, model: Any) -> None:
        self.model, self.dense = model, model.state_dict()
        conversions = get_model_conversion_mapping(model)
        self.converters = [one for one in conversions if isinstance(one, WeightConverter)]
        self.renamings = [one for one in conversions if not isinstance(one, WeightConverter)]
        self.entries: dict[str, Entry] = {}  # path in the model -> how it is packed
        self.unfused: set[str] = set()  # parameters of experts that are now held one by one

    @property
    def experts(self) -> bool:
        return bool(self.unfused) or any(entry.stack for entry in self.entries.values())

    def path(self, name: str) -> str:
        """The path of the parameter for the weight called ``name`` in the checkpoint; the model may not have it."""
        path, pattern = rename_source_key(
            name, self.renamings, self.converters, self.model.base_model_prefix, self.dense
        )
        if path not in self.dense and name in self.dense:
            return name
        if pattern is None:
            return path
        converter = next(one for one in self.converters if pattern in one.source_patterns)
        leaves = _leaves(converter)
        if leaves is None:
            steps = ", ".join(type(step).__name__ for step in converter.operations)
            raise UnsupportedError("a weight that the model takes as it is stored", f"one for {steps}", weight=name)
        if path in self.dense:
            self._unfuse(converter.target_patterns[0], leaves)
        number, leaf, _ = name.split(".")[-3:]
        return f"{path.rpartition('.')[0]}.{number}.{leaf}.weight"

    def _unfuse(self, fused: str, leaves: Sequence[str]) -> None:
        """All experts of the model, also dense ones, so that none need the converter that would fuse them."""
        if fused in self.unfused:
            return
        self.unfused.add(fused)
        for path in self.dense:
            parent, _, name = path.rpartition(".")
            if f".{path}".endswith("." + fused.lstrip(".")):
                modules.unfuse(self.model.get_submodule(parent), name, leaves)

    def pack(self, path: str, entry: Entry) -> bool:
        """False where the model has no such parameter; transformers then reports the tensors as unexpected."""
        module, name = self._module(path)
        if module is None:
            return False
        modules.pack(module, name, entry)
        self.entries[path] = entry
        return True

    def _module(self, path: str) -> tuple[nn.Module | None, str]:
        """The module that has the parameter, or None, and its name there."""
        parent, _, name = path.rpartition(".")
        try:
            module = self.model.get_submodule(parent)
        except AttributeError:
            return None, name
        return (module if module._parameters.get(name) is not None else None), name

    def share(self, name: str, entry: Entry) -> None:
        """What is stored under ``name``, for the weights that are rows of it: a module of that name holds the parts."""
        rows = manifest.members({name: entry})
        places = {member: self._module(self.path(member)) for member in rows}
        lacking = [member for member, (module, _) in places.items() if module is None]
        if len(lacking) == len(rows):
            return
        if lacking:
            raise DamagedError("a place in the model for each weight", "none", weight=lacking[0])
        first = next(iter(rows))
        holder, held = self._hold(name, entry, first)
        for member, (module, leaf) in places.items():
            self._check_ties(member)
            modules.share(module, leaf, holder, held, rows[member][1:])

    def compose(self, name: str, entry: Entry, entries: Mapping[str, Entry]) -> None:
        """A weight that is stored as several: a module of the name of each holds its parts."""
        module, leaf = self._module(self.path(name))
        if module is None:
            return
        self._check_ties(name)
        stored = [piece.weights[0] for piece in entry.pieces]
        modules.compose(module, leaf, entry, [self._hold(one, entries[one], name) for one in stored])

    def _check_ties(self, name: str) -> None:
        ties = self.model.all_tied_weights_keys
        if self.path(name) in (*ties, *ties.values()):
            raise UnsupportedError("a weight with parts of its own, to be tied", "one that others hold", weight=name)

    def _hold(self, name: str, entry: Entry, member: str) -> tuple[nn.Module, str]:
        """The module that holds what is stored under ``name`` for the model's weight ``member``, its name there."""
        module, leaf = self._module(self.path(member))
        assert module is not None
        path = self._stored_path(name, member)
        holder, held = self._holder(path)
        modules.hold(holder, held, entry, like=module._parameters[leaf])
        self.entries[path] = entry
        return holder, held

    def _stored_path(self, name: str, member: str) -> str:
        """Where transformers will look for ``name``, which the model lacks: its path is changed as a member's is."""
        path, own, stored = self.path(member), *(apply_renamings(one, self.renamings) for one in (member, name))
        if own.endswith(path):  # the model is the base of what was saved
            return stored.removeprefix(own.removesuffix(path))
        return path.removesuffix(own) + stored

    def _holder(self, path: str) -> tuple[nn.Module, str]:
        """A module for what is stored under ``path``, made where there is none, and its name there."""
        *steps, name = path.split(".")
        module: nn.Module = self.model
        for step in steps:
            if step not in module._modules:
                if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
                    raise UnsupportedError("a stored weight beside those of the model", "one in a list of its modules")
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        if name in module._parameters:
            raise DamagedError("a stored weight of which several of the model's are rows", "one of the model's itself")
        return module, name

    def tie(self, aliases: Mapping[str, str]) -> None:
        """What shares a weight that is packed shares its parts; where several are stored, each keeps its own."""
        ties = self.model.all_tied_weights_keys
        groups: dict[str, list[str]] = {}
        for target, source in (ties | {self.path(alias): self.path(name) for alias, name in aliases.items()}).items():
            groups.setdefault(source, []).append(target)
        changed = False
        for source, targets in groups.items():
            stored = [path for path in (source, *targets) if path in self.entries]
            changed |= bool(stored)
            for target in targets if stored else ():
                ties.pop(target, None)
            if len(stored) != 1:
                continue
            entry = self.entries[stored[0]]
            present = {path for path in (source, *targets) if path in self.entries or self.pack(path, entry)}
            if source in present:
                names = [part.name for part in layout(entry)]
                ties |= {
                    f"{target}_{name}": f"{source}_{name}" for target in targets if target in present for name in names
                }
        for part in _models(self.model) if changed else ():  # what a later `tie_weights` goes by
            part._tied_weights_keys = dict(ties) if part is self.model else None


def _leaves(converter: WeightConverter) -> list[str] | None:
    """The linear layers of an expert, by the names of the checkpoint, whose weights a converter concatenates along out
    and over the experts; None for a converter that does anything else.
    """
    merge, *rest = converter.operations
    if not isinstance(merge, MergeModulelist) or merge.dim != 0 or len(converter.target_patterns) != 1:
        return None
    if len(rest) > 1 or not all(isinstance(step, Concatenate) and step.dim == 1 for step in rest):
        return None
    sources = [source.replace("\\.", ".").rpartition("*.") for source in converter.source_patterns]
    leaves = [leaf.removesuffix(".weight") for _, _, leaf in sources]
    whole = all(leaf.endswith(".weight") and leaf.count(".") == 1 for _, _, leaf in sources)
    return leaves if whole else None


def _keep_dtype(model: nn.Module) -> None:
    """A model's dtype is that of its first floating parameter; where that is a scale, take the first dense one's."""
    scales = {id(part) for _, module in _packed(model) for name in module.packed for part in module.parts(name)}
    for part in _models(model):
        first = next((one for one in part.parameters() if one.is_floating_point()), None)
        if id(first) in scales:
            kind = type(part)
            part.__class__ = type(kind.__name__, (kind,), {"dtype": property(_dtype), "__module__": kind.__module__})


def _dtype(model: nn.Module) -> torch.dtype:
    for module in model.modules():
        parts = module.part_names() if isinstance(module, Packed) else ()
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and name not in parts:
                return parameter.dtype
    return torch.float32


def _prepare(model: Any) -> None:
    """Make every weight ready for its device, which checks it; say what has no kernel there and what that costs."""
    slow: dict[str, float] = {}  # codec -> seconds a forward pass
    measured: dict[str, float] = {}  # spec -> seconds
    for path, module in _packed(model):
        for name, info in module.stored.items():
            parts, spec, count = module.parts(name), info.spec, 1
            if parts[0].is_meta:
                continue
            entry = entry_of(spec)
            for size in entry.shape[: entry.stack]:
                parts, count = one_of_stack(parts, 0), count * size
            spec = one_of(spec)
            try:
                ready = prepared(parts, spec)
            except QformatError as error:
                raise error.located(file=model.name_or_path, weight=f"{path}.{name}") from None
            if all(matrix.fast for matrix in ready.matrices):
                continue
            if spec not in measured:
                measured[spec] = _seconds(ready)
            codec = "+".join(term["codec"] for term in entry.terms)
            slow[codec] = slow.get(codec, 0.0) + count * measured[spec]
    for codec, seconds in slow.items():
        why = native.why() or "not for these settings"
        logger.warning("no kernel for %s (%s): decoded anew at each use, %.1f s a forward pass", codec, why, seconds)


def _seconds(ready: Prepared) -> float:
    """What it takes to decode a weight, from one strip of each of its matrices."""
    total = 0.0
    for matrix in ready.matrices:
        start, stop = next(matrix.strips())
        began = time.perf_counter()
        matrix.decode(start, stop)
        total += (time.perf_counter() - began) * matrix.shape[0] / (stop - start)
    return total
