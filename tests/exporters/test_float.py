"""Export of the codec ``float`` to FP8 and MXFP4: read again the values are the same; what cannot be so is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
from making import dense_folder, entry, folder, packed

from qformat import checkpoint
from qformat.converters.convert import convert
from qformat.converters.quantize.job import quantize
from qformat.dtypes import NUMPY, Array
from qformat.errors import QformatError, UnsupportedError, UsageError
from qformat.weight import PackedWeight

NAME = "model.layers.0.self_attn.q_proj.weight"
OTHER = "model.layers.1.mlp.down_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
TILES = {"codec": "float", "format": "e4m3fn", "block": [32, 48], "scales": "float32"}
MXFP4 = {"codec": "float", "format": "e2m1", "block": [1, 32], "scales": "float8_e8m0fnu"}


def weight(term: dict[str, Any], shape: tuple[int, ...] = (40, 96), **more: Any) -> PackedWeight:
    return packed(np.random.default_rng(len(json.dumps(term))), entry(shape, term, **more))


def settings(target: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((target / "config.json").read_text())["quantization_config"]
    return found


def same(target: Path, scheme: str, weights: dict[str, PackedWeight]) -> None:
    assert foreign.read(checkpoint.open(target))[1] == scheme
    values = foreign.decoded(foreign.plan_of(target))
    assert values.keys() == weights.keys()
    for name, one in weights.items():
        np.testing.assert_array_equal(values[name], one.decode())


@pytest.mark.parametrize("scales", ["float32", "bfloat16", "float16", "float8_e8m0fnu"])
@pytest.mark.parametrize(
    ("block", "method", "size"),
    [([32, 48], "fp8", [32, 48]), ([-1, -1], "fp8", None), ([1, -1], "fbgemm_fp8", None)],
)
def test_fp8(tmp_path: Path, block: list[int], method: str, size: list[int] | None, scales: str) -> None:
    term = {**TILES, "block": block, "scales": scales}
    weights = {NAME: weight(term), OTHER: weight(term, (33, 50))}
    dense = {
        "model.layers.0.mlp.gate.weight": np.ones((4, 96), np.float32),
        "model.norm.weight": np.ones(8, np.float32),
    }
    convert(folder(tmp_path / "source", weights, dense), tmp_path / "out", "fp8")
    same(tmp_path / "out", "fp8", weights)
    found = settings(tmp_path / "out")
    assert found["quant_method"] == method and found.get("weight_block_size") == size
    assert found["modules_to_not_convert"] == ["model.layers.0.mlp.gate"]
    tensors = checkpoint.open(tmp_path / "out").tensors
    assert tensors[NAME].tag == "F8_E4M3" and dense.keys() < tensors.keys()


def test_an_fp8_checkpoint_comes_out_as_it_went_in(tmp_path: Path) -> None:
    """Scales of activations, too, which the manifest alone has in between."""
    source = foreign.DATA / "layers" / "fp8-per-tensor-static"
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / name).symlink_to(source / name)
    convert(tmp_path / "source", tmp_path / "packed")
    convert(tmp_path / "packed", tmp_path / "out", "fp8")
    before, after = checkpoint.open(tmp_path / "source"), checkpoint.open(tmp_path / "out")
    assert before.tensors.keys() == after.tensors.keys()
    for name, tensor in before.tensors.items():
        assert (tensor.tag, tensor.shape) == (after.tensors[name].tag, after.tensors[name].shape)
        assert np.array_equal(before.raw(name), after.raw(name))
    assert settings(tmp_path / "out")["activation_scheme"] == "static"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({NAME: weight({**TILES, "format": "e5m2"})}, "e4m3fn for FP8, found e5m2"),
        ({NAME: weight({**TILES, "global_scale": "float32"})}, "no view, no global scale"),
        ({NAME: weight({**TILES, "scales": "float8_e4m3fn"})}, "scales of float32, .* found float8_e4m3fn"),
        ({NAME: weight({**TILES, "block": [-1, 16]})}, "tiles, rows or whole tensors"),
        ({NAME: weight(TILES), OTHER: weight({**TILES, "block": [8, 8]})}, "as the others for FP8"),
        ({NAME: weight({"codec": "int", "bits": 8})}, "one term of codec float for FP8, found int"),
        ({"model.embed_tokens.weight": weight(TILES)}, "of a linear layer"),
        ({EXPERTS: weight(TILES, (2, 40, 96), stack=1)}, "of a linear layer"),
        ({NAME: weight(TILES, rotation={"in": {"size": 32}})}, "one term of codec float .* and a rotation"),
    ],
)
def test_what_fp8_cannot_hold(tmp_path: Path, weights: dict[str, PackedWeight], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        convert(folder(tmp_path / "source", weights), tmp_path / "out", "fp8")
    assert not (tmp_path / "out").exists()


def gpt_oss(path: Path, weights: dict[str, PackedWeight], dense: dict[str, Array] | None = None) -> Path:
    source = folder(path, weights, dense)
    config = json.loads((source / "config.json").read_text()) | {"model_type": "gpt_oss"}
    (source / "config.json").write_text(json.dumps(config))
    return source


def test_mxfp4(tmp_path: Path) -> None:
    one = weight(MXFP4, (2, 96, 8), stack=1, transposed=True)
    bias = {f"{EXPERTS}_bias": np.ones((2, 8), NUMPY["bfloat16"])}
    convert(gpt_oss(tmp_path / "source", {EXPERTS: one}, bias), tmp_path / "out", "mxfp4")
    same(tmp_path / "out", "mxfp4", {EXPERTS: one})
    tensors = checkpoint.open(tmp_path / "out").tensors
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        f"{EXPERTS}_blocks": [2, 8, 3, 16],
        f"{EXPERTS}_scales": [2, 8, 3],
        f"{EXPERTS}_bias": [2, 8],
    }
    assert settings(tmp_path / "out")["quant_method"] == "mxfp4"


def test_a_dense_model_becomes_mxfp4(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {EXPERTS: rng.standard_normal((2, 64, 8)).astype(np.float32)}
    source = dense_folder(tmp_path / "source", tensors, model_type="gpt_oss")
    more = {"block": [1, 32], "scales": "float8_e8m0fnu", "global_scale": None}
    quantize(source, tmp_path / "packed", codec="float", bits=4, settings=more)
    convert(tmp_path / "packed", tmp_path / "out", "mxfp4")
    same(tmp_path / "out", "mxfp4", {EXPERTS: checkpoint.open(tmp_path / "packed")[EXPERTS]})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({EXPERTS: weight(MXFP4, (2, 8, 96), stack=1)}, "fused experts, inputs first"),
        ({NAME: weight(MXFP4)}, "fused experts, inputs first"),
        ({EXPERTS: weight({**MXFP4, "block": [1, 16]}, (2, 96, 8), stack=1, transposed=True)}, "alone for MXFP4"),
        ({EXPERTS: weight(MXFP4, (2, 80, 8), stack=1, transposed=True)}, "inputs in 32s for MXFP4, found 80"),
        ({EXPERTS: weight({"codec": "int", "bits": 4}, (2, 96, 8), stack=1, transposed=True)}, "codec float"),
    ],
)
def test_what_mxfp4_cannot_hold(tmp_path: Path, weights: dict[str, PackedWeight], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        convert(gpt_oss(tmp_path / "source", weights), tmp_path / "out", "mxfp4")


@pytest.mark.parametrize("target", ["fp8", "mxfp4"])
def test_nothing_packed_and_wrong_usage(tmp_path: Path, target: str) -> None:
    source = dense_folder(tmp_path / "source", {"a.weight": np.ones((4, 4), np.float32)}, model_type="gpt_oss")
    with pytest.raises(UsageError, match="packed weights"):
        convert(source, tmp_path / "out", target)
    with pytest.raises(QformatError, match="--dtype"):
        convert(source, tmp_path / "out", target, dtype="float32")


def test_mxfp4_is_of_one_model(tmp_path: Path) -> None:
    one = weight(MXFP4, (2, 96, 8), stack=1, transposed=True)
    with pytest.raises(UnsupportedError, match="a model of type gpt_oss"):
        convert(folder(tmp_path / "source", {EXPERTS: one}), tmp_path / "out", "mxfp4")
