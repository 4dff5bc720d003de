"""Export of the codec ``trellis`` to EXL3: read again the values are the same, and what cannot be so is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
from making import entry, folder, packed

from qformat import checkpoint
from qformat.converters.convert import convert
from qformat.converters.exporters.exl3 import HINT, ORDER
from qformat.converters.quantize.job import quantize
from qformat.errors import UnsupportedError, UsageError
from qformat.weight import PackedWeight

NAME = "model.layers.0.mlp.up_proj.weight"
TERM = {"codec": "trellis", "L": 16, "bits": [2], "code": "mul1", "order": ORDER, "reversed": True}
TURN = {"in": {"size": 128, "scale": "int8"}, "out": {"size": 128, "scale": "float16"}}
SAME = [case for case in sorted((foreign.DATA / "layers").iterdir()) if case.name.startswith("exl3-")]


def weight(term: dict[str, Any], scale: float | None = None, **more: Any) -> PackedWeight:
    item = entry((128, 256), term, **{"rotation": TURN, **more})
    one = packed(np.random.default_rng(0), item)
    parts = {name: np.sign(part) + (part == 0) if name == "in_scale" else part for name, part in one.parts.items()}
    parts = {name: part.astype(one.parts[name].dtype) for name, part in parts.items()}
    if scale is not None:
        parts["scales"] = np.full((1, 1), scale, parts["scales"].dtype)
    return PackedWeight("w", one.entry, parts)


def exported(tmp_path: Path, one: PackedWeight, name: str = NAME, **dense: Any) -> Path:
    source = folder(tmp_path / "source", {name: one}, {f"model.layers.0.mlp.up_proj.{k}": v for k, v in dense.items()})
    convert(source, tmp_path / "exl3", "exl3")
    return tmp_path / "exl3"


@pytest.mark.parametrize("case", SAME, ids=lambda case: case.name)
def test_there_and_back(case: Path, tmp_path: Path) -> None:
    """An EXL3 model, imported and exported, has its own tensors again, but for signs that are now float16."""
    convert(case, tmp_path / "packed")
    convert(tmp_path / "packed", tmp_path / "back", "exl3")
    own, back = checkpoint.open(case), checkpoint.open(tmp_path / "back")
    for name, tensor in own.tensors.items():
        if name.rpartition(".")[2] in ("su", "sv"):
            continue
        assert back.tensors[name].tag == tensor.tag, name
        stored = back.array(name)
        kept = 64 if name.endswith("bias") else stored.size  # beyond the rows a bias has no meaning
        assert np.array_equal(stored.ravel()[:kept], own.array(name).ravel()[:kept])
    first, second = (foreign.decoded(foreign.plan_of(path)) for path in (case, tmp_path / "back"))
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(second[name], values)


@pytest.mark.parametrize("code", ["mul1", "mcg", "3inst"])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_every_code(tmp_path: Path, code: str, bits: int) -> None:
    one = weight({**TERM, "code": code, "bits": [bits]})
    target = exported(tmp_path, one, bias=np.arange(128).astype(np.float32) / 8)
    assert np.array_equal(foreign.decoded(foreign.plan_of(target))[NAME], one.decode())
    tensors = checkpoint.open(target)
    assert (f"model.layers.0.mlp.up_proj.{code}" in tensors.tensors) == (code != "3inst")
    assert tensors.tensors["model.layers.0.mlp.up_proj.bias"].tag == "F16"
    settings = json.loads((target / "config.json").read_text())["quantization_config"]
    assert settings == {"quant_method": "exl3", "bits": bits, "head_bits": 16, "codebook": code}


@pytest.mark.parametrize("scale", [0.25, 2.0])
def test_a_scale_that_folds(tmp_path: Path, scale: float) -> None:
    one = weight({**TERM, "scales": "float32", "block": [-1, -1]}, scale)
    np.testing.assert_allclose(
        foreign.decoded(foreign.plan_of(exported(tmp_path, one)))[NAME], one.decode(), rtol=0, atol=1e-6
    )


def test_what_quantize_packs(tmp_path: Path) -> None:
    """The settings of the hint, on weights that need padding."""
    rng = np.random.default_rng(0)
    dense = {NAME: rng.standard_normal((100, 160)).astype(np.float32)}
    foreign.write(tmp_path / "dense", dense, {"hidden_size": 160, "intermediate_size": 100})
    assert all(f"--set {key}" in HINT for key in ("code=mul1", "scales=null", "reversed=true", f"order='{ORDER}'"))
    settings = {"code": "mul1", "scales": None, "reversed": True, "order": ORDER}
    quantize(tmp_path / "dense", tmp_path / "q", codec="trellis", bits=3, rotate="128", settings=settings)
    report = convert(tmp_path / "q", tmp_path / "exl3", "exl3")
    assert any("1 layers padded" in note or "padded to multiples of 128" in note for note in report["notes"])
    (one,) = checkpoint.open(tmp_path / "q").values()
    assert one.entry.stored_shape == (128, 256)
    assert foreign.difference(one.decode(), dense[NAME]) < 0.2
    assert np.array_equal(foreign.decoded(foreign.plan_of(tmp_path / "exl3"))[NAME], one.decode())


@pytest.mark.parametrize(
    ("term", "more", "words"),
    [
        ({"codec": "int", "bits": 4, "zero": 8}, {}, "one term of codec trellis for EXL3, found int"),
        ({**TERM, "code": "1mad"}, {}, "code mul1 or mcg or 3inst for EXL3, found 1mad"),
        ({**TERM, "multiplier": 5}, {}, "the multiplier 2212286765"),
        ({**TERM, "L": 12}, {}, "L 16 for EXL3, found 12"),
        ({**TERM, "bits": [2, 3]}, {}, "one width"),
        ({**TERM, "tile": [8, 16], "order": "c0 c1 c2 c3 r0 r1 r2"}, {}, "tiles of 16 x 16"),
        ({**TERM, "order": "c0 c1 c2 c3 r0 r1 r2 r3"}, {}, "found c0 c1 c2 c3 r0 r1 r2 r3, reversed"),
        ({**TERM, "reversed": False}, {}, "not reversed"),
        ({**TERM, "scales": "float16"}, {}, r"one scale at most for EXL3, found block \[1, -1\]"),
        (TERM, {"rotation": None}, "blocks of 128 on the side in for EXL3, found 1"),
        (TERM, {"rotation": {**TURN, "out": {"size": 64}}}, "on the side out for EXL3, found 64"),
        (TERM, {"rotation": {**TURN, "in": {"size": 128, "perm": "int32"}}}, "another transform"),
        (TERM, {"rotation": {"in": {"size": 128}, "out": {"size": 128, "scale": "float32"}}}, "scales that float16"),
        (TERM, {"shape": (100, 100), "stored_shape": (256, 128)}, r"padded to \[128, 128\] for EXL3"),
        (TERM, {"shape": (256, 128), "transposed": True}, "a matrix"),
        (TERM, {"shape": (2, 128, 128), "stack": 1}, "a matrix"),
    ],
)
def test_what_exl3_cannot_hold(tmp_path: Path, term: dict[str, Any], more: dict[str, Any], words: str) -> None:
    item = entry(more.pop("shape", (128, 256)), term, **{"rotation": TURN, **more})
    one = PackedWeight("w", item, packed(np.random.default_rng(0), item).parts)
    with pytest.raises(UnsupportedError, match=words):
        exported(tmp_path, one)
    assert not (tmp_path / "exl3").exists()


def test_a_scale_that_does_not_fold_and_other_refusals(tmp_path: Path) -> None:
    scaled = weight({**TERM, "scales": "float32", "block": [-1, -1]}, 1.1)
    with pytest.raises(UnsupportedError, match="a scale of 1.1"):
        exported(tmp_path / "scale", scaled)
    with pytest.raises(UnsupportedError, match="bias that float16 holds"):
        exported(tmp_path / "bias", weight(TERM), bias=np.full(128, 1e-9, np.float32))
    with pytest.raises(UnsupportedError, match="linear layer"):
        exported(tmp_path / "embedding", weight(TERM), name="model.embed_tokens.weight")
    with pytest.raises(UsageError, match="--dtype"):
        convert(folder(tmp_path / "dtype", {NAME: weight(TERM)}), tmp_path / "exl3", "exl3", dtype="float16")
