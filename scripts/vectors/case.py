"""What the conformance vectors are made of: drafts of cases, and the one way a case is written.

Every random number of a case comes from SHAKE-256 of the case's name, so that a case is the same wherever it is made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qformat import checkpoint, weight
from qformat.dtypes import NUMPY, Array, name_of
from qformat.manifest import METHOD, VERSION, Entry
from qformat.records import read_record
from qformat.shards import ShardWriter, spec

NAME = "weight"
WIDE = 2.0**-20  # tolerance of a weight whose rotation is undone, of its largest magnitude: README, rule R6


@dataclass(frozen=True)
class Draft:
    """A case to be written. ``write`` makes ``input.safetensors`` or the folder ``input`` in the folder it is given."""

    name: str
    what: str
    rules: tuple[str, ...]
    write: Callable[[Path], None]
    group: str = "valid"
    error: str | None = None
    entries: tuple[dict[str, Any], ...] = ()
    tolerance: float = 0
    slices: tuple[dict[str, Any], ...] = ()
    values: Array | None = None  # of the only weight, where they do not come from the reference decoder


@dataclass
class Stream:
    """Random numbers that depend on a name alone."""

    seed: str
    used: int = field(default=0)

    def bytes(self, count: int) -> Array:
        self.used += 1
        return np.frombuffer(hashlib.shake_256(f"{self.seed}/{self.used}".encode()).digest(count), np.uint8).copy()

    def uniform(self, shape: tuple[int, ...], low: float = 0, high: float = 1) -> Array:
        """float64 from low to high."""
        count = int(np.prod(shape))
        return low + (high - low) * (self.bytes(4 * count).view("<u4").reshape(shape) / 2**32)

    def integers(self, shape: tuple[int, ...], low: int, high: int) -> Array:
        """int64 from low to high, both included."""
        return np.floor(self.uniform(shape, low, high + 1)).astype(np.int64)


def draw(stream: Stream, name: str, dtype: str, shape: tuple[int, ...], tops: Mapping[str, int]) -> Array:
    """A part with plausible numbers; ``tops`` bounds those that are integers of a range."""
    role = name.rpartition("_")[2]
    if dtype == "uint8" and role == "codes":
        return stream.bytes(int(np.prod(shape))).reshape(shape)
    if role == "groups":
        return stream.integers(shape, 0, tops["groups"]).astype(np.int32)
    if role == "perm":
        return np.argsort(stream.uniform(shape), axis=-1).astype(np.int32)
    if role == "matrix":
        return _orthogonal(stream, shape).astype(NUMPY[dtype])
    if dtype == "int8":
        signs = stream.integers(shape, 0, 1) * 2 - 1
        return (signs if name in ("in_scale", "out_scale") else stream.integers(shape, -127, 127)).astype(np.int8)
    if role == "zeros":
        low, high = (0, tops["zeros"]) if dtype == "uint8" else (-3.5, tops["zeros"] + 3)
        drawn = stream.uniform(shape, low, high) if "float" in dtype else stream.integers(shape, int(low), int(high))
        return drawn.astype(NUMPY[dtype])
    if dtype == "float8_e8m0fnu":
        return stream.integers(shape, 117, 133).astype(np.uint8).view(NUMPY[dtype])
    signs = np.where(stream.uniform(shape) < (0.5 if role in ("scale", "offsets", "table") else 0.1), -1, 1)
    return (signs * stream.uniform(shape, 0.02, 2)).astype(NUMPY[dtype])


def _orthogonal(stream: Stream, shape: tuple[int, ...]) -> Array:
    """A reflection along one vector and a cyclic shift of the rows: orthogonal, not symmetric."""
    vector = stream.uniform(shape[:-1], -1, 1)
    norm = (vector**2).sum(axis=-1)[..., None, None]
    reflection = np.eye(shape[-1]) - 2 * vector[..., :, None] * vector[..., None, :] / norm
    return np.roll(reflection, 1, axis=-2)


def entry(terms: dict[str, Any] | list[dict[str, Any]], shape: Iterable[int], **keys: Any) -> dict[str, Any]:
    """A manifest entry as JSON."""
    terms = terms if isinstance(terms, list) else [terms]
    return {"weights": [NAME], "shape": list(shape), "dtype": "float16", "terms": terms, **keys}


def fill(name: str, item: dict[str, Any], given: Mapping[str, Array] | None = None) -> dict[str, Array]:
    """Part name -> array for a valid entry: drawn, but for those that are given."""
    read, given = read_record(Entry, item), given or {}
    stream = Stream(name)
    first = item["terms"][0]
    tops = {"zeros": 2 ** min(first.get("bits", 4), 8) if isinstance(first.get("bits", 4), int) else 16}
    parts: dict[str, Array] = {}
    for part in weight.layout(read):
        assert isinstance(part.dtype, str)
        if part.name.endswith("groups"):
            tops["groups"] = parts[part.name.removesuffix("groups") + "scales"].shape[-1] - 1
        drawn = draw(stream, part.name, part.dtype, part.shape, tops)
        parts[part.name] = given.get(part.name, drawn)
    return parts


def packed(
    name: str,
    what: str,
    rules: str,
    terms: dict[str, Any] | list[dict[str, Any]],
    shape: Iterable[int],
    *,
    parts: Mapping[str, Array] | None = None,
    group: str = "valid",
    error: str | None = None,
    slices: Iterable[tuple[int, int, int] | tuple[int, int, int, str]] = (),
    tolerance: float = 0,
    values: Array | None = None,
    **keys: Any,
) -> Draft:
    """A case with one weight, whose layout is that of its entry; parts are drawn where none are given."""
    item = entry(terms, shape, **keys)
    tensors = {f"{NAME}_{part}": array for part, array in fill(name, item, parts).items()}
    cuts = [dict(zip(("axis", "start", "stop", "error"), cut, strict=False)) for cut in slices]
    return Draft(
        name,
        what,
        tuple(rules.split()),
        lambda folder: write_file(folder / "input.safetensors", tensors, [item]),
        group=group if error is None or group == "optional" else "invalid",
        error=error,
        entries=(item,),
        tolerance=tolerance,
        slices=tuple(cuts),
        values=values,
    )


def refused(
    name: str,
    what: str,
    rules: str,
    item: dict[str, Any] | list[dict[str, Any]],
    *,
    like: dict[str, Any] | None = None,
    error: str = "damaged",
    **keys: Any,
) -> Draft:
    """A case whose manifest no reader may take. The file holds the parts of the valid entry ``like``, so that nothing
    but the manifest is wrong.
    """
    items = item if isinstance(item, list) else [item]
    like = like or entry({"codec": "int", "bits": 4}, (4, 8))
    tensors = {f"{NAME}_{part}": array for part, array in fill(name, like).items()}
    return Draft(
        name,
        what,
        tuple(rules.split()),
        lambda folder: write_file(folder / "input.safetensors", tensors, items, **keys),
        group="invalid",
        error=error,
        entries=tuple(items),
    )


def document(items: list[dict[str, Any]], **keys: Any) -> dict[str, Any]:
    """The JSON object of a manifest, whether or not it is a valid one."""
    return {"quant_method": METHOD, "version": VERSION, "entries": items, **keys}


def write_file(path: Path, tensors: Mapping[str, Array], items: list[dict[str, Any]] | None, **keys: Any) -> None:
    """A lone safetensors file, with the manifest in its header unless ``items`` is None."""
    metadata = {} if items is None else {checkpoint.KEY: json.dumps(document(items, **keys), separators=(",", ":"))}
    specs = {name: spec(name_of(array.dtype), array.shape) for name, array in tensors.items()}
    with ShardWriter(path, specs, metadata) as shard:
        for name, array in tensors.items():
            shard.put(name, array)


def make(draft: Draft, folder: Path) -> None:
    """Write all files of a case; what is expected comes from the reference decoder, unless the draft brings it."""
    folder.mkdir(parents=True)
    draft.write(folder)
    if draft.values is not None:
        write_file(folder / "expected.safetensors", {NAME: draft.values}, None)
    elif draft.group != "invalid":
        _expect(folder)
    facts: dict[str, Any] = {"what": draft.what, "group": draft.group, "rules": list(draft.rules)}
    facts |= {"error": draft.error} if draft.error else {}
    facts |= {"tolerance": draft.tolerance} if draft.tolerance else {}
    facts |= {"slices": list(draft.slices)} if draft.slices else {}
    facts |= {"entries": list(draft.entries)} if draft.entries else {}
    facts["sha256"] = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files_of(folder)
    }
    (folder / "case.json").write_text(json.dumps(facts, indent=1) + "\n")


def _expect(folder: Path) -> None:
    path = folder / "input.safetensors"
    opened = checkpoint.open(path if path.exists() else folder / "input")
    assert opened.manifest is not None
    names = (*opened, *opened.members, *opened.composed, *opened.manifest.aliases)
    write_file(folder / "expected.safetensors", {name: opened[name].decode() for name in names}, None)
    turned = {name: opened[name].decode(rotated=True) for name in names if opened[name].entry.rotation is not None}
    if turned:
        write_file(folder / "rotated.safetensors", turned, None)


def files_of(folder: Path) -> list[Path]:
    """Every file of a case but ``case.json``."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / "case.json")
