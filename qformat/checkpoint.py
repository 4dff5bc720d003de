"""``open``: a model folder or a lone safetensors file, read-only, lazy, memory-mapped; packed by qformat or by
others.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import files, manifest, weight
from .dtypes import Array
from .errors import DamagedError, QformatError, SurroundingsError, UsageError
from .layout import Part
from .manifest import Manifest, Rows
from .records import read_json
from .shards import Shard, Tensor
from .weight import PackedWeight

KEY = "quantization_config"


class Checkpoint(Mapping[str, PackedWeight]):
    """A mapping from the names of packed weights to :class:`PackedWeight`; ``tensors`` and ``array`` reach every
    tensor. It lists weights as they are stored; ``members``, the weights of the model that lie in one of these,
    ``composed``, those that several of these make up, and aliases are found by their names, too.

    ``config`` is the model's config.json without its quantization settings, which are ``settings``; ``manifest`` is
    None for a folder that qformat did not pack.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self.weight_files = files.weight_files(path) if path.is_dir() else [path]
        self.config = _read_config(path / files.CONFIG) if path.is_dir() else {}
        self.shards = [_open_shard(file) for file in self.weight_files]
        self.tensors: dict[str, Tensor] = {}
        self._shard_of: dict[str, Shard] = {}
        self.members: dict[str, Rows] = {}
        self.composed: dict[str, tuple[str, ...]] = {}
        for shard in self.shards:
            for name, tensor in shard.tensors.items():
                if name in self.tensors:
                    other = self._shard_of[name].path.name
                    raise DamagedError("every tensor once", f"also in {other}", file=shard.path, weight=name)
                self.tensors[name], self._shard_of[name] = tensor, shard
        if path.is_dir() and (path / files.INDEX).is_file():
            self._check_index(files.weight_map(path))
        self.settings = self._settings()
        self.manifest = self._manifest()

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        for name, file in weight_map.items():
            if name not in self.tensors or self._shard_of[name].path != files.within(self.path, file):
                raise DamagedError(
                    f"the tensor in {file}, as the index says", "none", file=self.path / files.INDEX, weight=name
                )
        for name in self.tensors.keys() - weight_map.keys():
            raise DamagedError(
                "every tensor in the index", "one that is not", file=self._shard_of[name].path, weight=name
            )

    def _settings(self) -> Any:
        """``quantization_config`` from the config, and from the header of a shard; both are equal where both are
        present.
        """
        own = self.config.pop(KEY, None)
        for shard in self.shards:
            if KEY in shard.metadata:
                try:
                    found = read_json(shard.metadata[KEY])
                except DamagedError as error:
                    raise error.located(file=shard.path) from None
                if own is not None and _text(found) != _text(own):
                    raise DamagedError(f"the {KEY} of config.json", "another one in __metadata__", file=shard.path)
                own = found
        return own

    def _manifest(self) -> Manifest | None:
        if not isinstance(self.settings, Mapping) or self.settings.get("quant_method") != manifest.METHOD:
            return None
        where = self.path / files.CONFIG if self.path.is_dir() else self.path
        try:
            found = manifest.read(self.settings)
            self._all = found.names(limit=len(self.tensors))
            self.members, self.composed = manifest.members(self._all), manifest.composed(self._all)
            self._entries = {name: entry for name, entry in self._all.items() if name not in self.composed}
            for name in (self.members.keys() | self.composed.keys()) & self.tensors.keys():
                raise DamagedError("a weight that other ones hold, stored once", "a tensor too", weight=name)
            for alias, name in found.aliases.items():
                taken = alias in self._all or alias in self.members or alias in self.tensors
                if name not in self._entries or taken:
                    raise DamagedError("an alias of a packed weight, stored once", repr(name), weight=alias)
        except QformatError as error:
            raise error.located(file=where) from None
        return found

    @functools.cached_property
    def packed_tensors(self) -> dict[str, str]:
        """Tensor name -> the weight that it is a part of; a name that two weights claim is an error."""
        out: dict[str, str] = {}
        for name in self:
            if name in self.tensors:
                raise DamagedError("a packed weight stored once", "a dense tensor too", file=self.path, weight=name)
            for part in self._layout(name):
                tensor = f"{name}_{part.name}"
                if tensor in out or tensor in self._all or tensor in self.members:
                    raise DamagedError("part names that no other tensor has", tensor, file=self.path, weight=name)
                out[tensor] = name
        return out

    def _layout(self, name: str) -> list[Part]:
        try:
            return weight.layout(self._entries[name])
        except QformatError as error:
            raise error.located(file=self.path, weight=name) from None

    @property
    def weights(self) -> Mapping[str, PackedWeight]:
        return self

    def __getitem__(self, name: str) -> PackedWeight:
        if self.manifest is None:
            raise KeyError(name)
        if name in self.members:
            whole, *rows = self.members[name]
            return dataclasses.replace(self[whole], name=name, rows=(rows[0], rows[1]))
        if name in self.composed:
            pieces = tuple(self[piece] for piece in self.composed[name])
            return PackedWeight(name, self._all[name], {}, pieces[0].file, pieces=pieces)
        name = self.manifest.aliases.get(name, name)
        entry = self._entries[name]
        parts = {}
        file = ""
        for part in self._layout(name):
            tensor = f"{name}_{part.name}"
            if tensor not in self.tensors:
                raise DamagedError(f"part {part.name}", "none", file=self.path, weight=name)
            parts[part.name] = self.array(tensor)
            file = str(self._shard_of[tensor].path)
        weight.check_parts(entry, parts, name, file)
        return PackedWeight(name, entry, parts, file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries if self.manifest is not None else ())

    def __len__(self) -> int:
        return len(self._entries) if self.manifest is not None else 0

    def array(self, name: str) -> Array:
        """A read-only view of any tensor of the files."""
        return self._shard_of[name].array(name)

    def raw(self, name: str) -> Array:
        """The bytes of any tensor, uint8."""
        return self._shard_of[name].raw(name)

    def file_of(self, name: str) -> Path:
        return self._shard_of[name].path

    @property
    def dense(self) -> list[str]:
        """Names of the tensors that are no part of a packed weight."""
        packed = self.packed_tensors
        return [name for name in self.tensors if name not in packed]

    def files(self) -> list[files.File]:
        """Every file of the folder, with what becomes of it when the model is converted."""
        return files.survey(self.path, self.weight_files) if self.path.is_dir() else []

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(path.stat().st_size for path in self.weight_files)


def open(path: str | Path) -> Checkpoint:
    """A model folder, or a safetensors file, for reading.

    Raises :class:`UsageError` where there is none, :class:`DamagedError` or :class:`UnsupportedError` for what is in
    it.
    """
    path = Path(path)
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        raise UsageError("a folder or file", "none", file=path)
    try:
        return Checkpoint(path)
    except OSError as error:
        raise SurroundingsError(f"readable files: {error.strerror}", file=error.filename or path) from None


def _text(value: Any) -> str:
    """What is equal for JSON values that differ in the order of keys alone; ``true`` is not 1."""
    return json.dumps(value, sort_keys=True)


def _open_shard(file: Path) -> Shard:
    if not os.path.isfile(file):  # neither a folder nor what a read would wait for
        raise DamagedError("a weight file", "none", file=file)
    return Shard(file)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return files.read_object(path)
