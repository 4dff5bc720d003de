"""The small reader in ``spec/`` decodes what the specification says: vectors, and whole models."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from making import entry, packed

from qformat import checkpoint, conformance, manifest
from qformat.dtypes import NUMPY, Array, name_of
from qformat.manifest import Manifest
from qformat.shards import Shard, ShardWriter, spec

SOURCE = Path(__file__).resolve().parents[1] / "spec" / "mini_reader.py"
CASES = [case for case in conformance.find() if case.facts.group != "invalid" and case.terms]
MINE = [case for case in CASES if case.terms <= {"int", "trellis"}]
EXACT = 2.0**-20  # of the largest magnitude: rule R6

INT = {"codec": "int", "bits": 4, "block": [1, 32], "zero": 8}
PLAIN = {"codec": "int", "bits": 8, "scales": "float32"}
TRELLIS = {
    "codec": "trellis", "L": 12, "bits": [2], "code": "hash", "shift": 7, "taps": [0, 2, 10], "index": [2, 2],
    "table": "hash-16", "order": "c2 c3 c0 c1 r0 r1 r2 r3", "block": [-1, -1], "scales": "float16",
}  # fmt: skip
FINER = {
    "codec": "trellis", "L": 16, "bits": [3, 4], "code": "mul1", "order": "c0 c1 c2 c3 r0 r1 r2 r3",
    "scales": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def reader() -> ModuleType:
    found = importlib.util.spec_from_file_location("mini_reader", SOURCE)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_it_imports_numpy_and_no_other_library() -> None:
    tree = ast.parse(SOURCE.read_text())
    used = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    used |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in used} - {*sys.stdlib_module_names} == {"numpy"}


def test_it_can_be_read_in_an_evening() -> None:
    assert len(SOURCE.read_text().splitlines()) <= 420


def test_the_vectors_hold(reader: ModuleType, tmp_path: Path) -> None:
    """All that need no other codec, what a reader may refuse included."""
    assert len(MINE) > 200
    for case in MINE:
        output = tmp_path / "output.safetensors"
        assert reader.main([str(case.input), str(output)]) == 0, case.name
        found = Shard(output)
        assert found.tensors.keys() == Shard(case.folder / "expected.safetensors").tensors.keys(), case.name
        for name in found.tensors:
            differs = conformance.difference(found.array(name), case.expected(name), case.facts.tolerance)
            assert not differs, f"{case.name}: {name}: {differs}"


def test_it_takes_part_as_a_program() -> None:
    """A codec that it lacks is skipped."""
    names = ("int/example", "table/nf4", "rotation/order-28", "manifest/invalid-unknown-codec")
    cases = [case for case in conformance.find() if case.name in names]
    rows = {row["case"]: row["result"] for row in conformance.run_command([sys.executable, str(SOURCE)], cases)}
    assert rows == dict(zip(names, ("passed", "skipped", "passed", "passed"), strict=True))


def model(path: Path, linear: dict[str, Any], in_file: bool) -> Path:
    """Two layers, embeddings, a tied head and dense norms in three shards; the manifest in config.json or a shard."""
    rng = np.random.default_rng(7)
    turned = {"in": {"size": 16, "scale": "float16"}, "out": {"size": 32, "scale": "float32"}}
    entries = [
        entry((96, 64), PLAIN, weights=["embed.weight"], dtype="bfloat16"),
        entry((48, 80), linear, weights=["layers.{0..1}.up.weight"], stored_shape=(48, 80)),
        entry((40, 70), linear, weights=["layers.{0..1}.down.weight"], stored_shape=(64, 80), rotation=turned),
        entry((2, 64, 32), linear, weights=["layers.{0..1}.experts"], stack=1, transposed=True),
    ]
    tensors: dict[str, Array] = {}
    for one in entries:
        for name in Manifest(entries=(one,)).names(limit=9):
            parts = packed(rng, one, name).parts
            tensors |= {f"{name}_{part}": array for part, array in parts.items()}
    for i, dtype in enumerate(("bfloat16", "float16")):
        tensors[f"layers.{i}.norm"] = rng.standard_normal(64).astype(NUMPY[dtype])
    settings = manifest.write(Manifest(entries=tuple(entries), aliases={"head.weight": "embed.weight"}))
    return shards(path, tensors, settings, in_file)


def shards(path: Path, tensors: dict[str, Array], settings: dict[str, Any], in_file: bool) -> Path:
    path.mkdir()
    weight_map: dict[str, str] = {}
    for i in range(3):
        file, mine = f"model-{i + 1:05}-of-00003.safetensors", dict([*tensors.items()][i::3])
        metadata = {"quantization_config": json.dumps(settings)} if in_file and i == 2 else {}
        with ShardWriter(path / file, {n: spec(name_of(a.dtype), a.shape) for n, a in mine.items()}, metadata) as shard:
            for name, array in mine.items():
                shard.put(name, array)
        weight_map |= dict.fromkeys(mine, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "none"} if in_file else {"model_type": "none", "quantization_config": settings}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(("linear", "in_file"), [(INT, False), (TRELLIS, False), (FINER, True)], ids=str)
def test_a_whole_model_decodes(reader: ModuleType, tmp_path: Path, linear: dict[str, Any], in_file: bool) -> None:
    """Bit for bit as the reference does it, but for rotated weights, which are real-number products."""
    opened = checkpoint.open(model(tmp_path / "model", linear, in_file))
    assert opened.manifest is not None
    found = dict(reader.weights(tmp_path / "model"))
    assert found.keys() == {*opened, *opened.dense, *opened.manifest.aliases} and len(found) == 10
    for name in (*opened, *opened.manifest.aliases):
        expected, rotated = opened[name].decode(), opened[name].entry.rotation is not None
        assert not conformance.difference(np.ascontiguousarray(found[name]), expected, EXACT if rotated else 0), name
    for name in opened.dense:
        assert np.array_equal(found[name], opened.array(name).astype(found[name].dtype)), name


def test_it_prints_a_line_for_every_weight(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", INT, False)
    done = subprocess.run([sys.executable, str(SOURCE), str(folder)], capture_output=True, text=True, check=True)
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    opened = checkpoint.open(folder)
    assert opened.manifest is not None
    assert lines.keys() == {*opened, *opened.dense, *opened.manifest.aliases}
    values = opened["embed.weight"].decode().astype(np.float64)
    assert lines["embed.weight"].split()[-1] == f"{np.sqrt((values**2).mean()):.5g}"


def test_what_it_does_not_know_is_one_line(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "table/nf4")
    done = subprocess.run(
        [sys.executable, str(SOURCE), str(case.input), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 4 and done.stderr.count("\n") == 1 and "the codec table" in done.stderr
