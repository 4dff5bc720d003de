"""transformers: ``load``, and what makes ``from_pretrained`` and ``save_pretrained`` work on packed models.

Importing this module registers the quantizer; ``import qformat`` has it imported when transformers needs it.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qformat import checkpoint, manifest, sources
from qformat.errors import DamagedError, QformatError, UnsupportedError, UsageError
from qformat.kernels import native
from qformat.manifest import Entry, Manifest
from qformat.shards import Shard
from qformat.weight import check_parts, layout

from .places import Places, models
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
        places = Places(model)
        places.fill(_checked(self.manifest, checkpoint_files))
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
        for part in models(model):
            vars(part).pop("_tied_weights_keys", None)
        model.all_tied_weights_keys = self.ties
        model.tie_weights(recompute_mapping=False)
        return model


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


def _keep_dtype(model: nn.Module) -> None:
    """A model's dtype is that of its first floating parameter; where that is a scale, take the first dense one's."""
    scales = {id(part) for _, module in _packed(model) for name in module.packed for part in module.parts(name)}
    for part in models(model):
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
