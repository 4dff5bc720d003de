"""``write``: a plan becomes a model folder: streamed, built beside the target and moved into place at the end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import qformat
from qformat import files, manifest, names, sources
from qformat.checkpoint import KEY, Checkpoint
from qformat.errors import DamagedError, UsageError
from qformat.shards import ShardWriter, Spec
from qformat.staging import Journal, staged

from .plan import Item, Plan

SHARD_BYTES = 5_000_000_000
SHARD_TENSORS = 200_000  # keeps headers far below the 100 MB that readers accept
Progress = Callable[[int, int, str], None]  # source bytes done, of how many, the weight just finished


class Written(NamedTuple):
    """How many items an interrupted run of the same job had left finished, see :mod:`qformat.staging`; the proof."""

    resumed: int
    proof: Any


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
    prove: Callable[[Path], Any] | None = None,
) -> Written:
    """Write ``plan``, made from ``source``, to the folder ``target``; ``coverage`` is what :func:`account` said of
    the import. The bytes depend on nothing else, and on no number of threads.

    ``packed``: with a manifest. ``prove`` is given the folder before it takes its place, and may raise. Raises
    :class:`UsageError` where the target exists and ``overwrite`` is not given, or where the source lies in it.
    """
    if target.resolve() in source.path.resolve().parents:
        raise UsageError("a target that does not hold the source", str(source.path), file=target)
    shards = _split(sorted(plan.items, key=lambda item: names.natural(item.name)), shard_bytes)
    specs = [_specs(shard) for shard in shards]
    config = _config(plan, coverage, packed, sources.origin(source.path))
    done = _Counter(source, progress)
    with staged(target, overwrite, _job(source, plan, specs, config)) as (folder, journal):
        weight_map: dict[str, str] = {}
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            for number, shard in enumerate(shards):
                name = files.SINGLE if len(shards) == 1 else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
                _write_shard(pool, folder / name, shard, specs[number], journal, done)
                weight_map |= dict.fromkeys(specs[number], name)
        if len(shards) > 1:
            total = sum(one.nbytes for shard in specs for one in shard.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / files.INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
        (folder / files.CONFIG).write_text(config, encoding="utf-8")
        if source.path.is_dir():
            _copy(source, folder)
        proof = prove(folder) if prove is not None else None
    return Written(done.kept, proof)


def _job(source: Checkpoint, plan: Plan, specs: Sequence[Mapping[str, Spec]], config: str) -> str:
    """All that the result depends on, as a checksum: the files that are read, how they were understood, what is to be
    written and by which version.
    """
    read = sorted({*source.weight_files, *source.path.glob("*.json")})
    found = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in read if path.is_file()]
    facts = [qformat.__version__, str(source.path.resolve()), found, plan.scheme, list(map(dict, specs)), config]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _write_shard(
    pool: ThreadPoolExecutor,
    path: Path,
    shard: Sequence[Item],
    specs: Mapping[str, Spec],
    journal: Journal,
    done: _Counter,
) -> None:
    """One file, its items made and put by the pool: no more of them are in memory than it has threads. Those of an
    interrupted run that are in the file stay.
    """
    with ShardWriter(path, specs, {"format": "pt"}, journal.done) as out:
        missing = [item for item in shard if not out.missing.isdisjoint(item.specs)]
        done.keep(item for item in shard if out.missing.isdisjoint(item.specs))

        def put(item: Item) -> dict[str, str]:
            return {tensor: out.put(tensor, array) for tensor, array in item.tensors().items()}

        made = [pool.submit(put, item) for item in missing]
        try:
            for item, sums in zip(missing, made, strict=True):
                journal.note(sums.result())
                done(item)
        finally:
            for future in made:
                future.cancel()
            wait(made)  # those at work write to a file that is still there


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


class _Counter:
    """Calls ``progress`` with the source bytes behind the finished items; counts those that were ``kept``."""

    def __init__(self, source: Checkpoint, progress: Progress | None) -> None:
        self._source, self._progress, self._done, self.kept = source, progress, 0, 0
        self._total = sum(tensor.nbytes for tensor in source.tensors.values())

    def keep(self, items: Iterable[Item]) -> None:
        for item in items:
            self.kept += 1
            self._done += self._nbytes(item)

    def _nbytes(self, item: Item) -> int:
        return sum(self._source.tensors[name].nbytes for name in item.consumes)

    def __call__(self, item: Item) -> None:
        self._done += self._nbytes(item)
        if self._progress is not None:
            self._progress(self._done, self._total, item.name)


def _config(plan: Plan, coverage: Mapping[str, Any], packed: bool, origin: str) -> str:
    """The text of config.json."""
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
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _copy(source: Checkpoint, folder: Path) -> None:
    for file in files.survey(source.path, source.weight_files):
        if file.fate == "copied":
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / file.name, folder / file.name)


def timed(started: float) -> float:
    """Seconds since ``started``, to the millisecond."""
    return round(time.perf_counter() - started, 3)
