"""Several of the model's weights stored as one: each has its rows, and goes its way in a dense copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import entry, folder, packed

from qformat import checkpoint, conformance, manifest
from qformat.converters.convert import convert
from qformat.errors import DamagedError, UnsupportedError
from qformat.verify import verify

INT: dict[str, Any] = {"codec": "int", "bits": 4, "zero": 8, "block": [1, 8]}


def pieces(layer: int) -> list[dict[str, Any]]:
    return [{"weights": [f"l.{layer}.{name}.weight"], "rows": rows} for name, rows in (("q", 3), ("k", 1), ("v", 1))]


@pytest.fixture
def joined(tmp_path: Path) -> Path:
    """Two layers, rotated, with three weights of the model in each of their weights."""
    rng = np.random.default_rng(0)
    turned = {"in": {"size": 8}, "out": {"scale": "float16"}}
    names = [f"l.{i}.qkv.weight" for i in range(2)]
    weights = {
        name: packed(rng, entry((5, 16), INT, weights=(name,), concat=pieces(i), rotation=turned), name)
        for i, name in enumerate(names)
    }
    return folder(tmp_path / "joined", weights, {"norm.weight": np.ones(4, np.float32)})


def test_each_weight_has_its_rows(joined: Path) -> None:
    opened = checkpoint.open(joined)
    assert list(opened) == ["l.0.qkv.weight", "l.1.qkv.weight"] and verify(opened) == []
    whole = opened["l.1.qkv.weight"]
    for name, rows in (("q", slice(0, 3)), ("k", slice(3, 4)), ("v", slice(4, 5))):
        one = opened[f"l.1.{name}.weight"]
        assert one.name == f"l.1.{name}.weight" and one.shape == (rows.stop - rows.start, 16)
        np.testing.assert_array_equal(one.decode(), whole.decode()[rows])
        np.testing.assert_array_equal(one.decode(rotated=True), whole.decode(rotated=True))
        assert one.stored_bits == whole.stored_bits
        with pytest.raises(UnsupportedError, match="a stored weight, to be cut"):
            one.slice(0, 0, 1)
    assert opened.members["l.0.k.weight"] == ("l.0.qkv.weight", 3, 4)
    assert whole.slice(0, 2, 5).entry.concat == ()


@pytest.mark.parametrize("through", ["at once", "packed first"])
def test_a_dense_copy_has_the_names_of_the_model(through: str, joined: Path, tmp_path: Path) -> None:
    source = joined
    if through == "packed first":
        source = tmp_path / "again"
        convert(joined, source)
    convert(source, tmp_path / "dense", "dense", dtype="float32")
    opened, dense = checkpoint.open(joined), checkpoint.open(tmp_path / "dense")
    assert sorted(dense.tensors) == [*(f"l.{i}.{n}.weight" for i in range(2) for n in "kqv"), "norm.weight"]
    for name in opened.members:
        np.testing.assert_array_equal(dense.array(name), opened[name].decode())


def test_alike_weights_share_an_entry(joined: Path, tmp_path: Path) -> None:
    convert(joined, tmp_path / "again")
    (found,) = json.loads((tmp_path / "again/config.json").read_text())[checkpoint.KEY]["entries"]
    assert found["weights"] == ["l.{0..1}.qkv.weight"]
    assert found["concat"][1] == {"weights": ["l.{0..1}.k.weight"], "rows": 1}
    assert found["concat"] == [{**one, "weights": [one["weights"][0].replace("0", "{0..1}")]} for one in pieces(0)]


def test_pieces_stay_with_their_weights() -> None:
    """Where patterns would list pieces in another order than the weights they are written out."""
    weights = [
        (f"w.{i}", entry((5, 16), INT, weights=(f"w.{i}",), concat=[{"weights": [f"p.{2 - i}"], "rows": 5}]))
        for i in range(3)
    ]
    (found,) = manifest.group(weights)
    assert found.weights == ("w.{0..2}",) and found.concat[0].weights == ("p.2", "p.1", "p.0")
    described = manifest.Manifest(entries=(found,))
    assert {name: rows.weight for name, rows in manifest.members(described.names(3)).items()} == {
        f"p.{2 - i}": f"w.{i}" for i in range(3)
    }


def test_a_name_stands_for_one_weight(joined: Path) -> None:
    config = json.loads((joined / "config.json").read_text())
    config[checkpoint.KEY]["aliases"] = {"l.0.q.weight": "l.0.qkv.weight"}
    (joined / "config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedError, match="l.0.q.weight: expected an alias"):
        checkpoint.open(joined)


def test_the_vectors_have_every_name() -> None:
    case = next(case for case in conformance.find() if case.name == "manifest/concat-rotated")
    weights, refusal = conformance._open(case)
    assert refusal is None and {"l.0.gate_up", "l.0.gate", "l.1.up"} <= weights.keys()
