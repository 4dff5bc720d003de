"""What importers share: quantization settings wherever they stand, tensors by module, the target's config."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qformat import files
from qformat.checkpoint import KEY, Checkpoint
from qformat.dtypes import Array
from qformat.errors import DamagedError
from qformat.records import read_json
from qformat.shards import Tensor

FLOATS = ("float16", "bfloat16", "float32")
TIE = "tie_word_embeddings"
PARTIAL = "it looks like a save that was interrupted"
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in")


class Settings(NamedTuple):
    """Quantization settings and the file that they stand in."""

    file: str
    values: Mapping[str, Any]


def settings(source: Checkpoint) -> Iterator[Settings]:
    """All quantization settings of a source: of config.json, of a sub-config in it, of the files for nothing else."""
    inner = [value.get(KEY) for value in source.config.values() if isinstance(value, Mapping)]
    for values in (source.settings, *inner):
        if values is not None:
            yield _settings(source, files.CONFIG, values)
    for name in files.SETTINGS if source.path.is_dir() else ():
        if (path := source.path / name).is_file():
            try:
                yield _settings(source, name, read_json(path.read_bytes()))
            except DamagedError as error:
                raise error.located(file=path) from None


def _settings(source: Checkpoint, file: str, values: Any) -> Settings:
    if not isinstance(values, Mapping):
        raise DamagedError("quantization settings as an object", type(values).__name__, file=source.folder / file)
    return Settings(file, values)


def method(source: Checkpoint) -> str:
    """The quantization method that the settings name first, in lower case; empty where they name none."""
    for one in settings(source):
        for key in ("quant_method", "method"):
            if isinstance(one.values.get(key), str):
                return str(one.values[key]).lower()
    return ""


def agreed(source: Checkpoint, found: Iterable[Settings], *keys: str) -> Any:
    """The one value of a setting under any of its names; None where it stands nowhere.

    Raises :class:`DamagedError` naming both places where two differ: tools differ in which file they read first.
    """
    first: tuple[str, str, Any] | None = None
    for one in found:
        for key in keys:
            value = one.values.get(key)
            if value is None:
                continue
            first = first or (one.file, key, value)
            if value != first[2]:
                expected = f"{keys[0]} {first[2]!r}, as {first[1]} in {first[0]} says"
                raise DamagedError(expected, f"{key} {value!r} in {one.file}", file=source.folder / one.file)
    return first[2] if first else None


@dataclass(frozen=True)
class Module:
    """The tensors of one packed linear layer: ``<name>.<part>``."""

    source: Checkpoint
    name: str
    parts: Mapping[str, Tensor]

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    def tensor(self, part: str, dtypes: Collection[str], ndim: int) -> Tensor:
        """:class:`DamagedError` unless the tensor is there, of one of the dtypes, with ``ndim`` axes, none empty."""
        expected = f"{' or '.join(dtypes)} with {ndim} axes"
        if part not in self.parts:
            raise DamagedError(expected, "no such tensor", file=self.source.path, weight=f"{self.name}.{part}")
        tensor = self.parts[part]
        if tensor.dtype not in dtypes or len(tensor.shape) != ndim or 0 in tensor.shape:
            raise self.error(part, expected, f"{tensor.dtype} {list(tensor.shape)}")
        return tensor

    def array(self, part: str) -> Array:
        return self.source.array(f"{self.name}.{part}")

    def error(self, part: str, expected: str, found: str, hint: str = "") -> DamagedError:
        name = f"{self.name}.{part}"
        return DamagedError(expected, found, file=self.source.file_of(name), weight=name, hint=hint)


def modules(source: Checkpoint, anchor: str, parts: Collection[str], never_alone: Collection[str] = ()) -> list[Module]:
    """Every module with a tensor called ``anchor``, with those of its tensors that are in ``parts``.

    Raises :class:`DamagedError` for a module that has the weight itself, too, and for a tensor called as in
    ``never_alone`` whose module has no anchor.
    """
    out: dict[str, dict[str, Tensor]] = {}
    for name in source.tensors:
        module, _, part = name.rpartition(".")
        if part == anchor:
            out[module] = {}
    for name, tensor in source.tensors.items():
        module, _, part = name.rpartition(".")
        if module in out and part in parts:
            out[module][part] = tensor
        elif module in out and part == "weight":
            raise DamagedError(f"one weight, {anchor} or weight", "both", file=source.file_of(name), weight=name)
        elif module not in out and part in never_alone:
            raise DamagedError(f"{module}.{anchor} beside it", "none", file=source.file_of(name), weight=name)
    return [Module(source, name, found) for name, found in out.items()]


def check_finite(module: Module, part: str) -> Array:
    """A float tensor of a module; :class:`DamagedError` with the first place where it is not finite."""
    values = module.array(part)
    bad = ~np.isfinite(values.astype(np.float32))
    if bad.any():
        first = [int(axis) for axis in np.argwhere(bad)[0]]
        raise module.error(part, "finite numbers", f"{int(bad.sum())} that are not, the first at {first}")
    return values


def target_config(source: Checkpoint, packed: Collection[str]) -> dict[str, Any]:
    """config.json without quantization settings, and without a tie of the embedding to a head that is ``packed``."""

    def cleaned(values: Mapping[str, Any]) -> dict[str, Any]:
        out = {key: value for key, value in values.items() if key != KEY}
        return out | {TIE: False} if untied and out.get(TIE) else out

    untied = _packed_head(packed)
    inner = {key: cleaned(value) if isinstance(value, Mapping) else value for key, value in source.config.items()}
    return cleaned(inner)


def notes(source: Checkpoint, packed: Collection[str]) -> list[str]:
    """Lines for the report: where packed weights and config.json, or weights and their siblings, differ."""
    out = []
    if _packed_head(packed) and tied(source):
        out.append(f"{TIE} set to false: {_packed_head(packed)} is stored, and packed")
    templates = {re.sub(r"\d+", "#", name) for name in packed}
    packed = set(packed)
    dense = [name for name in source.tensors if name not in packed and re.sub(r"\d+", "#", name) in templates]
    if dense:
        out.append(f"dense among packed siblings: {count(dense, 'weight')}")
    return out


def _packed_head(packed: Collection[str]) -> str:
    return next((name for name in packed if name.split(".")[-2:] == ["lm_head", "weight"]), "")


def tied(source: Checkpoint) -> bool:
    """Whether config.json says that the head is the embedding."""
    inner = source.config.get("text_config")
    return bool(source.config.get(TIE) or (isinstance(inner, Mapping) and inner.get(TIE)))


def count(names: Collection[str], what: str) -> str:
    """``3 weights (model.layers.0.mlp.up_proj.weight, ...)``."""
    first = min(names)
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({first}{', ...' if len(names) > 1 else ''})"


def merged(found: Iterable[Settings]) -> dict[str, Any]:
    """The source's settings as one object for the provenance; what stands first counts."""
    out: dict[str, Any] = {}
    for one in found:
        for key, value in one.values.items():
            if key != "tensor_storage":  # EXL3's list of every tensor
                out.setdefault(key, value)
    return out
