"""Each conversion ends with a proof, which covers what it says and refuses what is wrong."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
from making import dense_folder

from qformat import checkpoint
from qformat.converters import convert as converting
from qformat.converters import proof
from qformat.converters.convert import convert
from qformat.converters.formulas import gptq as formula
from qformat.converters.quantize.job import quantize
from qformat.dtypes import Array
from qformat.errors import DamagedError

LAYERS = foreign.DATA / "layers"
CASES = sorted(case.name for case in LAYERS.iterdir())
EXPORTS = {
    "gptq": ["gptq-v1-b4-g32-actorder", "gptq-v2-b4-g64-asym-zero0", "gptq-p-b3-g32-sym-planar"],
    "awq": ["awq-gemm-g128", "gptq-v1-b4-g128-sym"],
    "exl3": ["exl3-3bpw-mul1-padded"],
    "fp8": ["fp8-block128", "fbgemm-fp8-row"],
    "mxfp4": ["mxfp4-gpt-oss"],
}


def whole(found: dict[str, Any] | None) -> bool:
    """Whether a proof says that all values were compared, and that none differ."""
    assert found is not None and found.keys() == {"weights", "by_formula", "values", "of", "differ"}
    return bool(found["values"] == found["of"] > 0 and found["differ"] == 0 < found["weights"])


@pytest.mark.parametrize("case", CASES)
def test_a_layer(case: str, tmp_path: Path) -> None:
    """All values by the formula, where no rotation is undone; no scheme lacks one."""
    found = convert(LAYERS / case, tmp_path / "packed")["proof"]
    assert whole(found) and found["by_formula"] == found["weights"]
    for source, by_formula in ((LAYERS / case, found["weights"]), (tmp_path / "packed", 0)):
        dense = convert(source, tmp_path / "dense", "dense", overwrite=True)["proof"]
        packed = checkpoint.open(tmp_path / "packed")
        turned = any(packed[name].entry.rotation is not None for name in packed)
        assert whole(dense) and dense["by_formula"] == (0 if turned else by_formula)
    again = convert(tmp_path / "packed", tmp_path / "again")["proof"]
    assert again == {**found, "by_formula": 0}


@pytest.mark.parametrize("case", ["qtip-1mad-k3", "qtip-3inst-k4"])
def test_a_setting_that_says_nothing_of_the_values_may_be_absent(case: str, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "model.safetensors").symlink_to(LAYERS / case / "model.safetensors")
    config = json.loads((LAYERS / case / "config.json").read_text())
    del config["quip_params"]["tlut_bits"]
    (tmp_path / "s" / "config.json").write_text(json.dumps(config))
    assert whole(convert(tmp_path / "s", tmp_path / "t")["proof"])


@pytest.mark.parametrize(("target", "case"), [(to, case) for to, cases in EXPORTS.items() for case in cases])
def test_an_export(target: str, case: str, tmp_path: Path) -> None:
    found = convert(LAYERS / case, tmp_path / "t", target)["proof"]
    assert whole(found) and found["by_formula"] == (0 if target == "exl3" else found["weights"])


def test_a_dense_model_has_none(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "s", {"a.weight": np.ones((4, 4), np.float32)})
    assert convert(source, tmp_path / "t", "dense", dtype="float16")["proof"] is None


def spoiled(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[checkpoint.Checkpoint, Path], None]) -> None:
    """Change what is written before it is held against the source."""

    def prove(source: Any, plan: Any, scheme: str, target: str, folder: Path) -> Any:
        spoil(checkpoint.open(folder), folder / "model.safetensors")
        return proof.prove(source, plan, scheme, target, folder)

    monkeypatch.setattr(converting, "prove", prove)


def flip(tensor: str, at: int) -> Callable[[checkpoint.Checkpoint, Path], None]:
    """One bit of a byte of the first such tensor."""

    def spoil(written: checkpoint.Checkpoint, file: Path) -> None:
        name = min(name for name in written.tensors if name.endswith(tensor))
        data = np.fromfile(file, np.uint8)
        data[written.tensors[name].start : written.tensors[name].stop][at] ^= 1
        data.tofile(file)

    return spoil


@pytest.mark.parametrize(
    ("case", "target", "tensor", "at"),
    [
        ("gptq-v1-b4-g32-actorder", "qformat", "weight_codes", -1),
        ("gptq-v1-b4-g32-actorder", "qformat", "weight_scales", 0),
        ("gptq-v1-b4-g32-actorder", "gptq", "qweight", 0),
        ("gptq-v1-b4-g32-actorder", "dense", "weight", -2),
        ("exl3-3bpw-mcg", "qformat", "weight_codes", 0),
        ("exl3-3bpw-mul1-padded", "dense", "weight", 1),
        ("exl3-3bpw-mul1-padded", "exl3", "trellis", 0),
        ("fp8-block128", "fp8", "weight", 0),
        ("mxfp4-gpt-oss", "mxfp4", "gate_up_proj_blocks", 5),
        ("mxfp4-gpt-oss", "dense", "gate_up_proj", 0),
        ("quip-e8p12rvq3b", "qformat", "1_codes", 0),
        ("bnb-nf4-nested-fp16", "qformat", "weight_codes", 7),
        ("higgs-4bit-p2", "qformat", "weight_codes", 0),
    ],
)
def test_a_changed_bit_is_refused(
    case: str, target: str, tensor: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, flip(tensor, at))
    with pytest.raises(DamagedError) as raised:
        convert(LAYERS / case, tmp_path / "t", target)
    assert re.search(r": \S+: expected \S+, as the source has it, at row \d+, column \d+, found ", str(raised.value))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", [(0, 0), (-1, -1)])
def test_a_formula_that_says_otherwise(
    place: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = formula.rows

    def wrong(*given: Any) -> Array:
        found = rows(*given)
        found[place] = np.nextafter(np.float16(found[place]), np.float16(9))
        return found

    monkeypatch.setattr(formula, "rows", wrong)
    (tmp_path / "t").mkdir()
    from qformat import cli

    words = ["qformat", "convert", str(LAYERS / "gptq-v1-b4-g128-sym"), str(tmp_path / "t"), "--overwrite", "--json"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    error = json.loads(capsys.readouterr().out)["error"]
    assert leaving.value.code == 3 and "as the source has it" in error["expected"]
    assert os.listdir(tmp_path) == ["t"] and os.listdir(tmp_path / "t") == []


def test_the_report_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qformat import cli

    told = []
    for source, target in ((LAYERS / "gptq-v1-b4-g128-sym", "a"), (tmp_path / "a", "b")):
        monkeypatch.setattr("sys.argv", ["qformat", "convert", str(source), str(tmp_path / target)])
        cli.main()
        told += [line for line in capsys.readouterr().out.splitlines() if line.startswith("proof")]
    assert told == [
        "proof: 1 weight, 24.6 k of 24.6 k values decoded again: all equal to the formula of gptq",
        "proof: 1 weight, 24.6 k of 24.6 k values decoded again: all equal to the source",
    ]


def test_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "STRIP", 16)
    monkeypatch.setattr(proof, "SAMPLE", 16 * 256 * 3)
    report = convert(LAYERS / "gptq-v1-b4-g128-sym", tmp_path / "t")
    (weight,) = report["weights"]
    rows, cols = weight["shape"]
    stated = 16 * cols * (16 * 256 * 3 // (16 * cols))
    assert report["proof"]["of"] == rows * cols > report["proof"]["values"] == stated


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 1000, 4096, 20_000])
@pytest.mark.parametrize("cols", [16, 4096, 1 << 21])
@pytest.mark.parametrize("matrices", [1, 3, 64])
def test_strips(rows: int, cols: int, matrices: int) -> None:
    """Whole, apart, evenly spread, as many as are stated, and others in another weight."""
    total, covered = matrices * rows, set[int]()
    for number in range(20):
        strips = list(proof.strips(matrices, rows, cols, number))
        starts, stops = zip(*strips, strict=True)
        assert all(start % proof.STRIP == 0 and 0 <= start < total for start in starts)
        assert all(stop == min(total, start + proof.STRIP) for start, stop in strips)
        assert len(set(starts)) == len(starts) and list(starts) == sorted(starts)
        stated = max(1, matrices * proof.SAMPLE // (proof.STRIP * cols))
        assert sum(stops) - sum(starts) == total or len(strips) == stated
        gaps = np.diff([0, *starts, total])
        assert gaps.max() <= 2 * max(total / len(starts), 2 * proof.STRIP)
        covered |= set(starts)
    assert len(covered) >= min(20, -(-total // proof.STRIP)) * 0.6


@pytest.mark.parametrize("settings", [{"block": [1, 16]}, {"block": [7, 5]}, {"view": [640, 16], "block": [1, 16]}])
def test_our_own_packings(settings: dict[str, Any], tmp_path: Path) -> None:
    """Those that can be cut by rows, and those that cannot."""
    values = np.random.default_rng(0).standard_normal((160, 64)).astype(np.float32)
    source = dense_folder(tmp_path / "s", {"l.weight": values, "m.weight": values[:96]})
    quantize(source, tmp_path / "q", codec="int", bits=4, settings=settings, include=["l.weight"], exclude=["m.*"])
    for target in ("qformat", "dense"):
        assert whole(convert(tmp_path / "q", tmp_path / target, target)["proof"])
