"""What the settings of a GPTQ checkpoint say of each of its layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qformat.checkpoint import Checkpoint
from qformat.errors import DamagedError, UnsupportedError

from . import _common as common
from ._common import Settings

VERSIONS = {"gptq": 1, "gptq_v2": 2, "gptq_p": 2}  # checkpoint_format -> zeros are stored minus one, or as they are
MARLIN = "marlin"
_FLAG = ("true or false", lambda value: isinstance(value, bool))
ALLOWED: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "bits": ("from 2 to 8", lambda value: type(value) is int and 2 <= value <= 8),
    "group_size": ("-1 or above 0", lambda value: type(value) is int and (value == -1 or value > 0)),
    "sym": _FLAG,
    "desc_act": _FLAG,
    "static_groups": _FLAG,
}


@dataclass(frozen=True)
class Rules:
    """None where nothing is said. ``formats`` are the different (file, checkpoint_format) statements, in order."""

    where: str = "no settings"
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    desc_act: bool | None = None
    static_groups: bool | None = None
    formats: tuple[tuple[str, str], ...] = ()
    by_gptqmodel: bool = False
    dynamic: tuple[tuple[re.Pattern[str], Mapping[str, Any] | None], ...] = ()  # None: left dense

    @property
    def format(self) -> str | None:
        return self.formats[0][1] if self.formats else None

    def of(self, module: str) -> Rules:
        """For one layer: the first pattern of ``dynamic`` that its name begins with changes what it sets."""
        overrides = self.override(module)
        if not overrides:
            return self
        return replace(self, where=f"{self.where}, dynamic", **overrides)

    def override(self, module: str) -> Mapping[str, Any] | None:
        return next((found for pattern, found in self.dynamic if pattern.match(module)), {})


def read(source: Checkpoint, found: Sequence[Settings]) -> Rules:
    """Raises :class:`DamagedError` for settings that contradict each other or are of a wrong type,
    :class:`UnsupportedError` for forms that are not meant for exchange.
    """
    common.agreed(source, found, "quant_method", "method")
    pack = common.agreed(source, found, "pack_dtype")
    if pack not in (None, "int32"):
        raise UnsupportedError("pack_dtype int32", repr(pack), file=source.path)
    rules = Rules(
        where=found[0].file if found else Rules.where,
        formats=_formats(found),
        by_gptqmodel=written_by_gptqmodel(found),
        dynamic=dynamic_of(source, common.agreed(source, found, "dynamic")),
        **checked(source, {key: common.agreed(source, found, key) for key in ALLOWED}),
    )
    if len(rules.formats) > 1 and any(form == MARLIN for _, form in rules.formats):
        raise conflict(source, rules, "")
    if rules.format not in (None, MARLIN, *VERSIONS):
        expected = f"checkpoint_format {', '.join(VERSIONS)} or {MARLIN}"
        raise UnsupportedError(expected, repr(rules.format), file=source.path)
    return rules


def conflict(source: Checkpoint, rules: Rules, evidence: str) -> DamagedError:
    """The error for a checkpoint_format that two places state differently; ``evidence``: what the data says."""
    (first, believed), (second, other) = rules.formats[:2]
    expected = f"checkpoint_format {believed!r}, as {first} says"
    hint = "remove the one that is wrong"
    return DamagedError(expected, f"{other!r} in {second}{evidence}", file=source.folder / second, hint=hint)


def checked(source: Checkpoint, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``values`` that a layer's rules hold, checked."""
    out = {key: value for key, value in values.items() if key in ALLOWED and value is not None}
    for key, value in out.items():
        expected, allowed = ALLOWED[key]
        if not allowed(value):
            raise DamagedError(f"{key} {expected}", repr(value), file=source.path)
    return out


def _formats(found: Sequence[Settings]) -> tuple[tuple[str, str], ...]:
    out: dict[str, str] = {}
    for file, values in found:
        stated = [str(values[key]).lower() for key in ("checkpoint_format", "format") if values.get(key) is not None]
        for form in [MARLIN] if values.get("is_marlin_format") and not stated else stated:
            out.setdefault(form, file)
    return tuple((file, form) for form, file in out.items())


def written_by_gptqmodel(found: Sequence[Settings]) -> bool:
    for _, values in found:
        meta = values.get("meta")
        if isinstance(meta, Mapping) and "gptqmodel" in str(meta.get("quantizer")).lower():
            return True
    return False


def dynamic_of(source: Checkpoint, dynamic: Any) -> tuple[tuple[re.Pattern[str], Mapping[str, Any] | None], ...]:
    if dynamic is None or dynamic is False:
        return ()
    if not isinstance(dynamic, Mapping) or not all(isinstance(one, Mapping) for one in dynamic.values()):
        raise DamagedError("dynamic from patterns to settings", type(dynamic).__name__, file=source.path)
    out = []
    for key, overrides in dynamic.items():
        sign, text = (key[:2], key[2:]) if key[:2] in ("-:", "+:") else ("+:", key)
        # a pattern from a file must not take for ever: no repeated groups, few repeats
        if len(text) > 1000 or re.search(r"\)[*+{]", text) or len(re.findall(r"[*+{]", text)) > 4:
            raise UnsupportedError("dynamic patterns with few repeats", repr(key), file=source.path)
        try:
            pattern = re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise DamagedError("dynamic with regular expressions", f"{key!r}: {error}", file=source.path) from None
        out.append((pattern, None if sign == "-:" else checked(source, overrides)))
    return tuple(out)
