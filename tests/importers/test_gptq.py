"""GPTQ files from a writer of our own, made straight from the description of the format, decode to what it meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foreign
import ml_dtypes
import numpy as np
import pytest
from gptq_writer import MODULE, File, marlin, packed
from hypothesis import assume, given
from hypothesis import strategies as st

from qformat import checkpoint
from qformat.converters import importers
from qformat.converters.convert import convert
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError, QformatError, UnsupportedError


@st.composite
def files(draw: st.DrawFn) -> File:
    bits, version = draw(st.integers(2, 8)), draw(st.sampled_from(("gptq", "gptq_v2", "gptq_p")))
    writer = draw(st.sampled_from(("gptqmodel", "autogptq")))
    cols, rows = draw(st.integers(1, 7)) * 32, draw(st.integers(1, 4)) * 32
    ragged = version != "gptq_p" and bits not in (3, 5, 6, 7) and draw(st.booleans())
    if ragged:  # sizes that fill no last word
        cols, rows = cols - draw(st.integers(0, 31)), rows - draw(st.integers(0, 31))
    group = draw(st.sampled_from((-1, 16, 32, 48, 128)))
    groups = 1 if group == -1 else -(-cols // group)
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    lowest = 0 if version != "gptq" or writer == "gptqmodel" else 1
    zeros = rng.integers(lowest, 1 << bits, (groups, rows))
    if draw(st.booleans()):
        zeros[:] = 1 << (bits - 1)
    g_idx = np.arange(cols) // (group if group > 0 else cols)
    if draw(st.booleans()):
        g_idx = rng.permutation(g_idx)
    elif not ragged and draw(st.booleans()):
        g_idx = None
    scales = rng.standard_normal((groups, rows)).astype(
        NUMPY[draw(st.sampled_from(("float16", "bfloat16", "float32")))]
    )
    scales[scales == 0] = 1
    codes = rng.integers(0, 1 << bits, (cols, rows))
    assume((codes != codes[0, 0]).any())  # else it is damage, and refused
    return File(bits, rows, cols, group, version, writer, codes, zeros, scales, g_idx)


@given(files())
def test_every_variant(tmp_path_factory: pytest.TempPathFactory, file: File) -> None:
    plan = foreign.plan_of(file.write(tmp_path_factory.mktemp("gptq")))
    weight = foreign.decoded(plan)[f"{MODULE}.weight"]
    assert np.array_equal(weight, file.values)
    (entry,) = [item.entry for item in plan.items]
    assert entry.label == "bit-exact" and NUMPY[entry.dtype] == file.scales.dtype
    assert ("zeros" in entry.terms[0]) == bool((file.zeros != file.zeros[0, 0]).any())
    trivial = file.g_idx is None or (np.diff(file.g_idx) >= 0).all()
    assert ("groups" in entry.terms[0]) == (not trivial)


TRUE_ZEROS = [10, 3, 1, 0, 5, 14, 5, 7]


@pytest.mark.parametrize(
    ("stored", "quantizer", "read"),
    [
        ([9, 2, 0, 15, 15, 15, 15, 15], "auto_gptq", [10, 3, 1, 16, 16, 16, 16, 16]),  # damaged by its writer
        ([9, 2, 0, 15, 15, 15, 15, 15], "", [10, 3, 1, 16, 16, 16, 16, 16]),
        ([9, 2, 0, 15, 3, 13, 4, 6], "gptqmodel", TRUE_ZEROS),
        ([9, 2, 0, 15, 3, 13, 4, 6], "", TRUE_ZEROS),  # a smaller field above a full one: a borrow
        ([9, 2, 0, 0, 4, 13, 4, 6], "", [10, 3, 1, 1, 5, 14, 5, 7]),  # clamped by its writer
        ([9, 2, 0, 1, 4, 13, 4, 15], "", [10, 3, 1, 2, 5, 14, 5, 16]),  # nothing above it
        ([9, 2, 0, 1, 4, 13, 4, 15], ["optimum:1.2", "gptqmodel:7.7"], [10, 3, 1, 2, 5, 14, 5, 0]),
    ],
)
def test_a_zero_of_zero_in_version_1(tmp_path: Path, stored: list[int], quantizer: Any, read: list[int]) -> None:
    file = File(zeros=np.array([read * 4] * 2), extra={"meta": {"quantizer": quantizer}})
    tensors = file.tensors | {f"{MODULE}.qzeros": packed(np.array([stored * 4] * 2), 4, False).T.copy()}
    folder = foreign.write(tmp_path, tensors, {"quantization_config": file.settings})
    plan = foreign.plan_of(folder)
    assert np.array_equal(foreign.decoded(plan)[f"{MODULE}.weight"], file.values)
    assert any("destroyed" in note for note in plan.notes) == (16 in read)


def test_one_borrow_tells_of_the_whole_file(tmp_path: Path) -> None:
    """A full field at the top of a word says nothing by itself; elsewhere in the file the writer shows itself."""
    plain = File(zeros=np.array([[9, 3, 1, 2, 5, 14, 5, 0] * 4] * 2), writer="gptqmodel")
    borrowed = File(zeros=np.array([TRUE_ZEROS * 4] * 2), writer="gptqmodel", module="model.layers.1.mlp.up_proj")
    config = {"quantization_config": plain.settings | {"meta": None}}
    values = foreign.decoded(foreign.plan_of(foreign.write(tmp_path, plain.tensors | borrowed.tensors, config)))
    assert np.array_equal(values[f"{MODULE}.weight"], plain.values)
    assert np.array_equal(values["model.layers.1.mlp.up_proj.weight"], borrowed.values)


def test_a_zero_of_256(tmp_path: Path) -> None:
    file = File(bits=8, zeros=np.array([[7, 9, 256, 256] * 8] * 2))
    plan = foreign.plan_of(file.write(tmp_path))
    assert plan.items[0].entry.terms[0]["zeros"] == "int16"
    assert np.array_equal(foreign.decoded(plan)[f"{MODULE}.weight"], file.values)


def test_without_a_format_symmetric_zeros_decide(tmp_path: Path) -> None:
    for version in ("gptq", "gptq_v2"):
        file = File(version=version, extra={"checkpoint_format": None})
        assert np.array_equal(
            foreign.decoded(foreign.plan_of(file.write(tmp_path / version)))[f"{MODULE}.weight"], file.values
        )


def test_settings_per_layer(tmp_path: Path) -> None:
    """The first pattern that a name begins with sets what it sets; what it leaves dense may be packed all the same."""
    plain = File()
    wide = File(bits=8, group=64, module="model.layers.18.mlp.gate_proj")
    zeros = np.array([[9, 3, 1, 2] * 8] * 2)
    left = File(zeros=zeros, module="lm_head")
    dynamic = {
        r"+:.*\.18\..*gate.*": {"bits": 8, "group_size": 64},
        r".*\.18\..*": {"bits": 2},
        "-:lm_head": {},
    }
    config = {"quantization_config": plain.settings | {"dynamic": dynamic}, "tie_word_embeddings": True}
    plan = foreign.plan_of(foreign.write(tmp_path, plain.tensors | wide.tensors | left.tensors, config))
    values = foreign.decoded(plan)
    for file in (plain, wide, left):
        assert np.array_equal(values[f"{file.module}.weight"], file.values)
    assert plan.config == {"tie_word_embeddings": False}
    assert any("lm_head" in note and "dynamic" in note for note in plan.notes)


def test_settings_elsewhere(tmp_path: Path) -> None:
    """In a sub-config, or in a file of their own and with no quant_method; none of them reach the target."""
    file = File(group=-1)
    nested = {"text_config": {"hidden_size": 64, "quantization_config": file.settings}}
    plan = foreign.plan_of(foreign.write(tmp_path / "nested", file.tensors, nested))
    assert plan.config == {"text_config": {"hidden_size": 64}}
    settings = {key: file.settings[key] for key in ("bits", "group_size", "sym")}
    own = foreign.write(tmp_path / "own", file.tensors, {"model_type": "llama"}, quantize_config=settings)
    packed = foreign.converted(own, tmp_path)
    assert np.array_equal(packed[f"{MODULE}.weight"].decode(), file.values)
    assert not (tmp_path / "packed" / "quantize_config.json").exists()


def awq(**settings: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    """AWQ's gemm layout, [in, out / 8], under GPTQ's names."""
    rng = np.random.default_rng(0)
    tensors = {"qweight": (64, 4), "qzeros": (2, 4)}
    out = {f"{MODULE}.{part}": rng.integers(0, 1 << 31, shape, np.int32) for part, shape in tensors.items()}
    out[f"{MODULE}.scales"] = np.ones((2, 32), np.float16)
    return out, {"w_bit": 4, "q_group_size": 32, "zero_point": True} | settings


@pytest.mark.parametrize("method", ["awq", "auto-round", "compressed-tensors"])
def test_others_are_not_taken_for_gptq(tmp_path: Path, method: str) -> None:
    tensors, settings = awq()
    named = foreign.write(tmp_path / "named", tensors, {"quantization_config": settings | {"quant_method": method}})
    unnamed = foreign.write(tmp_path / "unnamed", tensors, {}, quant_config=settings)
    for folder in (named, unnamed):
        assert importers.get("gptq").detect(checkpoint.open(folder)) == ""
    wrong = foreign.write(tmp_path / "wrong", tensors, {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(DamagedError, match=r"q_proj\.scales"):
        foreign.plan_of(wrong)


def refused(folder: Path, *words: str, kind: type[QformatError] = DamagedError) -> None:
    with pytest.raises(kind) as caught:
        foreign.decoded(foreign.plan_of(folder))
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"bits": 8}, [f"{MODULE}.qzeros", "bits 8", "4 bits"]),
        ({"group_size": 16}, [f"{MODULE}.scales", "group_size 16", "found 2"]),
        ({"group_size": -1}, [f"{MODULE}.scales", "group_size -1", "found 2"]),
        ({"checkpoint_format": "gptq_v2"}, [f"{MODULE}.qzeros", "checkpoint_format 'gptq_v2'", "7"]),
        ({"checkpoint_format": "marlin"}, [f"{MODULE}.qweight", "marlin"]),
        ({"format": "gptq_v2"}, ["checkpoint_format 'gptq'", "'gptq_v2' in config.json"]),
        ({"desc_act": True}, [f"{MODULE}.g_idx", "desc_act"]),
        ({"bits": "4"}, ["bits from 2 to 8", "'4'"]),
        ({"group_size": 0}, ["group_size", "0"]),
        ({"dynamic": {".*": {"bits": 2}}}, ["bits 2 (config.json, dynamic)"]),
        ({"dynamic": {"(": {}}}, ["dynamic", "'('"]),
    ],
)
def test_settings_that_contradict(tmp_path: Path, extra: dict[str, Any], words: list[str]) -> None:
    refused(File(extra=extra).write(tmp_path), *words)


@pytest.mark.parametrize(
    "extra", [{"checkpoint_format": "bitblas"}, {"pack_dtype": "int64"}, {"dynamic": {"(a+)+$": {}}}], ids=str
)
def test_settings_that_are_not_supported(tmp_path: Path, extra: dict[str, Any]) -> None:
    refused(File(extra=extra).write(tmp_path), *map(str, extra), kind=UnsupportedError)


@pytest.mark.parametrize("key", ["bits", "group_size", "sym", "desc_act", "checkpoint_format", "dynamic"])
def test_settings_in_two_places_that_differ(tmp_path: Path, key: str) -> None:
    file = File(extra={"desc_act": False, "dynamic": {}})
    other = {
        "bits": 2,
        "group_size": 64,
        "sym": False,
        "desc_act": True,
        "checkpoint_format": "gptq_v2",
        "dynamic": {"a": {}},
    }
    folder = foreign.write(
        tmp_path,
        file.tensors,
        {"quantization_config": file.settings},
        quantize_config=file.settings | {key: other[key]},
    )
    refused(folder, key, "config.json", "quantize_config.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(("gptq", "marlin", ".*")),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from((".*", "-:.*", "bits")), inner, max_size=2)
    ),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from((*File().settings, "dynamic", "meta", "pack_dtype", "static_groups")), JSON))
def test_settings_of_any_kind(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> None:
    """They are refused, or the layer decodes to what it decodes to."""
    file = File()
    config = {"quantization_config": file.settings | settings}
    try:
        plan = foreign.plan_of(foreign.write(tmp_path_factory.mktemp("any"), file.tensors, config), "gptq")
    except QformatError:
        return
    assert np.array_equal(foreign.decoded(plan)[f"{MODULE}.weight"], file.values)


def broken(tmp_path: Path, file: File, part: str, change: Any, *words: str) -> None:
    tensors = file.tensors
    tensors[f"{MODULE}.{part}"] = change(tensors.get(f"{MODULE}.{part}"))
    refused(
        foreign.write(tmp_path / "broken", tensors, {"quantization_config": file.settings}), f"{MODULE}.{part}", *words
    )


def test_tensors_that_are_damaged(tmp_path: Path) -> None:
    scattered = File(g_idx=np.arange(64) % 2)
    broken(tmp_path, File(), "scales", lambda scales: scales * np.float16("inf"), "finite", "64", "[0, 0]")
    broken(tmp_path, File(), "scales", lambda scales: scales * 0, "other than 0")
    broken(tmp_path, File(), "scales", lambda scales: scales[:, :-1], "32 columns")
    broken(tmp_path, File(), "scales", lambda scales: scales.astype(np.float64), "float64")
    broken(tmp_path, File(), "qzeros", lambda zeros: zeros[:1], "2 groups")
    broken(tmp_path, File(), "qweight", lambda codes: codes.astype(np.float32), "int32", "float32")
    broken(tmp_path, File(), "qweight", lambda codes: codes * 0, "0 throughout")
    broken(tmp_path, File(), "qweight", lambda codes: codes * 0 - 1, "15 throughout")
    broken(tmp_path, scattered, "g_idx", lambda g_idx: g_idx.astype(np.int64), "int64")
    broken(tmp_path, scattered, "g_idx", lambda g_idx: g_idx[:48], "64 columns", "48")
    broken(tmp_path, File(group=-1, g_idx=np.zeros(64)), "g_idx", lambda g_idx: g_idx[:63], "63 columns")
    broken(tmp_path, scattered, "g_idx", lambda g_idx: np.where(np.arange(64) == 10, np.int32(-1), g_idx), "[10] = -1")
    broken(tmp_path, scattered, "g_idx", lambda g_idx: g_idx | (np.arange(64) < 8).astype(np.int32), "32 columns", "28")
    broken(tmp_path, scattered, "weight", lambda _: np.ones((32, 64), np.float16), "both")
    for part in ("qweight", "qzeros", "scales"):
        tensors = File(g_idx=np.arange(64) // 32).tensors
        del tensors[f"{MODULE}.{part}"]
        folder = foreign.write(tmp_path / part, tensors, {"quantization_config": File().settings})
        refused(folder, f"{MODULE}.{part}")


def test_values_of_zero_are_no_damage(tmp_path: Path) -> None:
    """Every code the zero, or scales of 0 under such codes: a layer that does nothing."""
    file = File(codes=np.full((64, 32), 8), scales=np.zeros((2, 32), np.float16))
    assert not foreign.decoded(foreign.plan_of(file.write(tmp_path)))[f"{MODULE}.weight"].any()


def test_biases(tmp_path: Path) -> None:
    """Zeros where the model has no bias are left out; where it has one, or it is not known, they stay."""
    file, down = File(), File(module="model.layers.0.mlp.down_proj")
    zeros, ones = np.zeros(32, np.float16), np.ones(32, np.float16)
    names = [f"{MODULE}.bias", "model.layers.0.mlp.down_proj.bias"]

    def left_out(first: Array, **config: Any) -> set[str]:
        tensors = file.tensors | down.tensors | dict(zip(names, (first, zeros), strict=True))
        folder = foreign.write(tmp_path / "biases", tensors, {"quantization_config": file.settings, **config})
        return set(foreign.plan_of(folder).left_out)

    assert left_out(zeros, model_type="llama") == set(names)
    assert left_out(ones, model_type="llama") == {names[1]}
    assert left_out(zeros, model_type="llama", attention_bias=True) == {names[1]}
    assert left_out(zeros, model_type="qwen2") == {names[1]}
    assert left_out(zeros, model_type="unheard_of") == set()


def test_names_and_shapes_are_the_models_own(tmp_path: Path) -> None:
    """Conv1D keeps [in, out]; a dense expert among packed ones is reported; an embedding is not guessed at."""
    file = File(module="h.0.attn.c_attn")
    plan = foreign.plan_of(file.write(tmp_path / "conv1d", model_type="gpt2"))
    assert np.array_equal(foreign.decoded(plan)["h.0.attn.c_attn.weight"], file.values.T)
    expert = File(module="model.layers.0.mlp.experts.7.up_proj")
    dense = {"model.layers.0.mlp.experts.11.up_proj.weight": np.ones((32, 64), ml_dtypes.bfloat16)}
    folder = foreign.write(tmp_path / "experts", expert.tensors | dense, {"quantization_config": expert.settings})
    assert any("experts.11" in note for note in foreign.plan_of(folder).notes)
    refused(File(module="model.embed_tokens").write(tmp_path / "embedding"), "embedding", kind=UnsupportedError)


@pytest.mark.parametrize(("cols", "rows", "group"), [(128, 64, 32), (64, 192, -1), (48, 64, 48)])
def test_marlin(tmp_path: Path, cols: int, rows: int, group: int) -> None:
    file = File(rows=rows, cols=cols, group=group, extra={"is_marlin_format": True, "checkpoint_format": None})
    b, s = marlin(file.codes, file.scales)
    tensors = {f"{MODULE}.B": b, f"{MODULE}.s": s}
    folder = foreign.write(tmp_path / "marlin", tensors, {"quantization_config": file.settings})
    assert np.array_equal(foreign.decoded(foreign.plan_of(folder))[f"{MODULE}.weight"], file.values)
    settings = file.settings | {"is_marlin_format": False}
    refused(foreign.write(tmp_path / "plain", tensors, {"quantization_config": settings}), f"{MODULE}.B")
    settings = file.settings | {"bits": 8}
    refused(foreign.write(tmp_path / "bits", tensors, {"quantization_config": settings}), "bits 8")


def test_an_odd_number_of_outputs(tmp_path: Path) -> None:
    """60 experts' gate at 2 bits: what fills the last word of zeros is ignored, whatever it holds."""
    file = File(bits=2, rows=60, zeros=np.array([[1, 2, 3] * 20] * 2), version="gptq_v2")
    tensors = file.tensors
    tensors[f"{MODULE}.qzeros"] = tensors[f"{MODULE}.qzeros"] | np.array([0, 0, 0, -1 << 24], np.int32)
    folder = foreign.write(tmp_path, tensors, {"quantization_config": file.settings})
    assert np.array_equal(foreign.decoded(foreign.plan_of(folder))[f"{MODULE}.weight"], file.values)


def test_the_target_counts_every_tensor(tmp_path: Path) -> None:
    file = File(g_idx=np.arange(64) // 32)
    tensors = file.tensors | {f"{MODULE}.bias": np.zeros(32, np.float16), "model.norm.weight": np.ones(64, np.float16)}
    folder = foreign.write(tmp_path / "source", tensors, {"model_type": "llama", "quantization_config": file.settings})
    report = convert(folder, tmp_path / "target")
    assert report["coverage"] == {"tensors": 6, "consumed": 4, "passed": 1, "left_out": [f"{MODULE}.bias"]}
    assert report["from"] == "gptq" and report["weights"][0]["label"] == "bit-exact"
