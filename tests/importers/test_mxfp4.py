"""gpt-oss's experts, written element by element, decode in the orientation of the model."""

from __future__ import annotations

from pathlib import Path

import foreign
import numpy as np
import pytest

from qformat.converters.importers import find
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError, UnsupportedError

EXPERTS = "model.layers.0.mlp.experts"
LEVELS = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
CONFIG = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}


def experts(out: int = 4, groups: int = 3, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        f"{EXPERTS}.gate_up_proj_blocks": rng.integers(0, 256, (2, out, groups, 16), np.uint8),
        f"{EXPERTS}.gate_up_proj_scales": rng.integers(100, 140, (2, out, groups)).astype(np.uint8),
        f"{EXPERTS}.gate_up_proj_bias": rng.standard_normal((2, out)).astype(NUMPY["bfloat16"]),
    }


def value(blocks: Array, scales: Array, expert: int, row: int, col: int) -> float:
    byte = int(blocks[expert, row, col // 32, col % 32 // 2])
    code = byte >> 4 * (col % 2) & 15
    return LEVELS[code & 7] * (-1) ** (code >> 3) * 2.0 ** (int(scales[expert, row, col // 32]) - 127)


def test_the_model_holds_inputs_first(tmp_path: Path) -> None:
    """Rows of gate and up keep their places, one after the other, as in the biases."""
    tensors = experts()
    packed = foreign.converted(foreign.write(tmp_path / "source", tensors, CONFIG), tmp_path)
    weight = packed[f"{EXPERTS}.gate_up_proj"]
    assert weight.shape == (2, 96, 4) and weight.entry.transposed and weight.entry.label == "bit-exact"
    found = weight.decode()
    blocks, scales, bias = tensors.values()
    for expert, row, col in np.ndindex(2, 4, 96):
        assert found[expert, col, row] == np.float32(value(blocks, scales, expert, row, col))
    assert np.array_equal(packed.array(f"{EXPERTS}.gate_up_proj_bias"), bias)
    assert packed.tensors.keys() == {f"{EXPERTS}.gate_up_proj_{part}" for part in ("codes", "scales", "bias")}


def test_the_original_files_hold_outputs_first(tmp_path: Path) -> None:
    blocks, scales, _ = experts().values()
    name = "block.0.mlp.mlp1_weight"
    tensors = {f"{name}.blocks": blocks, f"{name}.scales": scales, "block.0.mlp.norm.scale": np.ones(4, np.float32)}
    folder = foreign.write(tmp_path, tensors, {"num_experts": 2})
    assert find(foreign.checkpoint.open(folder))[0].NAME == "mxfp4"
    plan = foreign.plan_of(folder)
    found = foreign.decoded(plan)[name]
    assert found.shape == (2, 4, 96) and found[1, 2, 33] == np.float32(value(blocks, scales, 1, 2, 33))
    assert {item.name for item in plan.items} == {name, "block.0.mlp.norm.scale"}


def test_a_dense_copy_is_not_of_this_scheme(tmp_path: Path) -> None:
    dense = {f"{EXPERTS}.gate_up_proj": np.ones((2, 96, 4), NUMPY["bfloat16"])}
    assert (
        find(foreign.checkpoint.open(foreign.write(tmp_path / "a", dense, {"model_type": "gpt_oss"})))[0].NAME
        == "dense"
    )
    with pytest.raises(UnsupportedError):
        find(foreign.checkpoint.open(foreign.write(tmp_path / "b", dense, CONFIG)))


def damaged(**parts: Array | None) -> dict[str, Array]:
    tensors = {**experts(), **{f"{EXPERTS}.gate_up_proj{part}": array for part, array in parts.items()}}
    return {name: array for name, array in tensors.items() if array is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (damaged(_scales=None), "gate_up_proj_blocks: expected .*gate_up_proj_scales beside it, found none"),
        (damaged(_scales=np.ones((2, 4, 2), np.uint8)), r"exponents in uint8 \[2, 4, 3\], found uint8 \[2, 4, 2\]"),
        (damaged(_scales=np.ones((2, 4, 3), np.float32)), r"exponents in uint8 .* found float32"),
        (damaged(_scales=np.full((2, 4, 3), 255, np.uint8)), "gate_up_proj_scales: expected finite numbers, found 24"),
        (
            damaged(_blocks=np.ones((2, 4, 3, 8), np.uint8)),
            r"\[experts, out, in / 32, 16\], found uint8 \[2, 4, 3, 8\]",
        ),
        ({**experts(), f"{EXPERTS}.gate_up_proj": np.ones((2, 96, 4), np.float16)}, "one weight.*found both"),
        ({**experts(), f"{EXPERTS}.down_proj_scales": np.ones((2, 4, 3), np.uint8)}, "blocks beside the scales"),
    ],
)
def test_what_is_refused(tmp_path: Path, tensors: dict[str, Array], message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        foreign.decoded(foreign.plan_of(foreign.write(tmp_path, tensors, CONFIG)))
