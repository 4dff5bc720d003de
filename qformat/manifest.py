"""The manifest: ``config.json["quantization_config"]``, what says how each weight is packed. Page:
``spec/README.md``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from . import codecs, names
from .errors import DamagedError, UnsupportedError
from .records import Record, read_record, write_record
from .rotation import Rotation

VERSION = "0.1"
METHOD = "qformat"
Label = Literal["bit-exact", "value-exact", "rounded", "requantized", "quantized"]
Size = Annotated[int, Meta(ge=1, le=1 << 40)]
Term = dict[str, Any]


class Piece(Record, frozen=True, kw_only=True):
    """Weights of the model whose ``rows``, along the first axis, are a piece of a stored weight; one for each weight of
    the entry.
    """

    weights: Annotated[tuple[str, ...], Meta(min_length=1)]
    rows: Size


class Stored(Record, frozen=True, kw_only=True):
    """Stored weights that are a piece of the model's, with entries of their own; one for each weight of the entry."""

    weights: Annotated[tuple[str, ...], Meta(min_length=1)]


class Entry(Record, frozen=True, kw_only=True):
    """What all weights of one shape, packed alike, share.

    ``stack`` leading axes of ``shape`` number matrices; the next axis is out, all further ones together are in.
    ``transposed``: the model holds the last two axes the other way round than the codecs see them. ``concat``: the
    weights of the model that lie in this one, one below another. ``pieces``, in place of ``terms``: the stored weights
    that make up this one, one after another along ``axis``.
    """

    weights: Annotated[tuple[str, ...], Meta(min_length=1)]
    shape: Annotated[tuple[Size, ...], Meta(min_length=2, max_length=8)]
    dtype: Literal["float16", "bfloat16", "float32"]
    terms: Annotated[tuple[Term, ...], Meta(max_length=16)] = ()
    label: Label = "quantized"
    stack: Annotated[int, Meta(ge=0, le=4)] = 0
    stored_shape: Annotated[tuple[Size, ...], Meta(min_length=2, max_length=8)] | None = None
    transposed: bool = False
    concat: Annotated[tuple[Piece, ...], Meta(max_length=256)] = ()
    axis: Annotated[int, Meta(ge=0, le=7)] = 0
    pieces: Annotated[tuple[Stored, ...], Meta(max_length=4096)] = ()
    sum_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        if self.rotation is not None and not self.rotation.sides():
            msgspec.structs.force_setattr(self, "rotation", None)  # a rotation without sides is none
        if bool(self.terms) == bool(self.pieces):
            raise DamagedError("terms or pieces", "both" if self.terms else "none")
        if over := sorted(write_record(self).keys() - (_STORED if self.terms else _COMPOSED)):
            raise DamagedError(f"other keys for an entry with {'terms' if self.terms else 'pieces'}", ", ".join(over))
        if self.pieces and self.axis >= len(self.shape):
            raise DamagedError(f"an axis below {len(self.shape)}", str(self.axis))
        if len(self.shape) < self.stack + 2:
            raise DamagedError(f"a shape with {self.stack} leading axes before out and in", str(list(self.shape)))
        if self.transposed and len(self.shape) != self.stack + 2:
            raise DamagedError("transposed weights with one axis in", str(list(self.shape)))
        if self.concat and sum(piece.rows for piece in self.concat) != self.shape[0]:
            raise DamagedError(f"pieces of {self.shape[0]} rows together", str([piece.rows for piece in self.concat]))
        stored = self.stored_shape
        if stored is not None:
            small = len(stored) == len(self.shape) and all(a >= b for a, b in zip(stored, self.shape, strict=True))
            if not small or stored[: self.stack] != self.shape[: self.stack] or len(self.shape) != self.stack + 2:
                raise DamagedError(f"a stored_shape that pads {list(self.shape)}", str(list(stored)))


_COMPOSED = {"weights", "shape", "dtype", "axis", "pieces"}  # keys of an entry with pieces
_STORED = {*Entry.__struct_fields__} - {"axis", "pieces"}


class Rows(NamedTuple):
    """Where a weight of the model lies in a stored one, along the first axis."""

    weight: str
    start: int
    stop: int


class Source(Record, frozen=True, kw_only=True):
    """``provenance.source``: where the tensors of the source went."""

    tensors: Annotated[int, Meta(ge=0)]
    consumed: Annotated[int, Meta(ge=0)]
    passed: Annotated[int, Meta(ge=0)]
    left_out: tuple[str, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Entries, true ties, and what is kept for others. ``extra`` holds top-level keys that this version does not
    know.
    """

    entries: tuple[Entry, ...]
    aliases: dict[str, str] = {}
    activations: Any = None
    kv_cache: Any = None
    provenance: dict[str, Any] = {}
    extra: dict[str, Any] = {}

    def names(self, limit: int) -> dict[str, Entry]:
        """Weight name -> entry, with what lies in that weight or makes it up alone; :class:`DamagedError` for more than
        ``limit`` names of stored weights, or of others, or one that stands twice.
        """
        out: dict[str, Entry] = {}
        left = {True: limit, False: limit}
        for entry in self.entries:
            stored = bool(entry.terms)
            found = names.expand(entry.weights, left[stored])
            left[stored] -= len(found)
            for name, own in zip(found, _single(entry, found), strict=True):
                if name in out:
                    raise DamagedError("every weight in one entry", "in two", weight=name)
                out[name] = own
        return out


def _single(entry: Entry, weights: list[str]) -> list[Entry]:
    """The entry of each of ``weights``."""
    if not (key := _related(entry)):
        return [entry] * len(weights)
    related = getattr(entry, key)
    found = [names.expand(piece.weights, len(weights)) for piece in related]
    for some in found:
        if len(some) != len(weights):
            raise DamagedError(f"{len(weights)} weights in each piece", str(len(some)), weight=weights[0])
    return [_with(entry, key, [(name,) for name in one]) for one in zip(*found, strict=True)]


def _related(entry: Entry) -> str:
    """The key under which an entry names other weights; empty for none."""
    return "concat" if entry.concat else "pieces" if entry.pieces else ""


def _with(entry: Entry, key: str, weights: Iterable[tuple[str, ...]]) -> Entry:
    """The entry with other names in each piece under ``key``."""
    pieces = zip(getattr(entry, key), weights, strict=True)
    new = tuple(msgspec.structs.replace(piece, weights=own) for piece, own in pieces)
    return msgspec.structs.replace(entry, **{key: new})


def members(entries: Mapping[str, Entry]) -> dict[str, Rows]:
    """The model's weights that lie in stored ones -> where; ``entries`` are those of :meth:`Manifest.names`."""
    out: dict[str, Rows] = {}
    for weight, entry in entries.items():
        start = 0
        for piece in entry.concat:
            (name,) = piece.weights
            if name in out or name in entries:
                raise DamagedError("every weight once", "twice", weight=name)
            out[name] = Rows(weight, start, start + piece.rows)
            start += piece.rows
    return out


def composed(entries: Mapping[str, Entry]) -> dict[str, tuple[str, ...]]:
    """The model's weights that are stored as several -> these, in order; ``entries`` as in :func:`members`."""
    out: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for weight, entry in entries.items():
        stored = tuple(piece.weights[0] for piece in entry.pieces)
        for name in stored:
            if name in taken or name not in entries or entries[name].pieces or entries[name].concat:
                raise DamagedError("a piece that is stored, for one weight", repr(name), weight=weight)
            taken.add(name)
        if stored:
            _check_shapes(weight, entry, [entries[name].shape for name in stored])
            out[weight] = stored
    return out


def _check_shapes(weight: str, entry: Entry, shapes: list[tuple[int, ...]]) -> None:
    axis, (*rest,) = entry.axis, entry.shape
    size = rest.pop(axis)
    for number, shape in enumerate(shapes):
        if len(shape) != len(entry.shape) or [*shape[:axis], *shape[axis + 1 :]] != rest:
            wanted = f"pieces that differ from {list(entry.shape)} along axis {axis} alone"
            raise DamagedError(wanted, f"{list(shape)} for piece {number}", weight=weight)
    if sum(shape[axis] for shape in shapes) != size:
        found = str([shape[axis] for shape in shapes[:8]])
        raise DamagedError(f"pieces of {size} together along axis {axis}", found, weight=weight)


_KNOWN = ("quant_method", "version", "entries", "aliases", "activations", "kv_cache", "provenance")


def read(data: Any) -> Manifest:
    """The JSON object of a manifest, checked down to every codec's params.

    Raises :class:`UnsupportedError` for another version or an unknown codec, :class:`DamagedError` for the rest.
    """
    if not isinstance(data, Mapping) or data.get("quant_method") != METHOD:
        raise DamagedError(
            f'quant_method "{METHOD}"', repr(data.get("quant_method") if isinstance(data, Mapping) else data)
        )
    if data.get("version") != VERSION:
        raise UnsupportedError(
            f"format version {VERSION}", repr(data.get("version")), hint="another qformat may read it"
        )
    if not isinstance(data.get("entries"), list):
        raise DamagedError("a list of entries", type(data.get("entries")).__name__)
    entries = tuple(_entry(item) for item in data["entries"])
    for key, kind in (("aliases", Mapping), ("provenance", Mapping)):
        if not isinstance(data.get(key, {}), kind):
            raise DamagedError(f"{key} as an object", type(data[key]).__name__)
    aliases = dict(data.get("aliases", {}))
    for alias, name in aliases.items():
        if not isinstance(name, str):
            raise DamagedError("an alias of a weight's name", repr(name), weight=alias)
    if "source" in (provenance := dict(data.get("provenance", {}))):
        if not isinstance(provenance["source"], Mapping):
            raise DamagedError("provenance.source as an object", repr(provenance["source"]))
        read_record(Source, provenance["source"])
    return Manifest(
        entries=entries,
        aliases=aliases,
        activations=data.get("activations"),
        kv_cache=data.get("kv_cache"),
        provenance=provenance,
        extra={key: value for key, value in data.items() if key not in _KNOWN},
    )


def _entry(item: Any) -> Entry:
    if not isinstance(item, Mapping):
        raise DamagedError("an entry as an object", type(item).__name__)
    first = str(item["weights"][0]) if isinstance(item.get("weights"), list) and item["weights"] else ""
    try:
        entry = read_record(Entry, item)
        if entry.terms and all([read_term(term)[2] for term in entry.terms]):
            raise DamagedError("a term inside the rotation", "none")
    except (DamagedError, UnsupportedError) as error:
        raise error.located(weight=first) from None
    return entry


def read_term(term: Term) -> tuple[codecs.Codec, Record, bool]:
    """A term as JSON -> codec, params, whether it is added outside the rotation."""
    outside = term.get("outside", False)
    if not isinstance(outside, bool):
        raise DamagedError("outside true or false", repr(outside))
    codec, params = codecs.read_params({key: value for key, value in term.items() if key != "outside"})
    return codec, params, outside


def write(manifest: Manifest) -> dict[str, Any]:
    """The JSON object; entries in the natural order of their first weight."""
    entries = sorted((write_record(entry) for entry in manifest.entries), key=lambda e: names.natural(e["weights"][0]))
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "entries": entries,
        **({"aliases": manifest.aliases} if manifest.aliases else {}),
        "activations": manifest.activations,
        **({"kv_cache": manifest.kv_cache} if manifest.kv_cache is not None else {}),
        "provenance": manifest.provenance,
        **manifest.extra,
    }


def group(weights: Iterable[tuple[str, Entry]]) -> tuple[Entry, ...]:
    """Entries of single weights -> one entry for all that are alike but for the names."""
    alike: dict[str, dict[str, Entry]] = {}
    for name, entry in weights:
        plain = write_record(entry)
        del plain["weights"]
        if key := _related(entry):
            plain[key] = [{**write_record(piece), "weights": []} for piece in getattr(entry, key)]
        alike.setdefault(json.dumps(plain, sort_keys=True), {})[name] = entry
    return tuple(map(_shared, alike.values()))


def _shared(alike: Mapping[str, Entry]) -> Entry:
    """The entry of weights that differ in their names alone; pieces are listed in the order of the weights."""
    first = msgspec.structs.replace(next(iter(alike.values())), weights=tuple(names.compress(alike)))
    if not (key := _related(first)):
        return first
    order = names.expand(first.weights, len(alike))
    pieces = []
    for i in range(len(getattr(first, key))):
        found = [getattr(alike[name], key)[i].weights[0] for name in order]
        short = names.compress(found)
        pieces.append(tuple(short if names.expand(short, len(found)) == found else found))
    return _with(first, key, pieces)


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the manifest, made from the types; ``spec/manifest.schema.json`` is this."""
    kinds = [Entry, *(codecs.get(name).Params for name in codecs.NAMES)]
    (entry, *params), components = msgspec.json.schema_components(kinds, ref_template="#/$defs/{name}")
    definitions = dict(components)
    terms = []
    for name, reference in zip(codecs.NAMES, params, strict=True):
        term = _inline(reference, definitions)
        term = {**term, "title": f"a term of codec {name}"}
        term["properties"] = {
            "codec": {"const": name},
            "outside": {"type": "boolean", "default": False},
            **term["properties"],
        }
        term["required"] = ["codec", *term.get("required", [])]
        terms.append(term)
    record = _inline(entry, definitions)
    record["oneOf"] = [{"required": [key], "properties": {key: {"minItems": 1}}} for key in ("terms", "pieces")]
    record["properties"]["terms"]["items"] = {"oneOf": terms}
    any_object = {"type": "object"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"qformat manifest, version {VERSION}",
        "type": "object",
        "properties": {
            "quant_method": {"const": METHOD},
            "version": {"const": VERSION},
            "entries": {"type": "array", "items": record},
            "aliases": {"type": "object", "additionalProperties": {"type": "string"}},
            "activations": {},
            "kv_cache": {},
            "provenance": any_object,
        },
        "required": ["quant_method", "version", "entries"],
        "$defs": {key: value for key, value in definitions.items() if not key.endswith("Params") and key != "Entry"},
    }


def _inline(reference: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    found = json.loads(json.dumps(definitions[reference["$ref"].rpartition("/")[2]]))
    return dict(found)
