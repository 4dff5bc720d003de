"""JSON objects with a fixed set of typed keys: the manifest's entries and every codec's params are ``Record`` types."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from .errors import DamagedError

R = TypeVar("R", bound="Record")
MAX_DEPTH = 64  # of JSON values inside one another: what is read here can be written again


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Immutable, checked when read: unknown keys, wrong types and values out of range are errors."""


def read_record(kind: type[R], data: Mapping[str, Any]) -> R:
    """``data`` as a ``kind``; :class:`DamagedError` names the key at fault."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise _as_damage(str(error), data) from None


def _as_damage(problem: str, data: Any) -> DamagedError:
    """msgspec's message, ``Expected `int` <= 8 - at `$.bits```, as what was expected and what was found."""
    what, _, place = problem.partition(" - at ")
    place = f" at {place}" if place else ""
    if unknown := re.fullmatch(r"Object contains unknown field (`.*`)", what, re.DOTALL):
        return DamagedError(f"known keys{place}", unknown[1])
    if missing := re.fullmatch(r"Object missing required field (`.*`)", what, re.DOTALL):
        return DamagedError(f"key {missing[1]}{place}", "none")
    if invalid := re.fullmatch(r"Invalid enum value (.*)", what, re.DOTALL):
        return DamagedError(f"a known value{place}", invalid[1])
    expected, _, found = what.removeprefix("Expected ").partition(", got ")
    if not found:
        for step in re.findall(r"\.(\w+)|\[(\d+)\]", place):
            data = data[step[0]] if step[0] else data[int(step[1])]
        found = repr(data)
    return DamagedError(f"{expected}{place}", found)


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
        text = text if isinstance(text, str) else text.decode()
        value = json.loads(text, object_pairs_hook=unique)
        if "\\ud" in text or "\\uD" in text:  # an escaped half of a pair alone is no text that could be written
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DamagedError("JSON", str(error)) from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for parent in level for item in _items(parent) if isinstance(item, (dict, list))]
        if not level:
            return value
    raise DamagedError(f"JSON of at most {MAX_DEPTH} levels", "more")


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
