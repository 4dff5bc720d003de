"""``write``: a plan becomes a model folder: streamed, built beside the target and moved into place at the end."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import qformat
from qformat import files, manifest, names, sources
from qformat.checkpoint import KEY, Checkpoint
from qformat.dtypes import Array
from qformat.errors import DamagedError, UsageError
from qformat.shards import ShardWriter, Spec
from qformat.staging import staged

from .plan import Item, Plan

SHARD_BYTES = 5_000_000_000
SHARD_TENSORS = 200_000  # keeps headers far below the 100 MB that readers accept
Progress = Callable[[int, int, str], None]  # source bytes done, of how many, the weight just finished


def write(
    source: Checkpoint,
    plan: Plan,
    target: Path,
    coverage: Mapping[str, Any],
    *,
    packed: bool,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write ``plan``, made from ``source``, to the folder ``target``; ``coverage`` is what :func:`account` said of
    the import.

    ``packed``: with a manifest. Raises :class:`UsageError` where the target exists and ``overwrite`` is not given, or
    where the source lies in it.
    """
    if target.resolve() in source.path.resolve().parents:
        raise UsageError("a target that does not hold the source", str(source.path), file=target)
    items = sorted(plan.items, key=lambda item: names.natural(item.name))
    with staged(target, overwrite) as folder:
        shards = _split(items, shard_bytes)
        metadata = {"format": "pt"}
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            weight_map, total = {}, 0
            done = _Counter(source, progress)
            for number, shard in enumerate(shards, 1):
                name = files.SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
                specs = _specs(shard)
                with ShardWriter(folder / name, specs, metadata) as out:
                    for item, tensors in _made(pool, shard):
                        for tensor, array in tensors.items():
                            out.put(tensor, array)
                        done(item)
                weight_map |= dict.fromkeys(specs, name)
                total += sum(one.nbytes for one in specs.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / files.INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
        _write_config(folder, plan, coverage, packed, sources.origin(source.path))
        if source.path.is_dir():
            _copy(source, folder)


def account(source: Checkpoint, plan: Plan) -> dict[str, Any]:
    """``{tensors, consumed, passed, left_out}``; :class:`DamagedError` unless every source tensor has exactly one
    end.
    """
    ends: dict[str, str] = dict.fromkeys(plan.left_out, "left out")
    consumed = 0
    for item in plan.items:
        consumed += len(item.consumes) if item.entry is not None else 0
        for name in item.consumes:
            if name in ends:
                raise DamagedError("every source tensor used once", "twice", file=source.path, weight=name)
            ends[name] = item.name
    if ends.keys() != source.tensors.keys():
        name = min(source.tensors.keys() ^ ends.keys())
        raise DamagedError("a place for every source tensor", "none", file=source.path, weight=name)
    left_out = sorted(plan.left_out, key=names.natural)
    count = len(source.tensors)
    return {"tensors": count, "consumed": consumed, "passed": count - consumed - len(left_out), "left_out": left_out}


def _split(items: Sequence[Item], shard_bytes: int) -> list[list[Item]]:
    """Items to shards by size, a weight's parts together."""
    shards: list[list[Item]] = [[]]
    size = tensors = 0
    for item in items:
        specs = item.specs
        nbytes = sum(one.nbytes for one in specs.values())
        if shards[-1] and (size + nbytes > shard_bytes or tensors + len(specs) > SHARD_TENSORS):
            shards.append([])
            size = tensors = 0
        shards[-1].append(item)
        size, tensors = size + nbytes, tensors + len(specs)
    return shards


def _specs(items: Iterable[Item]) -> dict[str, Spec]:
    specs: dict[str, Spec] = {}
    for item in items:
        for name, one in item.specs.items():
            if name in specs:
                raise DamagedError("part names that no other tensor has", name, weight=item.name)
            specs[name] = one
    return specs


def _made(pool: ThreadPoolExecutor, items: Iterable[Item]) -> Iterator[tuple[Item, Mapping[str, Array]]]:
    """Items made in the pool, in order, a few ahead of the writer and no more: memory stays bounded by those."""
    ahead = pool._max_workers + 1
    waiting: deque[tuple[Item, Future[dict[str, Array]]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(item.tensors)))
            if len(waiting) == ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


class _Counter:
    """Calls ``progress`` with the source bytes behind the finished items."""

    def __init__(self, source: Checkpoint, progress: Progress | None) -> None:
        self._source, self._progress, self._done = source, progress, 0
        self._total = sum(tensor.nbytes for tensor in source.tensors.values())

    def __call__(self, item: Item) -> None:
        self._done += sum(self._source.tensors[name].nbytes for name in item.consumes)
        if self._progress is not None:
            self._progress(self._done, self._total, item.name)


def _write_config(folder: Path, plan: Plan, coverage: Mapping[str, Any], packed: bool, origin: str) -> None:
    config = dict(plan.config)
    if packed:
        provenance = {"tool": f"qformat {qformat.__version__}", "scheme": plan.scheme, "source": coverage}
        if origin:
            provenance["origin"] = origin
        if plan.settings is not None:
            provenance["settings"] = plan.settings
        entries = manifest.group((item.name, item.entry) for item in plan.items if item.entry is not None)
        config[KEY] = manifest.write(
            manifest.Manifest(
                entries=entries,
                aliases=plan.aliases,
                activations=plan.activations,
                kv_cache=plan.kv_cache,
                provenance=provenance,
                extra=plan.extra,
            )
        )
    (folder / files.CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy(source: Checkpoint, folder: Path) -> None:
    for file in files.survey(source.path, source.weight_files):
        if file.fate == "copied":
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / file.name, folder / file.name)


def timed(started: float) -> float:
    """Seconds since ``started``, to the millisecond."""
    return round(time.perf_counter() - started, 3)
