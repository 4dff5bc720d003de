"""bitsandbytes files from a writer of our own, made straight from the description of the format."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import foreign
import ml_dtypes
import numpy as np
import pytest

from qformat import checkpoint, verify
from qformat.converters.convert import convert
from qformat.converters.importers import find
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError, QformatError, UnsupportedError

MODULE = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{MODULE}.weight"
NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
         -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
         0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
FP4 = "0 0.0625 8 12 4 6 2 3 -0 -0.0625 -8 -12 -4 -6 -2 -3"
MAPS = {
    "nf4": np.array([float(x) for x in NF4.split()], np.float32),
    "fp4": np.array([float(x) for x in FP4.split()], np.float32) / np.float32(12),
}


@dataclass
class File:
    kind: str = "nf4"
    shape: tuple[int, int] = (32, 64)
    block: int = 64
    nested: int | None = None
    dtype: str = "bfloat16"
    storage: str = "uint8"
    state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.shape[1] + self.block)
        count = self.shape[0] * self.shape[1]
        self.codes = rng.integers(0, 16, count)
        blocks = -(-count // self.block)
        self.absmax = (rng.random(blocks) + 0.1).astype(np.float32)
        if self.nested is not None:
            self.nested_codes = rng.integers(0, 256, blocks).astype(np.uint8)
            self.nested_map = np.sort(rng.standard_normal(256)).astype(np.float32)
            self.nested_absmax = rng.random(-(-blocks // self.nested)).astype(np.float32)

    @property
    def values(self) -> Array:
        """float32, each operation as the library has it."""
        absmax = self.absmax
        if self.nested is not None:
            scale = self.nested_absmax[np.arange(len(self.nested_codes)) // self.nested]
            absmax = self.nested_map[self.nested_codes] * scale + np.float32(0.143)
        return (MAPS[self.kind][self.codes] * absmax[np.arange(len(self.codes)) // self.block]).reshape(self.shape)

    @property
    def tensors(self) -> dict[str, Array]:
        nibbles = np.append(self.codes, [9] * (len(self.codes) % 2)).astype(np.uint8)  # what fills up means nothing
        stored = (nibbles[::2] << 4 | nibbles[1::2]).view(NUMPY[self.storage])[:, None]
        state = {"quant_type": self.kind, "blocksize": self.block, "dtype": self.dtype, "shape": list(self.shape)}
        parts = {"absmax": self.absmax, "quant_map": MAPS[self.kind]}
        if self.nested is not None:
            parts["absmax"] = self.nested_codes
            parts |= {"nested_absmax": self.nested_absmax, "nested_quant_map": self.nested_map}
            state |= {"nested_blocksize": self.nested, "nested_dtype": "float32", "nested_offset": 0.143}
        blob = np.frombuffer(json.dumps(state | self.state).encode(), np.uint8)
        parts[f"quant_state.bitsandbytes__{self.kind}"] = blob
        return {WEIGHT: stored} | {f"{WEIGHT}.{part}": array for part, array in parts.items()}


CONFIG = {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


@pytest.mark.parametrize(
    "file",
    [
        File(),
        File("fp4", (5, 7), 32, dtype="float16"),  # blocks across rows, an odd count, a short last block
        File("fp4", (6, 10), 64, dtype="float32"),
        File(shape=(8, 48), block=64),
        File(shape=(40, 512), nested=64),  # eight rows a block of scales
        File(shape=(8, 32)),  # two rows a block
        File(shape=(40, 96), nested=16, dtype="float16"),  # two short ends
        File("fp4", (3, 5), 4, nested=3),
        File(shape=(16, 64), storage="bfloat16"),
        File(shape=(16, 64), storage="float32", nested=8),
    ],
    ids=lambda f: f"{f.kind} {f.shape} {f.block} {f.nested} {f.storage}",
)
def test_four_bits(tmp_path: Path, file: File) -> None:
    packed = foreign.converted(foreign.write(tmp_path / "source", file.tensors, CONFIG), tmp_path)
    weight = packed[WEIGHT]
    np.testing.assert_array_equal(weight.decode(), file.values)
    assert verify.verify(packed) == [] and weight.entry.dtype == file.dtype and weight.entry.label == "bit-exact"
    if "view" not in str(weight.entry.terms):  # it can be cut, where no block of scales is
        start = 8 if file.shape[0] > 8 else 4
        np.testing.assert_array_equal(weight.slice(axis=0, start=0, stop=start).decode(), file.values[:start])
    assert [name for name in packed.tensors if "quant" in name or "absmax" in name] == []


def int8(rows: int = 24, cols: int = 40) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (rows, cols)).astype(np.int8)
    form = np.array(0, np.uint8)
    return {WEIGHT: codes, f"{MODULE}.SCB": rng.random(rows).astype(np.float32), f"{MODULE}.weight_format": form}


def test_int8(tmp_path: Path) -> None:
    """Within a rounding of the library's two products, and exact but for it; cast to float16 it is what it gives."""
    tensors = int8()
    plan = foreign.plan_of(foreign.write(tmp_path, tensors, {**CONFIG, "torch_dtype": "float16"}))
    library = tensors[WEIGHT] * tensors[f"{MODULE}.SCB"][:, None] * np.float32(0.007874015718698502)
    found = foreign.decoded(plan)[WEIGHT]
    np.testing.assert_allclose(found, library, rtol=2**-22)
    assert (found.astype(np.float16) == library.astype(np.float16)).mean() > 0.99
    (entry,) = [item.entry for item in plan.items]
    assert entry.dtype == "float16" and entry.label == "rounded" and any("LLM.int8" in note for note in plan.notes)
    del tensors[f"{MODULE}.weight_format"]
    again = foreign.plan_of(foreign.write(tmp_path / "without", tensors, CONFIG))
    assert np.array_equal(foreign.decoded(again)[WEIGHT], found)


def test_weights_that_are_floats_and_settings_that_are_missing(tmp_path: Path) -> None:
    """A quant_method alone means that weights are to be quantized when loaded; packed weights speak for themselves."""
    dense = {WEIGHT: np.ones((4, 4), ml_dtypes.bfloat16)}
    source = foreign.write(tmp_path / "dense", dense, CONFIG)
    report = convert(source, tmp_path / "out", "dense")
    assert any("floats" in note for note in report["notes"]) and "quantization_config" not in json.loads(
        (tmp_path / "out" / "config.json").read_text()
    )
    bare = foreign.write(tmp_path / "bare", File().tensors, {"model_type": "llama"})
    assert find(checkpoint.open(bare))[0].NAME == "bitsandbytes"


def test_conv1d_is_the_models_own_way_round(tmp_path: Path) -> None:
    file = File()
    tensors = {name.replace(MODULE, "h.0.attn.c_attn"): array for name, array in file.tensors.items()}
    plan = foreign.plan_of(foreign.write(tmp_path, tensors, {**CONFIG, "model_type": "gpt2"}))
    assert np.array_equal(foreign.decoded(plan)["h.0.attn.c_attn.weight"], file.values.T)


def refused(folder: Path, tensors: dict[str, Array], *words: str, kind: type[QformatError] = DamagedError) -> None:
    with pytest.raises(kind) as caught:
        foreign.decoded(foreign.plan_of(foreign.write(folder, tensors, CONFIG)))
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"shape": [32, 96]}, ["[32, 96]", "2048 values"]),
        ({"shape": [0, 64]}, ["shape"]),
        ({"shape": 2048}, ["shape"]),
        ({"blocksize": 0}, ["blocksize", "0"]),
        ({"blocksize": True}, ["blocksize"]),
        ({"dtype": "int8"}, ["dtype", "int8"]),
        ({"quant_type": "fp4"}, ["quant_type nf4", "fp4"]),
    ],
    ids=str,
)
def test_a_state_that_contradicts(tmp_path: Path, state: dict[str, Any], words: list[str]) -> None:
    refused(tmp_path, File(state=state).tensors, f"{WEIGHT}.quant_state.bitsandbytes__nf4", *words)


@pytest.mark.parametrize(
    "state", [{"nested_offset": 1e400}, {"nested_offset": None}, {"nested_blocksize": -1}, {"nested_dtype": "float16"}]
)
def test_a_nested_state_that_contradicts(tmp_path: Path, state: dict[str, Any]) -> None:
    refused(tmp_path, File(nested=256, state=state).tensors, f"{WEIGHT}.quant_state.bitsandbytes__nf4", *state)


def test_tensors_that_contradict(tmp_path: Path) -> None:
    def broken(file: File, part: str, change: Any, *words: str, kind: type[QformatError] = DamagedError) -> None:
        tensors = file.tensors
        name = f"{WEIGHT}.{part}" if part else WEIGHT
        tensors[name] = change(tensors[name])
        refused(tmp_path, tensors, name, *words, kind=kind)

    nested, blob = File(nested=256), "quant_state.bitsandbytes__nf4"
    broken(File(), "absmax", lambda absmax: absmax[:-1], "[32]", "[31]")
    broken(File(), "absmax", lambda absmax: absmax * np.float32("nan"), "finite")
    broken(File(), "quant_map", lambda values: values + np.float32(1e-3), "nf4", kind=UnsupportedError)
    broken(File(), blob, lambda text: text[:-1])
    broken(File(), blob, lambda text: np.frombuffer(b'{"shape": [1], "shape": [1]}', np.uint8), "'shape' twice")
    broken(nested, "absmax", lambda absmax: absmax.astype(np.float32), "uint8")
    broken(nested, "nested_quant_map", lambda values: values[:16], "[256]")
    for file in (File(), nested):
        for name in file.tensors:
            tensors = file.tensors
            del tensors[name]
            refused(tmp_path, tensors, WEIGHT)  # each of a weight's tensors is missed
    refused(tmp_path, File("fp4").tensors | File().tensors, "one quant_state", "bitsandbytes__nf4", "bitsandbytes__fp4")


def test_int8_tensors_that_contradict(tmp_path: Path) -> None:
    tensors = int8()
    refused(
        tmp_path, tensors | {f"{MODULE}.weight_format": np.array(2, np.uint8)}, "weight_format", kind=UnsupportedError
    )
    refused(tmp_path, tensors | {f"{MODULE}.SCB": tensors[f"{MODULE}.SCB"][1:]}, f"{MODULE}.SCB", "[24]", "[23]")
    refused(tmp_path, tensors | {f"{MODULE}.SCB": tensors[f"{MODULE}.SCB"] * 0}, f"{MODULE}.SCB", "[0]")
    refused(tmp_path, {WEIGHT: tensors[WEIGHT]}, WEIGHT, "SCB")
    refused(tmp_path, {f"{MODULE}.SCB": tensors[f"{MODULE}.SCB"]}, WEIGHT)
