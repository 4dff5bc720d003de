"""One of the model's weights stored as several, along an axis: decoded as one, cut, converted, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import entry, folder, packed

from qformat import checkpoint, manifest
from qformat.converters.convert import convert
from qformat.converters.report import inspect
from qformat.errors import DamagedError, UnsupportedError
from qformat.records import write_record
from qformat.verify import verify

INT: dict[str, Any] = {"codec": "int", "bits": 4, "zero": 8, "block": [1, 8]}
NF4: dict[str, Any] = {"codec": "table", "bits": 4, "table": "nf4", "block": [1, 8], "scales": "float16"}


def composed(name: str, shape: tuple[int, ...], *pieces: str, axis: int = 0) -> manifest.Entry:
    listed = [{"weights": [piece]} for piece in pieces]
    return entry(shape, weights=(name,), pieces=listed, **({"axis": axis} if axis else {}))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two layers: rows of two codecs in one weight, columns in another, and matrices one by one."""
    rng = np.random.default_rng(0)
    weights = {}
    for i in range(2):
        made = {
            "rows.low": entry((3, 16), INT),
            "rows.high": entry((2, 16), NF4, rotation={"in": {"size": 8}}),
            "cols.0": entry((4, 8), NF4),
            "cols.1": entry((4, 16), INT),
            "experts.0": entry((1, 3, 8), INT, stack=1),
            "experts.1": entry((2, 3, 8), INT, stack=1),
        }
        weights |= {f"l.{i}.{name}": packed(rng, one, f"l.{i}.{name}") for name, one in made.items()}
        for name, shape, first, second, axis in (
            ("rows", (5, 16), "low", "high", 0),
            ("cols", (4, 24), "0", "1", 1),
            ("experts", (3, 3, 8), "0", "1", 0),
        ):
            whole = composed(f"l.{i}.{name}", shape, f"l.{i}.{name}.{first}", f"l.{i}.{name}.{second}", axis=axis)
            weights[f"l.{i}.{name}"] = packed(rng, whole, f"l.{i}.{name}")
    return folder(tmp_path / "mixed", weights, {"norm.weight": np.ones(4, np.float32)})


def test_a_weight_is_its_pieces(mixed: Path) -> None:
    opened = checkpoint.open(mixed)
    assert len(opened) == 12 and len(opened.composed) == 6 and verify(opened) == []
    for name, stored in opened.composed.items():
        whole, pieces = opened[name], [opened[one] for one in stored]
        assert name not in list(opened) and whole.shape == whole.decode().shape
        np.testing.assert_array_equal(
            whole.decode(), np.concatenate([one.decode() for one in pieces], whole.entry.axis)
        )
        assert whole.nbytes == sum(one.nbytes for one in pieces)
        assert whole.stored_bits == 8 * whole.nbytes / whole.decode().size
        whole.check()
        with pytest.raises(UnsupportedError, match=f"{name}: expected a stored weight, found one in pieces"):
            whole.decode(rotated=True)
    assert opened["l.0.rows"].codec == "int, table" and opened["l.1.experts"].codec == "int"
    assert len(inspect(mixed)["weights"]) == 12


@pytest.mark.parametrize(
    ("name", "axis", "start", "stop", "pieces"),
    [("rows", 0, 1, 4, 2), ("rows", 0, 3, 5, 1), ("rows", 1, 0, 8, 2), ("cols", 1, 8, 16, 1), ("experts", 0, 0, 2, 2)],
)
def test_cuts(name: str, axis: int, start: int, stop: int, pieces: int, mixed: Path) -> None:
    whole = checkpoint.open(mixed)[f"l.1.{name}"]
    cut = whole.slice(axis, start, stop)
    where = (slice(None),) * axis + (slice(start, stop),)
    np.testing.assert_array_equal(cut.decode(), whole.decode()[where])
    assert len(cut.pieces) == len(cut.entry.pieces) == pieces and cut.nbytes < whole.nbytes
    again = cut.slice(1 - axis, 0, cut.shape[1 - axis])
    np.testing.assert_array_equal(again.decode(), cut.decode())
    with pytest.raises(UnsupportedError):
        checkpoint.open(mixed)["l.0.cols"].slice(1, 4, 24)


def test_converted_it_is_the_same_and_dense_it_is_one(mixed: Path, tmp_path: Path) -> None:
    convert(mixed, tmp_path / "again")
    opened, again = checkpoint.open(mixed), checkpoint.open(tmp_path / "again")
    assert again.composed == opened.composed and verify(again) == []
    entries = json.loads((tmp_path / "again/config.json").read_text())[checkpoint.KEY]["entries"]
    assert {one["weights"][0]: [piece["weights"] for piece in one["pieces"]] for one in entries if "pieces" in one} == {
        f"l.{{0..1}}.{name}": [[f"l.{{0..1}}.{name}.{first}"], [f"l.{{0..1}}.{name}.{second}"]]
        for name, first, second in (("cols", "0", "1"), ("experts", "0", "1"), ("rows", "low", "high"))
    }
    convert(tmp_path / "again", tmp_path / "dense", "dense", dtype="float32")
    dense = checkpoint.open(tmp_path / "dense")
    assert sorted(dense.tensors) == sorted([*opened.composed, "norm.weight"])
    for name in opened.composed:
        np.testing.assert_array_equal(dense.array(name), opened[name].decode())
    with pytest.raises(UnsupportedError):
        convert(mixed, tmp_path / "gptq", "gptq")


def test_a_damaged_piece_is_named(mixed: Path) -> None:
    config = json.loads((mixed / "config.json").read_text())
    entries = config[checkpoint.KEY]["entries"]
    next(one for one in entries if one["weights"] == ["l.0.rows"])["pieces"].reverse()
    (mixed / "config.json").write_text(json.dumps(config))
    assert verify(checkpoint.open(mixed)) == []  # another order is another weight
    next(one for one in entries if one["weights"] == ["l.0.rows"])["shape"] = [6, 16]
    (mixed / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        DamagedError, match=r"config.json: l.0.rows: expected pieces of 6 together along axis 0, found \[2, 3\]"
    ):
        checkpoint.open(mixed)


def test_there_are_no_more_names_than_tensors() -> None:
    """Of stored weights, and of weights in pieces; each is counted before it is made."""
    stored = {**write_record(entry((4, 8), INT)), "weights": ["w.{0..8}"]}
    whole = {"weights": ["{0..999999999}"], "shape": [4, 8], "dtype": "float32", "pieces": [{"weights": ["w.0"]}]}
    described = manifest.read({"quant_method": "qformat", "version": "0.1", "entries": [stored, whole]})
    with pytest.raises(DamagedError, match="at most 9 weights"):
        described.names(9)
