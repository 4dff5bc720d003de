"""AQLM files of random codes decode as a second decoder, written from the description of the format, decodes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qformat import checkpoint
from qformat.converters import importers
from qformat.converters.convert import convert
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError, QformatError, UnsupportedError

MODULE = "model.layers.0.mlp.up_proj"
Tensors = dict[str, Array]


def stored(codes: Array, bits: int) -> Array:
    """Codes as they are written: signed, of the width of the books."""
    signed = np.where(codes < 1 << (bits - 1), codes, codes - (1 << bits))
    return signed.astype(np.int8 if bits <= 8 else np.int16)


def layer(
    rows: int = 4, cols: int = 5, books: int = 2, bits: int = 8, tile: tuple[int, int] = (1, 8), dtype: str = "float16"
) -> tuple[Tensors, Array]:
    """The tensors of one layer, ``rows`` and ``cols`` counting tiles, and its values."""
    rng = np.random.default_rng(rows + 100 * cols)
    codes = rng.integers(0, 1 << bits, (rows, cols, books))
    codes[0, 0] = (1 << bits) - 1  # stored as -1
    table = rng.standard_normal((books, 1 << bits, *tile)).astype(NUMPY[dtype])
    scales = rng.uniform(0.5, 2, (rows, 1, 1, 1)).astype(NUMPY[dtype])
    values = np.empty((rows * tile[0], cols * tile[1]), np.float32)
    for o in range(rows):
        for i in range(cols):
            total = table[0, codes[o, i, 0]].astype(np.float32)
            for book in range(1, books):
                total = total + table[book, codes[o, i, book]].astype(np.float32)
            here = slice(o * tile[0], (o + 1) * tile[0]), slice(i * tile[1], (i + 1) * tile[1])
            values[here] = total * scales[o, 0].astype(np.float32)
    parts = {"codes": stored(codes, bits), "codebooks": table, "scales": scales}
    return {f"{MODULE}.{name}": array for name, array in parts.items()}, values


def config(**more: Any) -> dict[str, Any]:
    return {"model_type": "llama", "quantization_config": {"quant_method": "aqlm", **more}}


def settings_of(books: int = 2, bits: int = 8, tile: tuple[int, int] = (1, 8)) -> dict[str, int]:
    sizes = {"out_group_size": tile[0], "in_group_size": tile[1]}
    return {"nbits_per_codebook": bits, "num_codebooks": books, **sizes}


@settings(max_examples=40)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 13),
    st.sampled_from([(1, 8), (1, 16), (4, 8), (2, 1), (3, 5)]),
    st.sampled_from(["float16", "bfloat16", "float32"]),
)
def test_every_form(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    cols: int,
    books: int,
    bits: int,
    tile: tuple[int, int],
    dtype: str,
) -> None:
    tensors, values = layer(rows, cols, books, bits, tile, dtype)
    folder = foreign.write(tmp_path_factory.mktemp("aqlm"), tensors, config(**settings_of(books, bits, tile)))
    plan = foreign.plan_of(folder)
    assert np.array_equal(foreign.decoded(plan)[f"{MODULE}.weight"], values)
    (entry,) = [item.entry for item in plan.items if item.entry]
    assert entry.label == "bit-exact" and entry.dtype == dtype and entry.shape == values.shape
    assert plan.items[0].consumes == tuple(f"{MODULE}.{part}" for part in ("codes", "codebooks", "scales"))


@pytest.mark.parametrize("bits", [15, 16])
def test_books_of_the_largest_codes(tmp_path: Path, bits: int) -> None:
    tensors, values = layer(books=1, bits=bits, tile=(1, 2))
    assert tensors[f"{MODULE}.codes"].min() < -(1 << (bits - 2))
    plan = foreign.plan_of(foreign.write(tmp_path, tensors, config()))
    assert np.array_equal(foreign.decoded(plan)[f"{MODULE}.weight"], values)


@pytest.mark.parametrize(("rows", "cols", "turned"), [(4, 5, True), (4, 5, False), (5, 5, False)])
def test_codes_that_a_run_on_a_cpu_has_transposed(tmp_path: Path, rows: int, cols: int, turned: bool) -> None:
    """Where rows and columns are as many they are taken as they stand."""
    tensors, values = layer(rows, cols)
    if turned:
        tensors[f"{MODULE}.codes"] = np.ascontiguousarray(tensors[f"{MODULE}.codes"].transpose(1, 0, 2))
    plan = foreign.plan_of(foreign.write(tmp_path, tensors, config()))
    assert np.array_equal(foreign.decoded(plan)[f"{MODULE}.weight"], values)
    assert any("transposed" in note for note in plan.notes) == turned


def test_the_codes_of_eight_and_sixteen_bits_are_the_same_bytes(tmp_path: Path) -> None:
    tensors, _ = layer()
    (item,) = foreign.plan_of(foreign.write(tmp_path, tensors, config())).items
    assert item.make()["codes"].tobytes() == tensors[f"{MODULE}.codes"].tobytes()


@pytest.mark.parametrize("suffix", [".weight", ""])
@pytest.mark.parametrize("packed", [False, True])
def test_the_tensors_say_what_is_packed(tmp_path: Path, suffix: str, packed: bool) -> None:
    """Both spellings of the list are understood, and a module that it names is packed where its tensors are."""
    tensors, values = layer()
    head = np.ones((4, 8), np.float16)
    tensors |= {"lm_head.weight": head}
    listed = [f"lm_head{suffix}", *([f"{MODULE}{suffix}"] if packed else [])]
    folder = foreign.write(tmp_path / "source", tensors, config(linear_weights_not_to_quantize=listed))
    plan = foreign.plan_of(folder)
    assert any("lists them: 1 layer" in note for note in plan.notes) == packed
    opened = foreign.converted(folder, tmp_path)
    assert np.array_equal(opened[f"{MODULE}.weight"].decode(), values)
    assert np.array_equal(opened.array("lm_head.weight"), head)


def test_a_bias_goes_through(tmp_path: Path) -> None:
    tensors, _ = layer()
    bias = np.arange(4, dtype=np.float16)
    folder = foreign.write(tmp_path / "source", {**tensors, f"{MODULE}.bias": bias}, config())
    assert np.array_equal(foreign.converted(folder, tmp_path).array(f"{MODULE}.bias"), bias)


def test_a_round_trip_on_disk(tmp_path: Path) -> None:
    tensors, values = layer(tile=(4, 8))
    foreign.converted(foreign.write(tmp_path / "source", tensors, config()), tmp_path)
    convert(tmp_path / "packed", tmp_path / "dense", "dense", dtype="float32")
    dense = checkpoint.open(tmp_path / "dense")
    assert np.array_equal(dense.array(f"{MODULE}.weight"), values)
    assert "quantization_config" not in dense.config


@pytest.mark.parametrize("named", [False, True])
def test_detection(tmp_path: Path, named: bool) -> None:
    tensors, _ = layer()
    folder = foreign.write(tmp_path, tensors, config() if named else {"model_type": "llama"})
    importer, reason = importers.find(checkpoint.open(folder))
    assert importer.NAME == "aqlm" and ("quant_method" in reason)
    assert ("codebooks" in reason) != named


def test_codes_of_another_scheme_are_not_taken(tmp_path: Path) -> None:
    tensors = {name: array for name, array in layer()[0].items() if not name.endswith("codebooks")}
    source = checkpoint.open(foreign.write(tmp_path, tensors, {"model_type": "llama"}))
    assert importers.get("aqlm").detect(source) == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [("nbits_per_codebook", 7), ("num_codebooks", 1), ("out_group_size", 4), ("in_group_size", "8")],
)
def test_settings_that_contradict_the_tensors(tmp_path: Path, key: str, value: Any) -> None:
    folder = foreign.write(tmp_path, layer()[0], config(**{**settings_of(), key: value}))
    with pytest.raises(DamagedError, match=f"{MODULE}.codebooks: expected {key} {value!r}"):
        foreign.plan_of(folder)


def changed(part: str, change: Any) -> Tensors:
    tensors, _ = layer(bits=6)
    name = f"{MODULE}.{part}"
    return {**tensors, name: np.ascontiguousarray(change(tensors[name]))}


def with_one(array: Array, value: float) -> Array:
    array = array.copy()
    array.flat[3] = value
    return array


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed("codes", lambda a: with_one(a, 32)), "codes: expected codes of 6 bits: -32 to 31, found -\\d+ to 32"),
        (changed("codes", lambda a: with_one(a, -33)), "codes: expected codes of 6 bits: -32 to 31, found -33 to"),
        (changed("codes", lambda a: a.astype(np.int16)), "codes: expected int8 with 3 axes, found int16"),
        (changed("codes", lambda a: a.view(np.uint8)), "codes: expected int8 with 3 axes, found uint8"),
        (changed("codes", lambda a: a[:3]), "codes: expected \\[4, columns of tiles, 2\\]"),
        (changed("codes", lambda a: a[..., :1]), "codes: expected \\[4, columns of tiles, 2\\]"),
        (changed("codes", np.zeros_like), "codes: expected codes that differ, found 0 throughout"),
        (changed("codebooks", lambda a: a[:, :48]), "codebooks: expected books of 2, 4, 8, ... entries, found 48"),
        (changed("codebooks", lambda a: a[:, :1]), "codebooks: expected books of 2, 4, 8, ... entries, found 1"),
        (changed("codebooks", lambda a: with_one(a, np.nan)), "codebooks: expected finite numbers, found 1"),
        (changed("codebooks", lambda a: a.astype(np.int8)), "codebooks: expected float16 or"),
        (changed("scales", lambda a: with_one(a, np.inf)), "scales: expected finite numbers, found 1"),
        (changed("scales", lambda a: np.repeat(a, 5, 1)), "scales: expected \\[rows of tiles, 1, 1, 1\\], found"),
        ({**layer()[0], f"{MODULE}.bias": np.zeros(3, np.float16)}, "bias: expected \\[4\\], found \\[3\\]"),
        ({**layer()[0], f"{MODULE}.weight": np.zeros((4, 40), np.float16)}, "one weight, codebooks or weight"),
        ({**layer()[0], "model.other.codes": np.zeros((1, 1, 1), np.int8)}, "other.codebooks beside it, found none"),
        ({"model.norm.weight": np.ones(4, np.float16)}, "packed weights: \\*.codebooks, found none"),
    ],
)
def test_damage(tmp_path: Path, tensors: Tensors, message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        foreign.decoded(foreign.plan_of(foreign.write(tmp_path, tensors, config())))


@pytest.mark.parametrize(
    "name", [f"{MODULE}.scales_clusters", f"{MODULE}.scales_indices", f"{MODULE}.quantized_weight.codes"]
)
def test_checkpoints_from_training_are_not_models(tmp_path: Path, name: str) -> None:
    folder = foreign.write(tmp_path, {**layer()[0], name: np.zeros((1, 1, 1), np.int32)}, config())
    with pytest.raises(UnsupportedError, match="expected a converted model") as caught:
        foreign.plan_of(folder)
    assert caught.value.weight == name and caught.value.hint


def test_books_of_more_than_sixteen_bits(tmp_path: Path) -> None:
    tensors, _ = layer(books=1)
    tensors[f"{MODULE}.codebooks"] = np.ones((1, 1 << 17, 1, 1), np.float16)
    with pytest.raises(UnsupportedError, match="at most 256 books of 2\\*\\*16 entries"):
        foreign.plan_of(foreign.write(tmp_path, tensors, config()))


@pytest.mark.parametrize("part", ["codes", "codebooks", "scales"])
def test_a_tensor_that_is_missing(tmp_path: Path, part: str) -> None:
    tensors = {name: array for name, array in layer()[0].items() if not name.endswith(f".{part}")}
    with pytest.raises(QformatError, match=f"{MODULE}|codebooks"):
        foreign.plan_of(foreign.write(tmp_path, tensors, config()))
