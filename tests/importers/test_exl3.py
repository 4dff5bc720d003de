"""EXL3 files of random bits decode as a second decoder, written from the description of the format, decodes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foreign
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qformat import checkpoint
from qformat.converters.convert import convert
from qformat.converters.importers import find
from qformat.dtypes import Array
from qformat.errors import DamagedError, UnsupportedError

MODULE = "model.layers.0.mlp.up_proj"
MULTIPLIERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}


def states(trellis: Array) -> Array:
    """int16 [in / 16, out / 16, 16 K] -> the 16-bit state of each step: [in / 16, out / 16, 256]."""
    bits = trellis.shape[2] // 16
    words = trellis.view("<u4").astype(">u4")
    string = np.unpackbits(words.view(np.uint8), axis=-1)  # from the most significant bit of the first word on
    last = (np.arange(256) + 1) * bits  # a step's window ends with its own bits
    window = (last[:, None] + np.arange(-16, 0)) % (256 * bits)
    return string[..., window].astype(np.uint32) @ (1 << np.arange(15, -1, -1, dtype=np.uint32))


def values(state: Array, code: str, multiplier: int) -> Array:
    """float16 values of states."""
    x = state.astype(np.uint64)
    x = (x * np.uint64(89226354) + np.uint64(64248484)) if code == "3inst" else x * np.uint64(multiplier)
    x = x.astype(np.uint32)
    if code == "mul1":
        scale, offset = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16).astype(np.float64)
        return ((x.view(np.uint8).reshape(*x.shape, 4).sum(axis=-1) + 1024.0) * scale + offset).astype(np.float16)
    half = ((x & np.uint32(0x8FFF8FFF)) ^ np.uint32(0x3B603B60)).view(np.float16).reshape(*x.shape, 2)
    return half[..., 0] + half[..., 1]


def inner(trellis: Array, code: str, multiplier: int) -> Array:
    """The matrix between the rotations, float32 [in, out], placed element by element."""
    found = values(states(trellis), code, multiplier)
    down, across, _ = found.shape
    out = np.empty((down, 16, across, 16), np.float32)
    for step in range(256):
        lane, j = divmod(step, 8)
        row = 2 * (lane & 3) + (j & 1) + 8 * (j >> 1 & 1)
        column = (lane >> 2) + 8 * (j >> 2)
        out[:, row, :, column] = found[:, :, step]
    return out.reshape(16 * down, 16 * across)


def hadamard(size: int) -> Array:
    matrix = np.ones((1, 1))
    while len(matrix) < 128:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(np.eye(size // 128), matrix / np.sqrt(128))


def layer(
    rows: int = 128, cols: int = 256, bits: int = 2, code: str = "mul1", seed: int = 0, multiplier: int | None = None
) -> dict[str, Array]:
    """The tensors of one layer of random bits, sizes as stored."""
    rng = np.random.default_rng(seed)
    parts = {
        "trellis": rng.integers(-(1 << 15), 1 << 15, (cols // 16, rows // 16, 16 * bits)).astype(np.int16),
        "suh": rng.standard_normal(cols).astype(np.float16),
        "svh": rng.standard_normal(rows).astype(np.float16),
    }
    if code != "3inst":
        parts[code] = np.array(multiplier or MULTIPLIERS[code], np.uint32).view(np.int32)
    return {f"{MODULE}.{part}": array for part, array in parts.items()}


def write(folder: Path, tensors: dict[str, Array], **config: Any) -> Path:
    return foreign.write(folder, tensors, {"quantization_config": {"quant_method": "exl3", "bits": 3.0}, **config})


@settings(max_examples=24)
@given(
    bits=st.integers(1, 8),
    code=st.sampled_from(("3inst", "mcg", "mul1")),
    other=st.none() | st.integers(1, (1 << 32) - 1),
    rows=st.sampled_from((128, 256)),
    cols=st.sampled_from((128, 256)),
    seed=st.integers(0, 1 << 32),
)
def test_every_variant(
    tmp_path_factory: pytest.TempPathFactory, bits: int, code: str, other: int | None, rows: int, cols: int, seed: int
) -> None:
    multiplier = other or MULTIPLIERS.get(code, 0)
    tensors = layer(rows, cols, bits, code, seed, multiplier=multiplier)
    matrix = inner(tensors[f"{MODULE}.trellis"], code, multiplier)
    plan = foreign.plan_of(write(tmp_path_factory.mktemp("exl3"), tensors))
    (item,) = plan.items
    weight = item.packed()
    assert np.array_equal(weight.decode(rotated=True), matrix.T)
    suh, svh = (tensors[f"{MODULE}.{name}"].astype(np.float64) for name in ("suh", "svh"))
    wanted = suh[:, None] * (hadamard(cols) @ matrix @ hadamard(rows)) * svh
    assert foreign.difference(weight.decode(), wanted.T) < 1e-6
    assert (item.entry.label, item.entry.dtype) == ("bit-exact", "float16")
    assert ("multiplier" in item.entry.terms[0]) == (code != "3inst" and multiplier != MULTIPLIERS[code])


HIDDEN, HEADS, KV_HEADS, HEAD = "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"
INNER, EXPERT, SHARED = "intermediate_size", "moe_intermediate_size", "n_shared_experts"
LAYER = "model.layers.0"


@pytest.mark.parametrize(
    ("module", "config", "shape"),
    [
        (f"{LAYER}.mlp.up_proj", {HIDDEN: 192, INNER: 100}, (100, 192)),
        (f"{LAYER}.mlp.down_proj", {HIDDEN: 100, INNER: 192}, (100, 192)),
        (f"{LAYER}.self_attn.q_proj", {HIDDEN: 192, HEADS: 3, HEAD: 40}, (120, 192)),
        (f"{LAYER}.self_attn.k_proj", {HIDDEN: 192, HEADS: 4, KV_HEADS: 1}, (48, 192)),
        (f"{LAYER}.self_attn.o_proj", {HIDDEN: 96, HEADS: 4, HEAD: 30}, (96, 240)),  # with an output gate
        (f"{LAYER}.self_attn.o_proj", {HIDDEN: 96, HEADS: 4, "v_head_dim": 50}, (96, 200)),
        (f"{LAYER}.self_attn.o_proj", {HIDDEN: 96, HEADS: 4, HEAD: 48}, (96, 192)),
        (f"{LAYER}.mlp.experts.3.up_proj", {HIDDEN: 256, EXPERT: 90, INNER: 512}, (90, 256)),
        (f"{LAYER}.block_sparse_moe.experts.3.w1", {HIDDEN: 256, INNER: 90}, (90, 256)),
        (f"{LAYER}.mlp.shared_experts.up_proj", {HIDDEN: 256, EXPERT: 50, SHARED: 2}, (100, 256)),
        ("lm_head", {HIDDEN: 192, "vocab_size": 101}, (101, 192)),
        (f"{LAYER}.mlp.gate_proj", {"text_config": {HIDDEN: 192, INNER: 100}}, (100, 192)),
        (f"{LAYER}.mixer.in_proj", {HIDDEN: 192}, (128, 256)),  # no size known: as stored, and said so
    ],
)
def test_padding(tmp_path: Path, module: str, config: dict[str, Any], shape: tuple[int, int]) -> None:
    """Sizes are the model's by the role of the module; the bias is cut as the rows are."""
    tensors = layer() | {f"{MODULE}.bias": np.arange(128).astype(np.float16)}
    padded = foreign.decoded(foreign.plan_of(write(tmp_path / "bare", tensors)))[f"{MODULE}.weight"]
    tensors = {name.replace(MODULE, module): array for name, array in tensors.items()}
    plan = foreign.plan_of(write(tmp_path / "sized", tensors, **config))
    weight, bias = plan.items
    assert weight.entry.shape == shape and weight.packed().decode(rotated=True).shape == (128, 256)
    assert np.array_equal(weight.packed().decode(), padded[: shape[0], : shape[1]])
    assert np.array_equal(bias.tensors()[f"{module}.bias"], np.arange(shape[0]))
    assert any("as stored" in note for note in plan.notes) == ("mixer" in module)


def test_a_size_that_padding_does_not_explain(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=r"up_proj\.trellis: expected 300 by config.json.*found 128"):
        foreign.plan_of(write(tmp_path, layer(), hidden_size=256, intermediate_size=300))


def test_signs_of_the_oldest_files(tmp_path: Path) -> None:
    """Bit i of word w is element 16 w + i, 1 is negative."""
    tensors = layer()
    rng = np.random.default_rng(1)
    for old, new, size in (("su", "suh", 256), ("sv", "svh", 128)):
        signs = rng.choice([-1, 1], size)
        words = [sum(int(sign < 0) << i for i, sign in enumerate(signs[at : at + 16])) for at in range(0, size, 16)]
        del tensors[f"{MODULE}.{new}"]
        tensors[f"{MODULE}.{old}"] = np.array(words, np.uint16).view(np.int16)
        tensors[new] = signs.astype(np.int8)  # kept here to compare with
    wanted = {f"{side}_scale": tensors.pop(name) for side, name in (("in", "suh"), ("out", "svh"))}
    (item,) = foreign.plan_of(write(tmp_path, tensors)).items
    parts = item.make()
    assert all(np.array_equal(parts[name], signs) for name, signs in wanted.items())
    item.packed().check()


def test_the_head_and_what_is_not_read(tmp_path: Path) -> None:
    """A packed head is stored, whatever config.json says of a tie; `scale` is left out; listed tensors are missed."""
    tensors = {name.replace(MODULE, "lm_head"): array for name, array in layer().items()}
    tensors["lm_head.scale"] = np.ones(1, np.float16)
    tensors["model.embed_tokens.weight"] = np.ones((101, 192), ml_dtypes.bfloat16)
    listed = {"model.norm": {"stored_tensors": {"model.norm.weight": {"shape": [192]}}}}
    config = {"hidden_size": 192, "vocab_size": 101, "tie_word_embeddings": True}
    folder = write(tmp_path / "source", tensors, **config)
    own = {"quant_method": "exl3", "bits": 3.0, "tensor_storage": listed}
    foreign.write(folder, tensors, {**config, "quantization_config": {"quant_method": "exl3"}}, quantization_config=own)
    report = convert(folder, tmp_path / "target")
    assert report["coverage"] == {"tensors": 6, "consumed": 4, "passed": 1, "left_out": ["lm_head.scale"]}
    assert any("model.norm.weight" in note for note in report["notes"])
    packed = checkpoint.open(tmp_path / "target")
    assert packed.config["tie_word_embeddings"] is False
    assert packed.manifest is not None and packed.manifest.provenance["settings"] == {
        "quant_method": "exl3",
        "bits": 3.0,
    }


def test_it_is_found_without_settings_and_qtip_is_not_taken_for_it(tmp_path: Path) -> None:
    folder = foreign.write(tmp_path / "bare", layer(), {})
    assert find(checkpoint.open(folder))[0].NAME == "exl3"
    qtip = {f"{MODULE}.trellis": np.ones((64, 32), np.int16), f"{MODULE}.SU": np.ones(256, np.float16)}
    for config, kind in (({}, DamagedError), ({"quantization_config": {"quant_method": "qtip"}}, UnsupportedError)):
        with pytest.raises(kind):
            find(checkpoint.open(foreign.write(tmp_path / "qtip", qtip, config)))


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("mcg", lambda _: np.array(MULTIPLIERS["mcg"], np.uint32).view(np.int32), "mul1"),
        ("mul1", lambda _: np.array(0, np.int32), "multiplier"),
        ("mul1", lambda _: np.zeros(2, np.int32), "int32"),
        ("trellis", lambda array: array * 0, "0 throughout"),
        ("trellis", lambda array: array[..., :-1], "K from 1 to 8"),
        ("trellis", lambda array: np.tile(array, 5), "K from 1 to 8"),
        ("trellis", lambda array: array[:4], "in 128s"),
        ("trellis", lambda array: array.astype(np.int32), "int32"),
        ("suh", lambda array: array[:-1], "256"),
        ("suh", lambda array: array.astype(np.float32), "float32"),
        ("svh", lambda array: array * np.float16("nan"), "finite"),
        ("su", lambda _: np.zeros(16, np.int16), "both"),
        ("bias", lambda _: np.zeros(64, np.float16), "128"),
        ("weight", lambda _: np.zeros((128, 256), np.float16), "both"),
    ],
)
def test_what_is_damaged(tmp_path: Path, part: str, change: Any, words: str) -> None:
    tensors = layer()
    name = f"{MODULE}.{part}"
    tensors[name] = change(tensors.get(name))
    with pytest.raises(DamagedError) as caught:
        foreign.decoded(foreign.plan_of(write(tmp_path, tensors)))
    assert name in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("part", ["suh", "svh", "trellis"])
def test_what_is_missing(tmp_path: Path, part: str) -> None:
    tensors = layer()
    del tensors[f"{MODULE}.{part}"]
    with pytest.raises(DamagedError, match=rf"{MODULE}\.(suh|svh|trellis|mul1)"):
        foreign.plan_of(write(tmp_path, tensors))
