"""QuIP# files of random codes decode as a second decoder, written from the description of the format, decodes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qformat import checkpoint, tables
from qformat.converters.convert import convert
from qformat.converters.importers import find, quip
from qformat.dtypes import Array
from qformat.errors import DamagedError, QformatError, UnsupportedError

ONE, QKV, UPGATE = (f"model.layers.3.{name}" for name in ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.upgate_proj"))
CONFIG = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 80}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
BOOKS = {"E8P12": (7, 1), "E8P12RVQ3B": (18, 0), "E8P12RVQ4B": (17, 1), "D4": (0, 0), "HI4B1C": (10, 0)}


def params(codebook: str = "E8P12", **changes: Any) -> dict[str, Any]:
    own = {"codebook": codebook, "codebook_version": BOOKS[codebook][1], "codesz": 8, "lora_rank": 0}
    return {**own, "rescale_WH": False, "resid_scale_override": -1, **changes}


def e8p12(code: int) -> list[float]:
    """Eight values of a 16-bit code, as the description has them."""
    pattern, signs = code >> 8, code & 255
    odd = signs.bit_count() & 1
    entry = tables.named("e8p")[pattern].tolist()
    places = [0, 4, 1, 5, 2, 6, 3, 7]
    turned = [-v if (signs ^ odd) >> place & 1 else v for v, place in zip(entry, places, strict=True)]
    return [v - 0.25 if odd else v + 0.25 for v in turned]


def packed_codes(codes: Array) -> Array:
    """E8P codes [rows, cols / 8] -> int64 words, one for each patch of 2 x 2 codes."""
    rows, groups = codes.shape
    words = [0] * (rows * groups // 4)
    for r in range(rows):
        for c in range(groups):
            at = ((r // 16 * (groups // 8) + c // 8) * 8 + r % 16 // 2) * 4 + c % 8 // 2
            slot, code = r % 2 + 2 * (c % 2), int(codes[r, c])
            words[at] |= code >> 8 << 8 * slot
            for j in range(8):
                words[at] |= (code >> j & 1) << 32 + 4 * j + slot
    return np.array(words, np.uint64).view(np.int64).reshape(rows, groups // 4)


def layer(module: str, rows: int, cols: int, codebook: str = "E8P12", residual: float = 0, seed: int = 0) -> Any:
    """The tensors of a layer of random codes, and the matrix between the rotations."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << 16, (2, rows, cols // 8))
    points = [np.array([e8p12(code) for code in one.ravel().tolist()], np.float32).reshape(rows, cols) for one in codes]
    stored = points[0]
    if codebook == "E8P12":
        words = packed_codes(codes[0])
    elif codebook == "E8P12RVQ4B":
        words = np.concatenate([packed_codes(one) for one in codes], axis=1)
        rest = (points[1] / np.float32(residual or 3.45)).astype(np.float16)
        stored = (points[0] + rest.astype(np.float32)).astype(np.float16).astype(np.float32)
    elif codebook == "E8P12RVQ3B":
        small = rng.integers(0, 256, (rows, cols // 8), np.uint8)
        words = np.concatenate([packed_codes(codes[0]), small.view(np.int64)], axis=1)
        rest = tables.named("e81b").astype(np.float32)[small].reshape(rows, cols) / np.float32(residual or 2.04)
        stored = (points[0] + rest.astype(np.float16).astype(np.float32)).astype(np.float16).astype(np.float32)
    elif codebook == "D4":
        small = rng.integers(0, 256, (rows, cols // 4), np.uint8)
        words = np.stack([small[:, 4 * i : 4 * i + 4] for i in range(cols // 16)]).reshape(rows, cols // 4)
        stored = tables.named("d4").astype(np.float32)[small].reshape(rows, cols)
    else:
        small = rng.integers(0, 16, (rows, cols))
        shifts = np.tile([28, 12, 24, 8, 20, 4, 16, 0], cols // 8)
        words = (small << shifts).reshape(rows, -1, 8).sum(axis=2).astype(np.uint32).view(np.int32)
        stored = (small - 7.5).astype(np.float32)
    parts = {
        "Qidxs": words,
        "codebook_id": np.array(BOOKS[codebook][0], np.int64),
        "SU": rng.standard_normal(cols).astype(np.float16),
        "SV": rng.standard_normal(rows).astype(np.float16),
        "Wscale": np.array(1, np.float16),
    }
    return {f"{module}.{part}": array for part, array in parts.items()}, stored


def hadamard(size: int) -> Array:
    order = size // (size & -size)
    order = 4 * order if order > 1 else 1
    matrix = tables.hadamard(order).astype(np.float64)
    while len(matrix) < size:
        matrix = np.kron(matrix, [[1, 1], [1, -1]])
    return matrix / np.sqrt(size)


def turned(tensors: dict[str, Array], module: str, stored: Array) -> Array:
    """W, in float64."""
    of = {name.rpartition(".")[2]: array.astype(np.float64) for name, array in tensors.items() if module in name}
    weight = hadamard(len(of["SV"])) @ stored @ hadamard(len(of["SU"])).T
    weight = (of["SV"] * of["Wscale"])[:, None] * weight * of["SU"]
    return weight / of["scaleWH"] if "scaleWH" in of else weight


def write(folder: Path, tensors: dict[str, Array], settings: dict[str, Any], **config: Any) -> Path:
    return foreign.write(folder, tensors, {**CONFIG, **config, "quip_params": settings})


@pytest.mark.parametrize("codebook", BOOKS)
def test_every_codebook(codebook: str, tmp_path: Path) -> None:
    tensors, stored = layer(ONE, 48, 128, codebook)
    source = write(tmp_path / "m", tensors, params(codebook))
    importer, reason = find(checkpoint.open(source))
    assert importer.NAME == "quip" and "codesz" in reason
    plan = foreign.plan_of(source)
    name = f"{ONE}.weight"
    np.testing.assert_array_equal(foreign.decoded(plan, rotated=True)[name], stored)
    assert foreign.difference(foreign.decoded(plan)[name], turned(tensors, ONE, stored)) < 1e-6
    (item,) = plan.items
    assert item.entry is not None and item.entry.label == "bit-exact" and "quip_params" not in plan.config
    assert plan.settings == params(codebook)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([16, 32, 80, 112]), st.sampled_from([64, 192, 320]), st.integers(0, 99))
def test_tiles_of_any_shape(rows: int, cols: int, seed: int) -> None:
    """Words of 2 x 2 codes, laid out again."""
    tensors, stored = layer(ONE, rows, cols, seed=seed)
    (codes,) = quip.CODEBOOKS["E8P12"].relaid(tensors[f"{ONE}.Qidxs"], (rows, cols))
    found = [e8p12(int(signs) | int(pattern) << 8) for signs, pattern in codes.reshape(-1, 2)]
    np.testing.assert_array_equal(np.array(found, np.float32).reshape(rows, cols), stored)


def test_what_was_fused_is_the_models_own_again(tmp_path: Path) -> None:
    """Query, key and value of unequal rows; up before gate; biases cut and multiplied with them."""
    qkv, first = layer(QKV, 192, 128)
    upgate, second = layer(UPGATE, 160, 128, seed=1)
    scales = {QKV: np.array([0.5, 2, 3], np.float16), UPGATE: np.array([0.25, 1.5], np.float16)}
    bias = np.arange(192, dtype=np.float16)
    tensors = {**qkv, **upgate, **{f"{name}.fuse_scales": scale for name, scale in scales.items()}, f"{QKV}.bias": bias}
    source = write(tmp_path / "m", tensors, params())
    packed = foreign.converted(source, tmp_path)
    assert sorted(packed) == [f"{UPGATE}.weight", f"{QKV}.weight"]
    convert(source, tmp_path / "dense", "dense", dtype="float32")
    dense = checkpoint.open(tmp_path / "dense")
    for module, stored, rows in ((QKV, first, {"q": 96, "k": 48, "v": 48}), (UPGATE, second, {"up": 80, "gate": 80})):
        np.testing.assert_array_equal(packed[f"{module}.weight"].decode(rotated=True), stored)
        whole, start = turned(tensors, module, stored), 0
        for (short, count), scale in zip(rows.items(), scales[module], strict=True):
            name = f"{module.rpartition('.')[0]}.{short}_proj"
            wanted = whole[start : start + count] * float(scale)
            assert foreign.difference(packed[f"{name}.weight"].decode(), wanted) < 1e-6
            np.testing.assert_array_equal(dense.array(f"{name}.weight"), packed[f"{name}.weight"].decode())
            if module == QKV:
                np.testing.assert_array_equal(packed.array(f"{name}.bias"), bias[start : start + count] * scale)
            start += count
    assert packed.manifest is not None
    assert packed.manifest.provenance["source"] == {"tensors": 13, "consumed": 12, "passed": 1, "left_out": []}


def test_scales_fold_into_one_a_side(tmp_path: Path) -> None:
    """Wscale rounds with SV, scaleWH with SU: said by the label and in a note."""
    tensors, stored = layer(ONE, 32, 64)
    scaled = {**tensors, f"{ONE}.Wscale": np.array(0.0123, np.float32), f"{ONE}.scaleWH": np.full(64, 3, np.float16)}
    plan = foreign.plan_of(write(tmp_path / "m", scaled, params(rescale_WH=True)))
    rounded = (scaled[f"{ONE}.SV"] * np.float64(scaled[f"{ONE}.Wscale"])).astype(np.float16)
    wanted = turned({**scaled, f"{ONE}.SV": rounded, f"{ONE}.Wscale": np.array(1.0)}, ONE, stored)
    assert foreign.difference(foreign.decoded(plan)[f"{ONE}.weight"], wanted) < 1e-6
    (item,) = plan.items
    assert item.entry is not None and item.entry.label == "rounded" and "rounded" in " ".join(plan.notes)
    signs = {**tensors, f"{ONE}.SV": np.sign(tensors[f"{ONE}.SV"]), f"{ONE}.Wscale": np.array(0.0123, np.float16)}
    (item,) = foreign.plan_of(write(tmp_path / "n", signs, params())).items
    assert item.entry is not None and item.entry.label == "bit-exact"


@pytest.mark.parametrize("codebook", ["E8P12RVQ3B", "E8P12RVQ4B"])
@pytest.mark.parametrize("override", [0.9, 3.6, 4, 7.003])
def test_another_residual_scale(codebook: str, override: float, tmp_path: Path) -> None:
    tensors, stored = layer(ONE, 16, 64, codebook, residual=override)
    plan = foreign.plan_of(write(tmp_path / "m", tensors, params(codebook, resid_scale_override=override)))
    np.testing.assert_array_equal(foreign.decoded(plan, rotated=True)[f"{ONE}.weight"], stored)


def test_no_residual_scale_is_near_another() -> None:
    """The factor gives the float16 of the quotient throughout, for every step of a thousandth."""
    values = np.arange(-11, 12, dtype=np.float32) / 4
    for divisor in np.arange(500, 8000, 37) / 1000:
        quotient = (values / np.float32(divisor)).astype(np.float16)
        np.testing.assert_array_equal((values * quip._reciprocal(float(divisor))).astype(np.float16), quotient)


def changed(tensors: dict[str, Array], **parts: Array | None) -> dict[str, Array]:
    out = {**tensors, **{f"{ONE}.{part}": array for part, array in parts.items() if array is not None}}
    return {name: array for name, array in out.items() if parts.get(name.rpartition(".")[2], 1) is not None}


NAN = np.full(64, np.nan, np.float16)
REFUSED: list[tuple[dict[str, Any], dict[str, Any], type[QformatError], str]] = [
    ({}, {"codebook": "E8P13"}, UnsupportedError, "one of the codebooks E8P12, .* found 'E8P13'"),
    ({}, {"codebook_version": 0}, UnsupportedError, "version 1 of codebook E8P12, found 0"),
    ({}, {"lora_rank": 4}, UnsupportedError, "no lora_rank, found 4"),
    ({}, {"outlier_channel_split": True}, UnsupportedError, "no outlier_channel_split"),
    ({}, {"idx_dtype": "torch.int32"}, DamagedError, "Qidxs: expected idx_dtype of int64, found 'torch.int32'"),
    ({}, {"rescale_WH": True}, DamagedError, "rescale_WH True says, found no scaleWH"),
    ({"scaleWH": np.ones(64, np.float16)}, {}, DamagedError, "rescale_WH False says, found scaleWH"),
    ({"scaleWH": np.zeros(64, np.float16)}, {"rescale_WH": True}, DamagedError, "numbers other than 0, found 64 zeros"),
    ({"A": np.ones((16, 2), np.float16)}, {}, DamagedError, "o_proj.A: expected no such tensor"),
    ({"codebook_id": np.array(17)}, {}, DamagedError, "codebook_id: expected 7, of E8P12, found 17"),
    ({"codebook_id": None}, {}, DamagedError, "codebook_id: expected int64 or int32 \\[\\], found no such tensor"),
    ({"Qidxs": np.ones((16, 3), np.int64)}, {}, DamagedError, "Qidxs: expected \\[16, 2\\]"),
    ({"Qidxs": np.ones((16, 2), np.int32)}, {}, DamagedError, "Qidxs: expected int64"),
    ({"SV": None}, {}, DamagedError, "SV: expected float16 or float32 with 1 axes, found no such tensor"),
    ({"SU": NAN}, {}, DamagedError, "SU: expected finite numbers, found 64 that are not"),
    ({"Wscale": np.ones(2, np.float16)}, {}, DamagedError, "Wscale: expected float16 or float32 \\[\\]"),
    ({"fuse_scales": np.ones(2, np.float16)}, {}, DamagedError, "fuse_scales: expected a module called qkv_proj or"),
    ({"weight": np.ones((16, 64), np.float16)}, {}, DamagedError, "one weight, Qidxs or weight, found both"),
]


@pytest.mark.parametrize(("parts", "settings_", "error", "message"), REFUSED)
def test_what_is_refused(
    parts: dict[str, Any], settings_: dict[str, Any], error: type[QformatError], message: str, tmp_path: Path
) -> None:
    tensors = changed(layer(ONE, 16, 64)[0], **parts)
    with pytest.raises(error, match=message):
        foreign.plan_of(write(tmp_path / "m", tensors, {**params(), **settings_}), "quip")


def test_a_save_that_was_interrupted(tmp_path: Path) -> None:
    tensors = changed(layer(ONE, 16, 64)[0], Qidxs=np.zeros((16, 2), np.int64))
    with pytest.raises(DamagedError, match="Qidxs: expected codes that differ, found 0 throughout"):
        foreign.decoded(foreign.plan_of(write(tmp_path / "m", tensors, params())))


def test_rows_that_the_config_does_not_share_out(tmp_path: Path) -> None:
    tensors = {**layer(QKV, 192, 128)[0], f"{QKV}.fuse_scales": np.ones(3, np.float16)}
    for config in ({"num_key_value_heads": 4}, {"num_attention_heads": None}):
        with pytest.raises(DamagedError, match="SV: expected rows that config.json shares out"):
            foreign.plan_of(write(tmp_path / str(len(config)), tensors, params(), **config))
    again = {**tensors, f"{QKV.replace('qkv', 'k')}.weight": np.ones((48, 128), np.float16)}
    with pytest.raises(DamagedError, match="k_proj.weight within it, found that tensor, too"):
        foreign.plan_of(write(tmp_path / "again", again, params()))
    with pytest.raises(DamagedError, match="fuse_scales"):
        foreign.plan_of(write(tmp_path / "none", layer(QKV, 192, 128)[0], params()))


def test_scales_within_a_module_are_refused(tmp_path: Path) -> None:
    """Files before modules were fused kept a factor beside each."""
    tensors = {**layer(ONE, 16, 64)[0], f"{ONE.removesuffix('_proj')}_scale": np.array(2, np.float16)}
    with pytest.raises(UnsupportedError, match="o_proj.weight: expected scales within the module"):
        foreign.plan_of(write(tmp_path / "m", tensors, params()))


def test_a_side_that_no_matrix_fits(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="o_proj.weight: expected a Hadamard matrix .* found 44"):
        foreign.decoded(foreign.plan_of(write(tmp_path / "m", layer(ONE, 176, 64)[0], params())))
