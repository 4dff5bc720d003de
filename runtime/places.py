"""Where the modules of a transformers model keep what a checkpoint has packed, under names of its own: filled with the
parts, before any tensor is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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

from qformat import manifest
from qformat.errors import DamagedError, QformatError, UnsupportedError
from qformat.manifest import Entry
from qformat.weight import layout

from .pytorch import modules


def models(model: nn.Module) -> Iterator[Any]:
    """The model and the models inside it."""
    return (part for part in model.modules() if isinstance(part, transformers.PreTrainedModel))


class Places:
    """Where a model keeps the weights that its checkpoint has under other names, or one by one."""

    def __init__(self, model: Any) -> None:
        self.model, self.dense = model, model.state_dict()
        conversions = get_model_conversion_mapping(model)
        self.converters = [one for one in conversions if isinstance(one, WeightConverter)]
        self.renamings = [one for one in conversions if not isinstance(one, WeightConverter)]
        self.entries: dict[str, Entry] = {}  # path in the model -> how it is packed
        self.unfused: set[str] = set()  # parameters of experts that are now held one by one

    def fill(self, entries: Mapping[str, Entry]) -> None:
        """Put every weight where it belongs; ``entries`` are those of :meth:`Manifest.names`."""
        pieces = {piece for stored in manifest.composed(entries).values() for piece in stored}
        for name, entry in entries.items():
            try:
                if entry.concat:
                    self._share(name, entry)
                elif entry.pieces:
                    self._compose(name, entry, entries)
                elif name not in pieces:
                    self._pack(self.path(name), entry)
            except QformatError as error:
                raise error.located(file=self.model.name_or_path, weight=name) from None

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

    def _pack(self, path: str, entry: Entry) -> bool:
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

    def _share(self, name: str, entry: Entry) -> None:
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

    def _compose(self, name: str, entry: Entry, entries: Mapping[str, Entry]) -> None:
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
            present = {path for path in (source, *targets) if path in self.entries or self._pack(path, entry)}
            if source in present:
                names = [part.name for part in layout(entry)]
                ties |= {
                    f"{target}_{name}": f"{source}_{name}" for target in targets if target in present for name in names
                }
        for part in models(self.model) if changed else ():  # what a later `tie_weights` goes by
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
