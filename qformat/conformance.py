"""``conformance``: hold decoders against the vectors of the specification. Page: ``spec/vectors/README.md``."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np

from . import checkpoint, codecs, tables
from .checkpoint import Checkpoint
from .dtypes import Array
from .errors import DamagedError, QformatError, UnsupportedError
from .records import Record, read_json, read_record
from .shards import Shard
from .weight import PackedWeight

ERRORS: dict[str, type[QformatError]] = {"damaged": DamagedError, "unsupported": UnsupportedError}
REFERENCE = "reference"

# (weight, rotated) -> float32 values as `PackedWeight.decode` gives them, or None: no decoder for this one
Decode = Callable[[PackedWeight, bool], Array | None]


class Slice(Record, frozen=True, kw_only=True):
    """A cut of the only weight of a case, or of the one in pieces; ``error`` where the packing has no cut there."""

    axis: int
    start: int
    stop: int
    error: Literal["unsupported"] | None = None


class Facts(Record, frozen=True, kw_only=True):
    """``case.json``. ``entries`` repeats those of the manifest, for readers; ``sha256`` is that of each file."""

    what: str
    group: Literal["valid", "optional", "invalid"]
    rules: tuple[str, ...]
    entries: tuple[dict[str, Any], ...] = ()
    error: Literal["damaged", "unsupported"] | None = None
    tolerance: float = 0
    slices: tuple[Slice, ...] = ()
    sha256: dict[str, str]


class Case(NamedTuple):
    name: str
    folder: Path
    facts: Facts

    @property
    def input(self) -> Path:
        """A lone safetensors file, or a model folder."""
        file = self.folder / "input.safetensors"
        return file if file.exists() else self.folder / "input"

    def expected(self, weight: str, rotated: bool = False) -> Array:
        """float32, as :meth:`PackedWeight.decode` must give it."""
        return Shard(self.folder / ("rotated.safetensors" if rotated else "expected.safetensors")).array(weight)

    @property
    def codec(self) -> str:
        """Empty where a case is about the format around the codecs."""
        kind = self.name.partition("/")[0]
        return kind if kind in codecs.NAMES else ""

    @property
    def terms(self) -> set[str]:
        """The codecs of all terms, those of packed parts too."""
        return set(_codecs(self.facts.entries))


def _codecs(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("codec"), str):
            yield value["codec"]
        value = [*value.values()]
    for item in value if isinstance(value, (list, tuple)) else ():
        yield from _codecs(item)


class Row(TypedDict):
    case: str
    codec: str
    decoder: str
    result: str
    problem: str


def find(root: Path | None = None) -> list[Case]:
    """The cases in ``root``, by default all that come with the specification."""
    root = root or tables.resource("spec/vectors")
    paths = sorted(root.glob("*/*/case.json"))
    return [
        Case(path.parent.relative_to(root).as_posix(), path.parent, read_record(Facts, read_json(path.read_bytes())))
        for path in paths
    ]


def run(decoders: Mapping[str, Decode] | None = None, cases: Iterable[Case] | None = None) -> list[Row]:
    """A row for every case and decoder; ``result`` is ``passed``, ``failed`` or ``skipped``, ``problem`` says why.

    ``decoders`` is by default the reference decoder alone. What reading refuses before a decoder sees it is a row for
    the reference, and skipped for the others.
    """
    rows = []
    for case in find() if cases is None else cases:
        weights, refusal = _open(case)
        for name, decode in (decoders or {REFERENCE: PackedWeight.decode}).items():
            if refusal is None:
                result, problem = _judge(case, partial(_decode, case, weights, decode))
            elif name == REFERENCE:
                result, problem = _refused(case, refusal)
            else:
                result, problem = "skipped", "refused when it is read"
            rows.append(Row(case=case.name, codec=case.codec, decoder=name, result=result, problem=problem))
    return rows


def run_command(command: Sequence[str], cases: Iterable[Case] | None = None, seconds: float = 60) -> list[Row]:
    """The same for any program: ``COMMAND... INPUT OUTPUT`` decodes every weight of INPUT into float32 tensors of its
    name in OUTPUT, a safetensors file or a folder with one, or ends with 3 (damaged) or 4 (unsupported).

    A codec of which it decodes no case is one that it lacks: a 4 there is ``skipped``, and elsewhere it is judged.
    """
    cases = find() if cases is None else list(cases)
    rows: list[Row] = []
    refused, decoded = set[str](), set[str]()  # cases; codecs

    def job(case: Case) -> str:
        try:
            differs = _run_one(command, case, seconds)
        except UnsupportedError:
            refused.add(case.name)
            raise
        decoded.update(case.terms)
        return differs

    for case in cases:
        result, problem = _judge(case, partial(job, case))
        rows.append(Row(case=case.name, codec=case.codec, decoder="command", result=result, problem=problem))
    for case, row in zip(cases, rows, strict=True):
        if row["result"] == "failed" and case.name in refused and (lacking := sorted(case.terms - decoded)):
            row["result"], row["problem"] = "skipped", f"no decoder for {', '.join(lacking)}"
    return rows


def _open(case: Case) -> tuple[dict[str, PackedWeight], QformatError | None]:
    """Every weight of a case, aliases and members too, or the error with which reading refuses it."""
    try:
        opened = checkpoint.open(case.input)
        weights = _weights(opened)
    except QformatError as error:
        return {}, error
    return weights, None


def _weights(opened: Checkpoint) -> dict[str, PackedWeight]:
    if opened.manifest is None:
        raise DamagedError("a qformat manifest", "none", file=opened.path)
    for shard in opened.shards:
        shard.check()
    assert opened.packed_tensors is not None  # names that two weights claim are found here
    return {name: opened[name] for name in (*opened, *opened.members, *opened.composed, *opened.manifest.aliases)}


class _Skipped(Exception):
    """The decoder has nothing for this case."""


def _judge(case: Case, job: Callable[[], str]) -> tuple[str, str]:
    """Result and problem of a job that gives what differs, empty where nothing does, or raises."""
    try:
        differs = job()
    except _Skipped:
        return "skipped", "no decoder"
    except QformatError as error:
        return _refused(case, error)
    except Exception as error:  # a decoder that crashes has failed this case, and the others are still to come
        return "failed", f"{type(error).__name__}: {error}"
    if case.facts.group == "invalid":
        return "failed", f"expected the error {case.facts.error}, found values"
    return ("failed", differs) if differs else ("passed", "")


def _refused(case: Case, error: QformatError) -> tuple[str, str]:
    wanted = case.facts.error
    if wanted is not None and isinstance(error, ERRORS[wanted]):
        return "passed", ""
    kind = next((kind for kind, cls in ERRORS.items() if isinstance(error, cls)), type(error).__name__)
    return "failed", f"expected {f'the error {wanted}' if wanted else 'values'}, found the error {kind}: {error}"


def _decode(case: Case, weights: Mapping[str, PackedWeight], decode: Decode) -> str:
    """What differs first between a decoder's values and the expected ones; the files' own sums first."""
    for file, stored in case.facts.sha256.items():
        found = hashlib.sha256((case.folder / file).read_bytes()).hexdigest()
        if found != stored:
            return f"expected {file} with sha256 {stored}, found {found}"
    for name, weight in weights.items():
        values = _values(decode, weight, rotated=False)
        if case.facts.group == "invalid":
            continue
        if differs := difference(values, case.expected(name), case.facts.tolerance):
            return f"{name}: {differs}"
        if weight.entry.rotation is not None:
            if differs := difference(_values(decode, weight, rotated=True), case.expected(name, rotated=True), 0):
                return f"{name}, rotated: {differs}"
        for cut in case.facts.slices if weight.pieces or len(weights) == 1 else ():
            if differs := _cut(case, weight, cut, decode):
                return f"{name}, {cut.start}..{cut.stop} of axis {cut.axis}: {differs}"
    return ""


def _values(decode: Decode, weight: PackedWeight, rotated: bool) -> Array:
    values = decode(weight, rotated)
    if values is None:
        raise _Skipped
    return values


def _cut(case: Case, weight: PackedWeight, cut: Slice, decode: Decode) -> str:
    try:
        piece = weight.slice(cut.axis, cut.start, cut.stop)
    except UnsupportedError:
        return "" if cut.error else "expected a cut, found none"
    if cut.error:
        return "expected no cut, found one"
    where = (slice(None),) * cut.axis + (slice(cut.start, cut.stop),)
    values = _values(decode, piece, rotated=False)
    return difference(values, case.expected(weight.name)[where], case.facts.tolerance)


def difference(found: Array, expected: Array, tolerance: float) -> str:
    """Empty where equal: to the bit, or with a tolerance within that part of the largest magnitude."""
    if found.dtype != np.float32 or found.shape != expected.shape:
        return f"expected float32 {list(expected.shape)}, found {found.dtype.name} {list(found.shape)}"
    if tolerance:
        with np.errstate(invalid="ignore"):
            error = np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max()
        return "" if error <= tolerance else f"expected an error of at most {tolerance:.1e}, found {error:.1e}"
    same = np.ascontiguousarray(found).view(np.uint32) == np.ascontiguousarray(expected).view(np.uint32)
    if same.all():
        return ""
    where = np.unravel_index(int(np.argmin(same)), same.shape)
    place = [int(i) for i in where]
    return f"{int((~same).sum())} of {same.size}; at {place} expected {expected[where]!r}, found {found[where]!r}"


def _run_one(command: Sequence[str], case: Case, seconds: float) -> str:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.safetensors"
        line = [*command, str(case.input), str(output)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=seconds)
        if done.returncode != 0:
            refusal = next((cls for cls in ERRORS.values() if cls.exit_code == done.returncode), None)
            if refusal is None:
                return f"expected exit code 0, 3 or 4, found {done.returncode}: {done.stderr.strip()[-200:]}"
            raise refusal(done.stderr.strip()[-200:])
        decoded = checkpoint.open(output)
        if case.facts.group == "invalid":
            return "values"
        for name in Shard(case.folder / "expected.safetensors").tensors:
            if name not in decoded.tensors:
                return f"expected {name}, found none"
            if differs := difference(decoded.array(name), case.expected(name), case.facts.tolerance):
                return f"{name}: {differs}"
    return ""
