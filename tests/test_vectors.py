"""Every vector of the specification holds, and the runner tells when one does not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import second_decoder

from qformat import conformance
from qformat.conformance import Case
from qformat.dtypes import Array
from qformat.errors import DamagedError, QformatError, UnsupportedError
from qformat.shards import Shard
from qformat.weight import PackedWeight

ROOT = Path(__file__).resolve().parents[1]
CASES = conformance.find()
# What a reader may refuse as damaged (checksums, counts) the reference refuses when it reads, before it decodes.
DECODED = [case for case in CASES if case.facts.group != "invalid" and case.facts.error != "damaged"]


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_every_vector_holds() -> None:
    failed = [row for row in conformance.run() if row["result"] != "passed"]
    assert not failed


def test_the_reference_decodes_what_others_may_refuse() -> None:
    optional = [case for case in DECODED if case.facts.group == "optional"]
    assert optional
    for case in optional:
        weights, refusal = conformance._open(case)
        assert refusal is None and not conformance._decode(case, weights, PackedWeight.decode)


@pytest.mark.parametrize("case", DECODED, ids=lambda case: case.name)
def test_a_second_decoder_agrees(case: Case) -> None:
    """Written from the pages alone, it shows that they say enough, and that the expected values are theirs."""
    for name, (stored, weight) in second_decoder.decode_file(case.input).items():
        expected = case.expected(name)
        found = np.array(weight, np.float32).reshape(expected.shape)
        assert not conformance.difference(found, expected, case.facts.tolerance)
        rotated = case.folder / "rotated.safetensors"
        if rotated.exists() and name in Shard(rotated).tensors:
            expected = case.expected(name, rotated=True)
            assert not conformance.difference(np.array(stored, np.float32).reshape(expected.shape), expected, 0)


def last_changed(weight: PackedWeight, rotated: bool) -> Array:
    """The largest value is off by a little more than any tolerance."""
    values = weight.decode(rotated).copy()
    values.flat[np.abs(values).argmax()] *= np.float32(1 + 2**-18)
    return values


def last_bit(weight: PackedWeight, rotated: bool) -> Array:
    values = np.ascontiguousarray(weight.decode(rotated))
    values.reshape(-1).view(np.uint32)[-1] ^= 1
    return values


WRONG = {
    "a value is off": last_changed,
    "nothing but zeros": lambda weight, rotated: np.zeros_like(weight.decode(rotated)),
    "another dtype": lambda weight, rotated: weight.decode(rotated).astype(np.float64),
    "another shape": lambda weight, rotated: weight.decode(rotated)[None],
    "refuses": lambda weight, rotated: (_ for _ in ()).throw(DamagedError("nothing")),
    "crashes": lambda weight, rotated: weight.decode(rotated)[None, "no"],
}


def test_a_wrong_decoder_fails_every_case() -> None:
    rows = conformance.run(WRONG, DECODED)
    assert len(rows) == len(WRONG) * len(DECODED)
    assert {row["result"] for row in rows} == {"failed"}
    exact = [case for case in DECODED if not case.facts.tolerance]
    assert {row["result"] for row in conformance.run({"last bit": last_bit}, exact)} == {"failed"}


def test_a_decoder_that_takes_anything_fails_every_invalid_case_that_it_sees() -> None:
    def anything(weight: PackedWeight, rotated: bool) -> Array:
        return np.zeros(weight.shape, np.float32)

    rows = conformance.run(
        {"reference": anything, "native": anything}, [c for c in CASES if c.facts.group == "invalid"]
    )
    seen = [row for row in rows if row["decoder"] == "native" and row["result"] != "skipped"]
    assert seen and all(row["result"] == "failed" for row in seen)


def test_a_decoder_may_have_nothing_for_a_case_and_may_refuse_an_optional_one() -> None:
    def unsupported(weight: PackedWeight, rotated: bool) -> Array:
        raise UnsupportedError("something else")

    results = {row["case"]: row["result"] for row in conformance.run({"native": unsupported}, DECODED)}
    for case in DECODED:
        assert results[case.name] == ("passed" if case.facts.group == "optional" else "failed")
    nothing = conformance.run({"native": lambda weight, rotated: None}, DECODED)
    assert {row["result"] for row in nothing} == {"skipped"}


@pytest.mark.parametrize("error", [DamagedError, QformatError], ids=["damaged", "a bug"])
def test_the_wrong_error_is_a_failure(error: type[QformatError]) -> None:
    def wrong(weight: PackedWeight, rotated: bool) -> Array:
        raise error("something")

    (row,) = conformance.run({"native": wrong}, [named("trellis/tile-8x16")])
    assert row["result"] == "failed" and "unsupported" in row["problem"]


def test_a_changed_vector_is_a_failure(tmp_path: Path) -> None:
    case = named("int/example")
    copy = tmp_path / "int" / "example"
    shutil.copytree(case.folder, copy)
    expected = copy / "expected.safetensors"
    data = bytearray(expected.read_bytes())
    data[-1] ^= 1
    expected.write_bytes(data)
    (row,) = conformance.run(cases=conformance.find(tmp_path))
    assert row["result"] == "failed" and "sha256" in row["problem"]


COMMAND = """
import sys
from qformat import checkpoint, conformance
from qformat.errors import QformatError
from qformat.shards import ShardWriter, spec
try:
    opened = checkpoint.open(sys.argv[1])
    values = {name: weight.decode() for name, weight in conformance._weights(opened).items()}
except QformatError as error:
    sys.exit(error.exit_code)
with ShardWriter(sys.argv[2], {name: spec("float32", array.shape) for name, array in values.items()}, {}) as shard:
    for name, array in values.items():
        shard.put(name, array * FACTOR)
"""


def test_any_program_can_take_part() -> None:
    cases = [named(name) for name in ("manifest/alias", "files/folder", "rotation/both", "files/invalid-dtype")]
    right = [sys.executable, "-c", COMMAND.replace("FACTOR", "1")]
    assert [row["result"] for row in conformance.run_command(right, cases)] == ["passed"] * 4
    wrong = [sys.executable, "-c", COMMAND.replace("FACTOR", "2")]
    assert [row["result"] for row in conformance.run_command(wrong, cases)] == ["failed"] * 3 + ["passed"]
    (row,) = conformance.run_command([sys.executable, "-c", "raise SystemExit(1)"], cases[:1])
    assert row["result"] == "failed" and "exit code" in row["problem"]


def test_a_program_may_lack_a_codec() -> None:
    """A 4 is skipped where a codec of the case is decoded in none, and judged where it is."""
    mine = ("int/example", "files/invalid-dtype", "values/sum-float16", "trellis/mul1-L8", "trellis/invalid-rows")

    def results(*refused: str) -> list[str]:
        lacks = f"import sys\nif any(kind in sys.argv[1] for kind in {refused}): sys.exit(4)\n"
        command = [sys.executable, "-c", lacks + COMMAND.replace("FACTOR", "1")]
        return [row["result"] for row in conformance.run_command(command, [named(name) for name in mine])]

    assert results("trellis/", "values/") == ["passed", "passed", "skipped", "skipped", "skipped"]
    assert results("trellis/") == ["passed", "passed", "passed", "failed", "failed"]


def test_what_is_generated_is_what_is_stored() -> None:
    """Vectors that are missing, differ, or that nothing makes; the schema, the hex dump, the list of tables."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.vectors", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_no_vector_is_made_silently(tmp_path: Path) -> None:
    """Nothing but ``--add`` writes a case, nothing but ``--change`` rewrites one."""
    from scripts.vectors import __main__ as spec

    draft = next(draft for draft in spec.drafts() if draft.name == "int/example")
    root, work = tmp_path / "spec", tmp_path / "work"
    stored = root / "vectors" / "int" / "example" / "case.json"
    spec.SPEC, saved = root, spec.SPEC
    try:
        for i, (add, change, told) in enumerate(
            ((False, False, "missing"), (False, True, "missing"), (True, False, ""), (True, False, "differs"))
        ):
            problems = list(spec.vectors([draft], add, change, work / str(i)))
            assert ([told in problem for problem in problems] == [True]) if told else (problems == [])
            if stored.exists():
                stored.write_text("{}")
        assert list(spec.vectors([draft], False, True, work / "changed")) == []
        assert json.loads(stored.read_text())["group"] == "valid"
        assert list(spec.vectors([], True, True, work / "none")) == ["int/example: no draft makes it"]
    finally:
        spec.SPEC = saved


def test_entries_stand_in_the_manifest_as_in_the_case() -> None:
    from qformat import checkpoint

    for case in DECODED:
        settings = checkpoint.open(case.input).settings
        assert settings["entries"] == list(case.facts.entries), case.name


def test_all_vectors_are_small() -> None:
    sizes = [path.stat().st_size for path in (ROOT / "spec" / "vectors").rglob("*") if path.is_file()]
    assert sum(sizes) < 2_000_000 and max(sizes) < 150_000  # 2^16 entries of float16 are 131 kB
