"""``verify``: everything that can be wrong with a qformat folder, each problem as the error that a reader would
raise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

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
    if source := opened.manifest.provenance.get("source"):
        counted = source["consumed"] + source["passed"] + len(source["left_out"])
        if source["tensors"] != counted:
            raise DamagedError(f"{source['tensors']} source tensors accounted for", str(counted), file=opened.path)


def _extra_parts(opened: Checkpoint) -> None:
    weights = set(opened)
    for name in opened.dense:
        for i, letter in enumerate(name):
            # no part is called bias, so that `experts.down_proj_bias` is a tensor of its own
            if letter == "_" and name[:i] in weights and name[i + 1 :] != "bias":
                raise DamagedError("no part that the layout lacks", name, file=opened.file_of(name), weight=name[:i])
