"""``verify``: everything that can be wrong with a qformat folder, each problem as the error that a reader would
raise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .checkpoint import Checkpoint
from .errors import DamagedError, QformatError


def verify(opened: Checkpoint) -> list[QformatError]:
    """The problems of an opened qformat checkpoint: layouts, values, checksums, counts. Empty: it is sound."""
    checks: list[Callable[[], object]] = [
        lambda: opened.packed_tensors,
        lambda: _counts(opened),
        lambda: _extra_parts(opened),
    ]
    checks += [lambda shard=shard: shard.check() for shard in opened.shards]  # type: ignore[misc]
    checks += [lambda name=name: opened[name].check() for name in opened]  # type: ignore[misc]
    checks += [
        lambda alias=alias: _alias(opened, alias) for alias in (opened.manifest.aliases if opened.manifest else ())
    ]  # type: ignore[misc]
    return list(problems(checks))


def problems(checks: list[Callable[[], object]]) -> Iterator[QformatError]:
    """Run every check, in threads; yield what they raise, in their order, each once."""

    def run(check: Callable[[], object]) -> QformatError | None:
        try:
            check()
        except QformatError as error:
            return error
        return None

    seen = set()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for error in pool.map(run, checks):
            if error is not None and str(error) not in seen:
                seen.add(str(error))
                yield error


def _counts(opened: Checkpoint) -> None:
    assert opened.manifest is not None
    source: Any = opened.manifest.provenance.get("source")
    if source is None:
        return
    try:
        counted = source["consumed"] + source["passed"] + len(source["left_out"])
        fits = source["tensors"] == counted
    except (TypeError, KeyError):
        raise DamagedError("provenance.source with tensors, consumed, passed, left_out", file=opened.path) from None
    if not fits:
        raise DamagedError(f"{source['tensors']} source tensors accounted for", str(counted), file=opened.path)


def _extra_parts(opened: Checkpoint) -> None:
    packed = opened.packed_tensors
    for name in opened.dense:
        for weight in opened:
            if name.startswith(f"{weight}_") and name not in packed:
                raise DamagedError("no part that the layout lacks", name, file=opened.file_of(name), weight=weight)


def _alias(opened: Checkpoint, alias: str) -> None:
    assert opened.manifest is not None
    target = opened.manifest.aliases[alias]
    if target not in opened or alias in opened.tensors:
        raise DamagedError(f"an alias of a packed weight, stored once: {alias}", target, file=opened.path)
