"""Export of the codec ``int`` to GPTQ and AWQ: read again the values are the same, and what cannot be so is refused."""

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
from qformat.converters.quantize.job import quantize
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError, QformatError, UnsupportedError, UsageError
from qformat.weight import PackedWeight

ROOT = Path(__file__).resolve().parents[2]
NAME = "model.layers.0.self_attn.q_proj.weight"
OTHER = "model.layers.1.mlp.down_proj.weight"
SYMMETRIC = {"codec": "int", "bits": 4, "block": [1, 32], "scales": "float16", "zero": 8}
ASYMMETRIC = {**SYMMETRIC, "zero": 0, "zeros": "uint8"}


def weight(term: dict[str, Any], shape: tuple[int, ...] = (64, 96), groups: Any = None, **more: Any) -> PackedWeight:
    """Random codes and scales; zeros that the codes reach; act-order as GPTQ deals it."""
    rng = np.random.default_rng(len(json.dumps(term)))
    one = packed(rng, entry(shape, term, **more))
    parts = dict(one.parts)
    if term.get("zeros") in ("uint8", "int16"):
        parts["zeros"] = rng.integers(0, 1 << term["bits"], parts["zeros"].shape).astype(term["zeros"])
    if "groups" in parts:
        dealt = np.arange(shape[1], dtype=np.int32) // term["block"][1] if groups is None else groups
        parts["groups"] = rng.permutation(dealt)
    return PackedWeight("w", one.entry, parts)


def exported(tmp_path: Path, target: str, dense: dict[str, Array] | None = None, **weights: PackedWeight) -> Path:
    source = folder(tmp_path / "source", {key.replace("__", "."): one for key, one in weights.items()}, dense)
    convert(source, tmp_path / target, target)
    return tmp_path / target


def settings(target: Path) -> dict[str, Any]:
    return json.loads((target / "config.json").read_text())["quantization_config"]


def same(target: Path, scheme: str, weights: dict[str, PackedWeight]) -> None:
    """The target, imported, has the values of ``weights``, and their zeros of 0 and groups."""
    assert foreign.read(checkpoint.open(target))[1] == scheme
    plan = foreign.plan_of(target)
    values = foreign.decoded(plan)
    assert values.keys() == weights.keys()
    for name, one in weights.items():
        np.testing.assert_array_equal(values[name], one.decode())


@pytest.mark.parametrize(
    "term",
    [
        *({**SYMMETRIC, "bits": bits, "zero": 2 ** (bits - 1)} for bits in (2, 3, 4, 8)),
        *({**ASYMMETRIC, "bits": bits} for bits in (2, 3, 4, 8)),
        {**ASYMMETRIC, "zeros": "int16", "scales": "bfloat16"},
        {**SYMMETRIC, "block": [1, -1], "scales": "float32"},
        {**SYMMETRIC, "block": [1, 64]},  # a short last group
        {**SYMMETRIC, "zero": 0},
        {**SYMMETRIC, "zero": 15},
        {**SYMMETRIC, "groups": "int32"},
        {**ASYMMETRIC, "groups": "int32", "block": [1, 64]},
    ],
    ids=lambda term: " ".join(f"{key}={value}" for key, value in term.items() if key != "codec"),
)
def test_gptq(tmp_path: Path, term: dict[str, Any]) -> None:
    one = weight(term)
    target = exported(tmp_path, "gptq", **{NAME: one})
    same(target, "gptq", {NAME: one})
    middle = term.get("zeros") is None and term["zero"] == 2 ** (term["bits"] - 1)
    found = settings(target)
    assert found["checkpoint_format"] == ("gptq" if middle else "gptq_v2") and found["sym"] == middle
    assert found["desc_act"] == ("groups" in term)


@pytest.mark.parametrize(
    "term", [SYMMETRIC, ASYMMETRIC, {**SYMMETRIC, "zero": 0}, {**ASYMMETRIC, "zeros": "int16", "block": [1, -1]}]
)
def test_awq(tmp_path: Path, term: dict[str, Any]) -> None:
    one = weight(term)
    same(exported(tmp_path, "awq", **{NAME: one}), "awq", {NAME: one})


def test_what_a_gptq_layer_looks_like(tmp_path: Path) -> None:
    """To the bit: codes down the columns, zeros of version 1 one less, along the rows."""
    one = weight(SYMMETRIC, (32, 64))
    tensors = checkpoint.open(exported(tmp_path, "gptq", **{NAME: one}))
    arrays = {part: tensors.array(NAME.removesuffix("weight") + part) for part in ("qweight", "qzeros", "g_idx")}
    codes = one.parts["codes"]
    assert arrays["qweight"].view(np.uint32)[3, 5] == int.from_bytes(codes[5, 12:16].tobytes(), "little")
    assert (arrays["qzeros"].view(np.uint32) == 0x77777777).all() and arrays["qzeros"].shape == (2, 4)
    assert arrays["g_idx"].tolist() == [0] * 32 + [1] * 32


def test_layers_that_differ(tmp_path: Path) -> None:
    """Widths and group sizes of single layers, and dense modules, are settings that the importer takes up."""
    weights = {NAME: weight(SYMMETRIC), OTHER: weight({**SYMMETRIC, "bits": 8, "block": [1, 64], "zero": 128})}
    weights["model.layers.1.mlp.up_proj.weight"] = weight(SYMMETRIC)
    router = {"model.layers.1.mlp.gate.weight": np.ones((4, 96), NUMPY["float32"])}
    target = exported(tmp_path, "gptq", router, **weights)
    same(target, "gptq", weights)
    found = settings(target)
    dynamic = {"-:^model\\.layers\\.1\\.mlp\\.gate$": {}}
    assert found["dynamic"] == dynamic | {"+:^model\\.layers\\.1\\.mlp\\.down_proj$": {"bits": 8, "group_size": 64}}
    assert found["bits"] == 4 and found["group_size"] == 32
    awq = exported(tmp_path / "awq", "awq", router, **{NAME: weights[NAME]})
    assert settings(awq)["modules_to_not_convert"] == ["model.layers.1.mlp.gate"]


BOTH: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({**SYMMETRIC, "bits": 5}, {}, "5"),
    ({**SYMMETRIC, "block": [2, 32]}, {}, "block [2, 32]"),
    ({**SYMMETRIC, "view": [96, 64]}, {}, "view"),
    ({**SYMMETRIC, "scales": "float8_e4m3fn"}, {}, "float8_e4m3fn"),
    ({**SYMMETRIC, "scales": {"codec": "int", "bits": 8, "scales": "float16"}}, {}, "packed"),
    ({**SYMMETRIC, "zero": 7.5}, {}, "7.5"),
    ({**SYMMETRIC, "zero": 16}, {}, "16"),
    ({**SYMMETRIC, "zero": 0, "zeros": "float16"}, {}, "zeros float16"),
    ({**SYMMETRIC, "zero": 0, "offsets": "float16"}, {}, "offsets"),
    ({**SYMMETRIC, "rounding": "once", "round_dtype": "float16"}, {}, "rounding once"),
    (SYMMETRIC, {"rotation": {"in": {"size": 32}}}, "no rotation"),
    (SYMMETRIC, {"shape": (2, 64, 96), "stack": 1}, "[2, 64, 96]"),
    (SYMMETRIC, {"shape": (60, 90)}, "60 x 90"),
]


@pytest.mark.parametrize(("term", "more", "word"), BOTH, ids=[word for *_, word in BOTH])
@pytest.mark.parametrize("target", ["gptq", "awq"])
def test_what_neither_can_hold(
    tmp_path: Path, target: str, term: dict[str, Any], more: dict[str, Any], word: str
) -> None:
    refused(tmp_path, target, word, weight(term, **more))


def refused(tmp_path: Path, target: str, word: str, one: PackedWeight, name: str = NAME) -> None:
    with pytest.raises(UnsupportedError) as caught:
        exported(tmp_path, target, **{name: one})
    assert word in str(caught.value) and name in str(caught.value) and str(tmp_path) in str(caught.value)
    assert not (tmp_path / target).exists()


def test_what_only_one_can_hold(tmp_path: Path) -> None:
    """Act-order, other widths and other scales are GPTQ's; AWQ has one group size and whole groups."""
    for term, word in (
        ({**SYMMETRIC, "groups": "int32"}, "act-order"),
        ({**SYMMETRIC, "bits": 8}, "8"),
        ({**SYMMETRIC, "scales": "bfloat16"}, "bfloat16"),
        ({**SYMMETRIC, "block": [1, 64]}, "groups of 64"),
    ):
        refused(tmp_path, "awq", word, weight(term))
    uneven = np.repeat(np.arange(3, dtype=np.int32), [16, 48, 32])
    refused(tmp_path, "gptq", "in group 0", weight({**SYMMETRIC, "groups": "int32"}, groups=uneven))
    refused(tmp_path, "awq", "head", weight(SYMMETRIC), "lm_head.weight")
    refused(tmp_path, "gptq", "linear layer", weight(SYMMETRIC), "model.embed_tokens.weight")
    beyond = weight(ASYMMETRIC)
    beyond.parts["zeros"][1, 2] = 16  # what a destroyed zero of a GPTQ file is read as
    refused(tmp_path, "gptq", "found 16", beyond)
    with pytest.raises(UnsupportedError, match="one group size"):
        exported(tmp_path, "awq", **{NAME: weight(SYMMETRIC), OTHER: weight({**SYMMETRIC, "block": [1, 48]})})
    with pytest.raises(UnsupportedError, match=r"int \+ int"):
        exported(tmp_path, "awq", **{NAME: packed(np.random.default_rng(0), entry((64, 96), SYMMETRIC, SYMMETRIC))})


def test_options(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", {NAME: weight(SYMMETRIC)})
    with pytest.raises(UsageError, match="--dtype"):
        convert(source, tmp_path / "target", "gptq", dtype="float16")
    report = convert(source, tmp_path / "target", "gptq")
    assert report["format"] == "gptq" and report["from"] == "qformat"
    assert [row["stored_bits"] for row in report["weights"]] == [4.5]
    dense = foreign.write(tmp_path / "dense", {NAME: np.ones((64, 96), np.float32)}, {})
    with pytest.raises(UsageError, match="packed weights"):
        convert(dense, tmp_path / "never", "awq")


def test_the_bundled_model(tmp_path: Path) -> None:
    """Packed by the preset of ``int``, to both and back."""
    quantize(ROOT / "examples/tiny-llama", tmp_path / "q", codec="int", bits=4, exclude=["*mlp*", "*layers.[1-5]*"])
    opened = checkpoint.open(tmp_path / "q")
    for target in ("gptq", "awq"):
        convert(tmp_path / "q", tmp_path / target, target)
        same(tmp_path / target, target, {name: opened[name] for name in opened})
        convert(tmp_path / target, tmp_path / f"{target}-back")
        assert checkpoint.open(tmp_path / f"{target}-back").raw("lm_head.weight").tobytes() == (
            opened.raw("lm_head.weight").tobytes()
        )


def test_from_one_foreign_format_to_another(tmp_path: Path) -> None:
    """GPTQ with groups in order becomes AWQ; with act-order it is refused."""
    layers = foreign.DATA / "layers"
    for case, held in (("gptq-v2-b4-g64-asym-zero0", True), ("gptq-v1-b4-g32-actorder", False)):
        source = foreign.plan_of(layers / case)
        try:
            convert(layers / case, tmp_path / case, "awq")
        except QformatError as error:
            assert not held and not isinstance(error, DamagedError) and "act-order" in str(error)
            continue
        before, after = foreign.decoded(source), foreign.decoded(foreign.plan_of(tmp_path / case))
        assert held and before.keys() == after.keys() and all(np.array_equal(before[k], after[k]) for k in before)
