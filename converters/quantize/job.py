"""``quantize``: a dense model -> a packed one, weight by weight."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qformat import checkpoint, codecs, sources
from qformat.checkpoint import Checkpoint
from qformat.dtypes import Array
from qformat.errors import QformatError, UsageError

from .. import report
from ..importers import read
from ..plan import Item, Plan
from ..write import Progress, account, timed, write
from .select import TRANSPOSED_EXPERTS, select
from .weight import Rotate, entry_of, pack

ROTATED = ("e8p", "trellis")  # codecs that are made for Gaussian weights: rotated unless told otherwise


def quantize(
    source: str | Path,
    target: str | Path,
    *,
    codec: str,
    bits: float,
    settings: Mapping[str, Any] | None = None,
    rotate: str | int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pack the linear and expert matrices of a dense model with one codec. ``settings`` override the preset's params;
    ``rotate``: hadamard, none, or the size of Hadamard blocks on both sides, which weights are padded to.

    Returns the report that ``qformat quantize --json`` prints.
    """
    opened = sources.open(source)
    files = [file._asdict() for file in opened.files()]
    dense, found, _ = read(opened)
    if found != "dense":
        raise UsageError(
            "a dense model", found, file=opened.path, hint="`qformat convert SRC DST --to dense` makes one"
        )
    turn = _rotate(rotate, codec)
    terms = codecs.preset(codec, bits, turn != "none", settings or {})
    for term in terms:
        codecs.read_params(term)
    chosen = select(opened, include, exclude)
    if not chosen:
        raise UsageError("weights to pack", "none", file=opened.path, hint="--include takes globs of tensor names")
    plan = _plan(opened, dense, set(chosen), terms, turn)
    started = time.perf_counter()
    coverage = account(opened, plan)
    written = write(opened, plan, Path(target), coverage, packed=True, overwrite=overwrite, progress=progress)
    seconds = timed(started)
    return {
        **report.summary(checkpoint.open(target), coverage),
        "terms": list(terms),
        "rotate": turn,
        "notes": list(dense.notes),
        "files": files,
        "resumed": written.resumed,
        "seconds": seconds,
    }


def _rotate(asked: str | int | None, codec: str) -> Rotate:
    if asked is None:
        return "hadamard" if codec in ROTATED else "none"
    if asked == "hadamard" or asked == "none":
        return asked  # type: ignore[return-value]
    if not str(asked).isdecimal() or not 0 < int(asked) <= 1 << 16:
        raise UsageError("--rotate hadamard, none or a size", str(asked))
    return int(asked)


def _plan(
    source: Checkpoint, dense: Plan, chosen: set[str], terms: Sequence[Mapping[str, Any]], rotate: Rotate
) -> Plan:
    transposed = source.config.get("model_type") in TRANSPOSED_EXPERTS
    items = []
    for item in dense.items:
        if item.name not in chosen:
            items.append(item)
            continue
        tensor = source.tensors[item.name]
        fused = len(tensor.shape) - 2
        dtype = tensor.dtype if tensor.dtype != "float64" else "float32"
        entry = entry_of(
            item.name, tensor.shape, dtype, terms, rotate, stack=fused, transposed=bool(fused and transposed)
        )
        items.append(_packed(source, item, entry))
    return replace(dense, items=tuple(items))


def _packed(source: Checkpoint, item: Item, entry: Any) -> Item:
    def make() -> Mapping[str, Array]:
        try:
            return pack(entry, source.array(item.name)).parts
        except QformatError as error:
            raise error.located(file=source.file_of(item.name), weight=item.name) from None

    return replace(item, entry=entry, dense=None, make=make)
