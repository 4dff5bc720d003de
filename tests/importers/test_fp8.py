"""FP8 files written element by element decode to element times scale; what contradicts itself is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foreign
import ml_dtypes
import numpy as np
import pytest

from qformat.converters.importers import find
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError, UnsupportedError
from qformat.records import read_json

MODULE = "model.layers.0.mlp.up_proj"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LEVELS = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def codes(shape: tuple[int, ...], dtype: Any = E4M3, seed: int = 0) -> Array:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return values.astype(dtype)


def scales(shape: tuple[int, ...], dtype: str = "float32", seed: int = 1) -> Array:
    if dtype in ("uint8", "float8_e8m0fnu"):
        exponents = np.random.default_rng(seed).integers(100, 130, shape).astype(np.uint8)
        return exponents if dtype == "uint8" else exponents.view(NUMPY[dtype])
    return np.random.default_rng(seed).uniform(0.01, 0.1, shape).astype(np.float32).astype(NUMPY[dtype])


def numbers(scale: Array) -> Array:
    if scale.dtype == np.uint8:
        return np.exp2(scale.astype(np.float32) - 127)
    return scale.astype(np.float32)


def write(folder: Path, tensors: dict[str, Array], quant: dict[str, Any] | None = None, **config: Any) -> Path:
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", **(quant or {})}
    return foreign.write(folder, tensors, {"quantization_config": settings, **config})


def decoded(folder: Path) -> dict[str, Array]:
    return foreign.decoded(foreign.plan_of(folder))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8"])
@pytest.mark.parametrize("tile", [[128, 128], [32, 32], [3, 200]])
def test_tiles(tmp_path: Path, dtype: str, tile: list[int]) -> None:
    """The last tile of an axis is short: 192 rows and two tiles of 128 are not tiles of 96."""
    weight = codes((192, 160))
    scale = scales((-(-192 // tile[0]), -(-160 // tile[1])), dtype)
    tensors = {f"{MODULE}.weight": weight, f"{MODULE}.weight_scale_inv": scale}
    found = decoded(write(tmp_path, tensors, {"weight_block_size": tile}))[f"{MODULE}.weight"]
    for i, j in ((0, 0), (95, 3), (96, 5), (127, 127), (128, 128), (191, 159)):
        assert found[i, j] == np.float32(weight[i, j]) * numbers(scale)[i // tile[0], j // tile[1]]


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight", "scale_weight"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (12,), (12, 1)])
def test_a_tensor_or_its_rows(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    weight, scale = codes((12, 40)), scales(shape)
    tensors = {f"{MODULE}.weight": weight, f"{MODULE}.{name}": scale}
    plan = foreign.plan_of(write(tmp_path, tensors))
    found = foreign.decoded(plan)[f"{MODULE}.weight"]
    assert np.array_equal(found, weight.astype(np.float32) * scale.reshape(-1, 1))
    (item,) = plan.items
    assert item.entry.terms[0]["block"] == ([1, -1] if scale.size > 1 else [-1, -1])
    assert (item.entry.label, item.entry.dtype, plan.left_out) == ("bit-exact", "bfloat16", ())


@pytest.mark.parametrize("form", ["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz"])
def test_the_dtype_of_the_tensor_is_the_format(tmp_path: Path, form: str) -> None:
    weight = codes((4, 8), getattr(ml_dtypes, f"float8_{form}"))
    tensors = {f"{MODULE}.weight": weight, f"{MODULE}.weight_scale": scales(())}
    found = decoded(write(tmp_path, tensors))[f"{MODULE}.weight"]
    assert np.array_equal(found, weight.astype(np.float32) * tensors[f"{MODULE}.weight_scale"])


def test_scales_with_four_axes(tmp_path: Path) -> None:
    weight, scale = codes((200, 130)), scales((2, 1, 2, 1))
    tensors = {f"{MODULE}.weight": weight, f"{MODULE}.weight_scale": scale}
    found = decoded(write(tmp_path, tensors))[f"{MODULE}.weight"]
    assert found[199, 129] == np.float32(weight[199, 129]) * scale[1, 0, 1, 0]
    assert found[127, 128] == np.float32(weight[127, 128]) * scale[0, 0, 1, 0]


@pytest.mark.parametrize("dtype", ["uint8", "float8_e8m0fnu"])
def test_groups_with_an_exponent(tmp_path: Path, dtype: str) -> None:
    weight, scale = codes((3, 96)), scales((3, 3), dtype)
    tensors = {f"{MODULE}.weight": weight, f"{MODULE}.weight_scale": scale}
    found = decoded(write(tmp_path, tensors))[f"{MODULE}.weight"]
    assert np.array_equal(found, weight.astype(np.float32) * np.repeat(numbers(scale), 32, axis=1))


@pytest.mark.parametrize("name", ["weight_scale_inv", "scale"])
def test_int8_beside_exponents_is_fp4(tmp_path: Path, name: str) -> None:
    """As DeepSeek's FP4 experts, whatever the tile of the others is: the even element is in the lower half."""
    packed = np.random.default_rng(0).integers(-128, 128, (4, 32)).astype(np.int8)
    scale = scales((4, 2), "float8_e8m0fnu")
    tensors = {f"{MODULE}.weight": packed, f"{MODULE}.{name}": scale}
    found = decoded(write(tmp_path, tensors, {"weight_block_size": [128, 128]}))[f"{MODULE}.weight"]
    for i, j in ((0, 0), (1, 31), (2, 32), (3, 63)):
        code = int(packed.view(np.uint8)[i, j // 2]) >> 4 * (j % 2) & 15
        value = np.float32(LEVELS[code & 7] * (-1) ** (code >> 3))
        assert found[i, j] == value * np.float32(scale[i, j // 32])


@pytest.mark.parametrize("shape", [(), (2,), (2, 1, 1)])
@pytest.mark.parametrize("name", ["scale_inv", "scale", "weight_scale"])
def test_fused_experts(tmp_path: Path, shape: tuple[int, ...], name: str) -> None:
    weight, scale = codes((2, 6, 8)), scales(shape)
    tensors = {EXPERTS: weight, f"{EXPERTS}_{name}": scale, f"{EXPERTS}_activation_scale": scales((2,))}
    plan = foreign.plan_of(write(tmp_path, tensors))
    (item,) = plan.items
    assert item.entry.stack == 1 and not item.entry.transposed
    found = foreign.decoded(plan)[EXPERTS]
    assert np.array_equal(found, weight.astype(np.float32) * scale.reshape(-1, 1, 1))
    assert plan.activations["activation_scale"][EXPERTS] == tensors[f"{EXPERTS}_activation_scale"].tolist()


def test_tiles_of_fused_experts(tmp_path: Path) -> None:
    weight, scale = codes((2, 6, 8)), scales((2, 2, 2))
    folder = write(tmp_path, {EXPERTS: weight, f"{EXPERTS}_scale_inv": scale}, {"weight_block_size": [4, 4]})
    spread = np.repeat(np.repeat(scale, 4, axis=1)[:, :6], 4, axis=2)
    assert np.array_equal(decoded(folder)[EXPERTS], weight.astype(np.float32) * spread)


@pytest.mark.parametrize("shape", [(2, 1, 6), (2, 6, 1)])
def test_llama4_holds_inputs_first(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """FBGEMM stores the scales of gate_up_proj along the last axis and those of down_proj along the middle one."""
    weight, scale = codes((2, 8, 6)), scales(shape)
    tensors = {EXPERTS: weight, f"{EXPERTS}_scale": scale}
    plan = foreign.plan_of(write(tmp_path, tensors, {"quant_method": "fbgemm_fp8"}, model_type="llama4_text"))
    (item,) = plan.items
    assert item.entry.transposed and item.entry.shape == (2, 8, 6)
    wanted = weight.astype(np.float32) * scale.reshape(2, 1, 6)
    assert np.array_equal(foreign.decoded(plan)[EXPERTS], wanted)


@pytest.mark.parametrize("dtype", ["uint8", "float8_e8m0fnu"])
@pytest.mark.parametrize("inputs", [96, 40])
def test_groups_of_inputs_first(tmp_path: Path, dtype: str, inputs: int) -> None:
    """Scales lie as their weight does: [experts, in / 32, out]."""
    weight, scale = codes((2, inputs, 6)), scales((2, -(-inputs // 32), 6), dtype)
    tensors = {EXPERTS: weight, f"{EXPERTS}_scale": scale}
    found = decoded(write(tmp_path / "source", tensors, model_type="llama4_text"))[EXPERTS]
    assert np.array_equal(found, weight.astype(np.float32) * np.repeat(numbers(scale), 32, axis=1)[:, :inputs])
    tensors[f"{EXPERTS}_scale"] = np.ascontiguousarray(scale.swapaxes(1, 2))
    with pytest.raises(DamagedError, match=r"scales of shape .* found"):
        decoded(write(tmp_path / "outputs_first", tensors, model_type="llama4_text"))


def test_fp4_of_inputs_first_is_refused(tmp_path: Path) -> None:
    tensors = {EXPERTS: np.ones((2, 32, 6), np.int8), f"{EXPERTS}_scale": scales((2, 1, 6), "uint8")}
    with pytest.raises(UnsupportedError, match="experts.gate_up_proj: expected FP8 where inputs come first"):
        decoded(write(tmp_path, tensors, model_type="llama4_text"))


def test_activation_scales_stand_in_the_manifest_alone(tmp_path: Path) -> None:
    tensors = {
        f"{MODULE}.weight": codes((4, 8)),
        f"{MODULE}.weight_scale": scales((1,)),
        f"{MODULE}.input_scale": np.array(0.25, np.float32),
        f"{MODULE}.bias": np.ones(4, np.float32),
        "model.layers.0.self_attn.k_scale": np.array([0.5], NUMPY["bfloat16"]),
    }
    source = write(tmp_path / "source", tensors, {"activation_scheme": "static"})
    packed = foreign.converted(source, tmp_path)
    assert packed.manifest is not None
    assert packed.manifest.activations == {"scheme": "static", "input_scale": {f"{MODULE}.weight": 0.25}}
    assert packed.manifest.kv_cache == {"model.layers.0.self_attn.k_scale": 0.5}
    assert packed.tensors.keys() == {f"{MODULE}.{part}" for part in ("weight_codes", "weight_scales", "bias")}
    account = packed.manifest.provenance["source"]
    assert (account["consumed"], account["passed"]) == (3, 1)
    assert account["left_out"] == ["model.layers.0.self_attn.k_scale"]
    assert (
        read_json((tmp_path / "packed" / "config.json").read_bytes())["quantization_config"]["quant_method"]
        == "qformat"
    )


def test_a_marker_of_scaled_weights_is_left_out(tmp_path: Path) -> None:
    """As files of diffusion models have it, whose scales are called otherwise; and one that is nothing but cast."""
    weight, scale = codes((4, 8)), scales(())
    tensors = {"a.weight": weight, "a.scale_weight": scale, "scaled_fp8": np.zeros(0, E4M3)}
    plan = foreign.plan_of(foreign.write(tmp_path / "scaled", tensors, {}))
    assert np.array_equal(foreign.decoded(plan)["a.weight"], weight.astype(np.float32) * scale)
    assert plan.left_out == ("scaled_fp8",)
    with pytest.raises(DamagedError, match="a.weight: expected one scale beside it"):
        foreign.plan_of(foreign.write(tmp_path / "cast", {"a.weight": weight}, {}))


def test_a_tile_larger_than_the_matrix(tmp_path: Path) -> None:
    tensors = {f"{MODULE}.weight": codes((4, 8)), f"{MODULE}.weight_scale_inv": scales((1, 1))}
    found = decoded(write(tmp_path, tensors, {"weight_block_size": [128, 128]}))[f"{MODULE}.weight"]
    wanted = tensors[f"{MODULE}.weight"].astype(np.float32) * tensors[f"{MODULE}.weight_scale_inv"]
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("listed", [[MODULE, 3], MODULE, 5, {"a": 1}])
def test_modules_that_the_settings_exclude_are_told(tmp_path: Path, listed: Any) -> None:
    """Tensors decide; settings of any kind are borne."""
    tensors = {f"{MODULE}.weight": codes((4, 8)), f"{MODULE}.weight_scale": scales(())}
    plan = foreign.plan_of(write(tmp_path, tensors, {"modules_to_not_convert": listed}))
    assert any("although the settings exclude" in note for note in plan.notes) == isinstance(listed, list)


def test_no_activations_where_the_source_has_none(tmp_path: Path) -> None:
    tensors = {f"{MODULE}.weight": codes((4, 8)), f"{MODULE}.weight_scale": scales(())}
    folder = foreign.write(tmp_path, tensors, {"quantization_config": {"quant_method": "fbgemm_fp8"}})
    assert foreign.plan_of(folder).activations is None


@pytest.mark.parametrize(
    ("settings", "detected"),
    [
        ({"quant_method": "fp8"}, True),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, True),
        ({"quant_method": "compressed-tensors", "transform_config": {"R1": {}}}, False),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, True),
        ({"quant_method": "another"}, False),
        (None, True),
    ],
)
def test_detection(tmp_path: Path, settings: dict[str, Any] | None, detected: bool) -> None:
    tensors = {f"{MODULE}.weight": codes((4, 8)), f"{MODULE}.weight_scale": scales(())}
    folder = foreign.write(tmp_path, tensors, {"quantization_config": settings} if settings else {})
    if detected:
        assert find(foreign.checkpoint.open(folder))[0].NAME == "fp8"
    else:
        with pytest.raises(UnsupportedError):
            find(foreign.checkpoint.open(folder))


GOOD = {f"{MODULE}.weight": codes((4, 8)), f"{MODULE}.weight_scale_inv": scales((2, 2))}
TILED = {"weight_block_size": [2, 4]}


def changed(**parts: Array | None) -> dict[str, Array]:
    tensors = {**GOOD, **{f"{MODULE}.{part}": array for part, array in parts.items()}}
    return {name: array for name, array in tensors.items() if array is not None}


def with_code(code: int) -> Array:
    weight = codes((4, 8)).view(np.uint8)
    weight[2, 3] = code
    return weight.view(E4M3)


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        (changed(weight_scale_inv=None), TILED, "up_proj.weight: expected one scale beside it"),
        (changed(weight_scale=scales(())), TILED, "one scale beside it.*found weight_scale_inv and weight_scale"),
        (changed(weight_scale_inv=scales((2, 3))), TILED, r"shape \[2, 2\] for \[4, 8\], found float32 \[2, 3\]"),
        (GOOD, {}, r"up_proj.weight_scale_inv: expected .* scales of shape .* found float32 \[2, 2\]"),
        (GOOD, {"weight_block_size": [4, 4]}, r"scales of shape \[1, 2\]"),
        (GOOD, {"weight_block_size": "large"}, "weight_block_size of two sizes"),
        (GOOD, {"weight_block_size": [0, 4]}, "weight_block_size of two sizes"),
        (changed(weight_scale_inv=np.ones((2, 2), np.int32)), TILED, r"found int32 \[2, 2\]"),
        (changed(weight_scale_inv=np.full((2, 2), np.nan, np.float32)), TILED, "weight_scale_inv: expected finite"),
        (changed(weight_scale_inv=np.full((2, 2), 255, np.uint8)), TILED, "weight_scale_inv: expected finite"),
        (changed(weight=with_code(0x7F)), TILED, "up_proj.weight: expected finite numbers, found 1 that are not"),
        (GOOD, {**TILED, "fmt": "e5m2"}, "up_proj.weight: expected e5m2, as fmt .* found float8_e4m3fn"),
        (changed(weight=np.ones((4, 8), np.float16)), TILED, "float8 beside their scales"),
        ({**GOOD, "x.weight": np.ones((4, 8), np.float16), "x.weight_scale_inv": scales(())}, TILED, "a float8 weight"),
        (changed(input_scale=np.array(np.inf, np.float32)), TILED, "input_scale: expected finite"),
    ],
)
def test_what_is_refused(tmp_path: Path, tensors: dict[str, Array], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        decoded(write(tmp_path, tensors, settings))
