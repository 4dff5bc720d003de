"""``Plan``: what a model folder is to hold. An importer makes one of a source, an exporter turns one into another, and
``write`` makes it a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qformat import weight
from qformat.checkpoint import Checkpoint
from qformat.dtypes import Array
from qformat.manifest import Entry
from qformat.shards import Spec, spec
from qformat.weight import PackedWeight


@dataclass(frozen=True)
class Item:
    """A weight of the target: packed (with an ``entry``) or a dense tensor.

    ``consumes`` names the source tensors that it is made of. ``make`` gives the parts by their part names, or, for a
    dense tensor, ``{"": array}``; it may be called in any thread.
    """

    name: str
    consumes: tuple[str, ...]
    make: Callable[[], Mapping[str, Array]]
    entry: Entry | None = None
    dense: Spec | None = None
    foreign: Mapping[str, Spec] | None = None

    @property
    def specs(self) -> dict[str, Spec]:
        """Tensor name -> dtype and shape, for every tensor that ``make`` gives."""
        if self.foreign is not None:
            return dict(self.foreign)
        if self.entry is None:
            assert self.dense is not None
            return {self.name: self.dense}
        return {f"{self.name}_{part.name}": spec(str(part.dtype), part.shape) for part in weight.layout(self.entry)}

    def tensors(self) -> dict[str, Array]:
        if self.foreign is not None:
            return dict(self.make())
        return {f"{self.name}_{part}" if part else self.name: array for part, array in self.make().items()}

    def packed(self) -> PackedWeight:
        assert self.entry is not None
        return PackedWeight(self.name, self.entry, self.make())


@dataclass(frozen=True)
class Plan:
    """``config`` is the target's config.json without quantization settings; ``notes`` are lines for the report."""

    scheme: str
    items: tuple[Item, ...]
    config: dict[str, Any]
    left_out: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    activations: Any = None
    kv_cache: Any = None
    extra: dict[str, Any] = field(default_factory=dict)  # keys of a manifest that this version does not know
    notes: tuple[str, ...] = ()
    settings: Any = None  # the source's own, kept in the provenance


def passed(source: Checkpoint, names: Iterable[str]) -> list[Item]:
    """Tensors that go through as they are."""

    def item(name: str) -> Item:
        tensor = source.tensors[name]
        return Item(name, (name,), lambda: {"": source.raw(name)}, dense=Spec(tensor.tag, tensor.shape))

    return [item(name) for name in names]
