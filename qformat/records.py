"""JSON objects with a fixed set of typed keys: the manifest's entries and every codec's params are ``Record`` types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from .errors import DamagedError

R = TypeVar("R", bound="Record")


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Immutable, checked when read: unknown keys, wrong types and values out of range are errors."""


def read_record(kind: type[R], data: Mapping[str, Any]) -> R:
    """``data`` as a ``kind``; :class:`DamagedError` names the key at fault."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at ")
        raise DamagedError(f"{problem}{f' at {place}' if place else ''}") from None


def write_record(record: Record) -> dict[str, Any]:
    """The JSON object of a record, keys at their default left out."""
    return msgspec.to_builtins(record)  # type: ignore[no-any-return]


def read_json(text: str | bytes) -> Any:
    """JSON as Python reads it (a bare ``Infinity`` occurs in the wild), but a key that stands twice is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            keys = [key for key, _ in pairs]
            raise DamagedError("every JSON key once", f"{max(keys, key=keys.count)!r} twice")
        return out

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DamagedError("JSON", str(error)) from None
