"""HIGGS files from a writer of our own, made straight from the description of the format, decode to what it meant."""

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
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError

MODULE = "model.layers.0.mlp.up_proj"
TALL = {2: 13, 4: 50}  # templates with tiles of 64 rows
SHORT = {2: 23, 3: 8, 4: 143}


def words(pairs: Array, bits: int, tile: int) -> Array:
    """The code of each pair, [out, in / 2], placed field by field -> int16 [out · bits / 16, in]."""
    rows, width = pairs.shape
    out = np.zeros((rows * bits // 16, width), np.uint32)
    for n, row in enumerate(pairs.astype(np.uint32)):
        if bits == 3:
            block, j, t = n // 512, n % 512 // 32, n % 32
            r0, r1 = block * 32 + t, rows // 16 + block * 64 + t
            places = (r0, r1, r1 + 32)
            if j < 15:
                out[places[j % 3]] |= row << np.uint32(6 * (j // 3))
            else:
                for i, place in enumerate(places):
                    out[place] |= (row >> np.uint32(2 * i) & np.uint32(3)) << np.uint32(30)
        else:
            run = 16 // bits * tile
            block, j, t = n // run, n % run // tile, n % tile
            out[block * tile + t] |= row << np.uint32(2 * bits * j)
    return out.view(np.int16)


def hadamard(size: int) -> Array:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


def layer(
    bits: int = 4,
    p: int = 1,
    dtype: str = "float16",
    tall: bool = False,
    rows: int = 256,
    cols: int = 128,
    seed: int = 0,
) -> tuple[dict[str, Array], dict[str, Any], Array]:
    """Tensors and settings of one layer of random codes, groups and Hadamard blocks of 64; and its rotated values."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (rows, cols)).astype(np.uint8)
    grid = rng.standard_normal(2**bits if p == 1 else (2**bits, 2**bits, 2)).astype(NUMPY[dtype])
    pairs = np.stack([np.repeat(grid[:, None], len(grid), 1), np.repeat(grid[None], len(grid), 0)], -1)
    pairs = pairs if p == 1 else grid
    scales = rng.standard_normal((rows, cols // 64)).astype(NUMPY[dtype])
    chosen = pairs[codes[:, ::2], codes[:, 1::2]].reshape(rows, cols)
    values = (chosen * np.repeat(scales, 64, axis=1)).astype(np.float32)
    tensors = {
        "weight": words(codes[:, ::2] << bits | codes[:, 1::2], bits, 64 if tall else 32),
        "scales": scales,
        "tables": grid if p == 1 else np.arange(2**bits).astype(NUMPY[dtype]),
        "tables2": np.ascontiguousarray(pairs).view(np.float16),
    }
    tuned = {"M": 1, "N": rows, "K": cols, "num_bits": bits, "group_size": 64, "dtype": f"torch.{dtype}"}
    own = {"quant_method": "higgs", "bits": bits, "p": p, "group_size": 64, "hadamard_size": 64}
    own["tune_metadata"] = {MODULE: {**tuned, "template_id": (TALL if tall else SHORT)[bits]}}
    return {f"{MODULE}.{name}": array for name, array in tensors.items()}, own, values


def write(folder: Path, tensors: dict[str, Array], own: dict[str, Any], **config: Any) -> Path:
    return foreign.write(folder, tensors, {"quantization_config": own, **config})


@settings(max_examples=12)
@given(st.data())
def test_every_variant(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    bits, p = data.draw(st.sampled_from((2, 3, 4))), data.draw(st.sampled_from((1, 2)))
    tall = bits != 3 and data.draw(st.booleans())
    dtype, seed = data.draw(st.sampled_from(("float16", "bfloat16"))), data.draw(st.integers(0, 1 << 32))
    rows = data.draw(st.sampled_from((1, 2))) * (512 if tall or bits == 3 else 256)
    tensors, own, values = layer(bits, p, dtype, tall, rows, 128, seed)
    (item,) = foreign.plan_of(write(tmp_path_factory.mktemp("higgs"), tensors, own)).items
    weight = item.packed()
    assert np.array_equal(weight.decode(rotated=True), values)
    wanted = values.astype(np.float64) @ np.kron(np.eye(2), hadamard(64))
    assert foreign.difference(weight.decode(), wanted) < 1e-6
    assert (item.entry.label, item.entry.dtype) == ("bit-exact", dtype)


def test_the_padding_of_the_input(tmp_path: Path) -> None:
    """The size is the model's, where config.json gives it; a bias goes through."""
    tensors, own, _ = layer()
    whole = foreign.decoded(foreign.plan_of(write(tmp_path / "whole", tensors, own)))[f"{MODULE}.weight"]
    tensors[f"{MODULE}.bias"] = np.ones(256, np.float16)
    plan = foreign.plan_of(write(tmp_path / "padded", tensors, own, hidden_size=96))
    assert plan.items[0].entry is not None and plan.items[0].entry.stored_shape == (256, 128)
    assert np.array_equal(foreign.decoded(plan)[f"{MODULE}.weight"], whole[:, :96])
    assert [item.name for item in plan.items] == [f"{MODULE}.weight", f"{MODULE}.bias"]
    for hidden in (64, 129):
        with pytest.raises(DamagedError, match=f"{hidden} columns by config.json.*found 128"):
            foreign.plan_of(write(tmp_path / "other", tensors, own, hidden_size=hidden))


def test_a_folder(tmp_path: Path) -> None:
    tensors, own, _ = layer()
    tensors["model.norm.weight"] = np.ones(64, np.float16)
    folder = write(tmp_path / "source", tensors, own, hidden_size=128)
    assert find(checkpoint.open(folder))[0].NAME == "higgs"
    report = convert(folder, tmp_path / "packed")
    assert report["coverage"] == {"tensors": 5, "consumed": 4, "passed": 1, "left_out": []}
    packed = checkpoint.open(tmp_path / "packed")
    assert packed.manifest is not None and "tune_metadata" not in packed.manifest.provenance["settings"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 5}, "bits 2 or 3 or 4, found 5"),
        ({"p": 4}, "p 1 or 2"),
        ({"group_size": 32}, "group_size 64 or 128 or 256"),
        ({"hadamard_size": 96}, "hadamard_size a power of two"),
        ({"hadamard_size": 2**40}, "hadamard_size a power of two"),
        ({"group_size": 128}, "hadamard_size of a multiple"),
        ({"hadamard_size": 256}, "columns in blocks of 256"),
        ({"bits": 2}, "256 x 2 / 16 rows"),
        ({"p": 2}, None),
        ({"tune_metadata": {}}, "tune_metadata"),
        ({"tune_metadata": [1]}, "tune_metadata as an object"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, change: dict[str, Any], words: str | None) -> None:
    tensors, own, values = layer()
    folder = write(tmp_path, tensors, own | change)
    if words is None:  # pairs of p 1 are pairs of p 2, too
        assert np.array_equal(foreign.decoded(foreign.plan_of(folder), rotated=True)[f"{MODULE}.weight"], values)
        return
    with pytest.raises(DamagedError, match=words):
        foreign.plan_of(folder)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("template_id", 144, "template_id of FLUTE for 4 bits, found 144"),
        ("template_id", "0", "template_id"),
        ("N", 512, "N 512 by tune_metadata, found 256"),
        ("num_bits", 3, "num_bits 3"),
        ("dtype", "torch.bfloat16", "dtype torch.bfloat16 by tune_metadata, found torch.float16"),
    ],
)
def test_metadata_that_are_refused(tmp_path: Path, key: str, value: Any, words: str) -> None:
    tensors, own, _ = layer()
    own["tune_metadata"][MODULE][key] = value
    with pytest.raises(DamagedError, match=rf"{MODULE}\.weight: expected .*{words}"):
        foreign.plan_of(write(tmp_path, tensors, own))


def test_a_template_that_packs_no_3_bits(tmp_path: Path) -> None:
    tensors, own, _ = layer(3, rows=512)
    own["tune_metadata"][MODULE]["template_id"] = TALL[2]
    with pytest.raises(DamagedError, match="template_id of FLUTE for 3 bits"):
        foreign.plan_of(write(tmp_path, tensors, own))


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("weight", lambda array: array * 0, "0 throughout"),
        ("weight", lambda array: array[:-1], "256 x 4 / 16 rows"),
        ("weight", lambda array: array.astype(np.int32), "int16"),
        ("scales", lambda array: array[:, :1], "a scale for each 64"),
        ("scales", lambda array: array * np.float16("nan"), "finite"),
        ("scales", lambda _: None, "no such tensor"),
        ("tables", lambda array: array[::-1].copy(), "one number for each code"),
        ("tables", lambda array: array[:8], "[16]"),
        ("tables2", lambda array: array * np.float16("inf"), "finite"),
        ("tables2", lambda array: array.swapaxes(0, 1).copy(), "one number for each code"),
        ("tables2", lambda array: array.astype(ml_dtypes.bfloat16), "float16"),
    ],
)
def test_what_is_damaged(tmp_path: Path, part: str, change: Any, words: str) -> None:
    tensors, own, _ = layer()
    name = f"{MODULE}.{part}"
    if (changed := change(tensors[name])) is None:
        del tensors[name]
    else:
        tensors[name] = changed
    with pytest.raises(DamagedError) as caught:
        foreign.decoded(foreign.plan_of(write(tmp_path, tensors, own)))
    assert name in str(caught.value) and words in str(caught.value)


def test_codes_without_their_tables(tmp_path: Path) -> None:
    tensors, own, _ = layer()
    packed = {name.replace(MODULE, "model.layers.1.mlp.up_proj"): array for name, array in tensors.items()}
    for alone, words in (("weight", "tables2 beside"), ("tables", "tables2 beside it")):
        name = f"model.layers.1.mlp.up_proj.{alone}"
        with pytest.raises(DamagedError, match=words) as caught:
            foreign.plan_of(write(tmp_path / alone, tensors | {name: packed[name]}, own))
        assert name in str(caught.value)
