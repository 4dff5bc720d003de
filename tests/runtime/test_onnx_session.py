"""``session``: a piece of the bundled model, packed and exported, in each of its modes; and what is refused."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import making
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import qformat
from qformat import checkpoint
from qformat.converters.quantize.job import quantize
from qformat.dtypes import Array
from qformat.errors import DamagedError, QformatError, SurroundingsError, UnsupportedError, UsageError
from qformat.kernels import native
from qformat.runtime.ort import plugin, session
from qformat.runtime.ort.export import export
from qformat.runtime.ort.functions import FILE
from qformat.runtime.ort.sessions import MODES

TINY = Path(__file__).resolve().parents[2] / "examples/tiny-llama"
PROMPT = [1, 409, 278, 1033, 77]
needs_library = pytest.mark.skipif(not native.available(), reason="no native library")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of its layers, with all that is around them."""
    folder = tmp_path_factory.mktemp("session")
    source = checkpoint.open(TINY)
    kept = [name for name in source.tensors if "layers." not in name or "layers.0." in name]
    config = source.config | {"num_hidden_layers": 1}
    making.dense_folder(folder / "dense", {name: source.array(name) for name in kept}, **config)
    quantize(folder / "dense", folder / "packed", codec="e8p", bits=2, include=["*embed_tokens*"])
    return folder / "packed"


@pytest.fixture(scope="module")
def exported(packed: Path) -> Path:
    export(packed, packed.with_name("exported"))
    return packed.with_name("exported")


def greedy(made: onnxruntime.InferenceSession, count: int, dtype: Any = np.float32) -> tuple[list[int], Array]:
    """``count`` tokens after the prompt, each from a run of the last one and the cache; and the last logits."""
    names = [one.name for one in made.get_outputs()]
    shapes = {one.name: one.shape for one in made.get_inputs() if len(one.shape) == 4}
    cache = {name: np.zeros((1, shape[1], 0, shape[3]), dtype) for name, shape in shapes.items()}
    tokens, new = list(PROMPT), list(PROMPT)
    for _ in range(count):
        feeds = {"input_ids": np.array([new]), "attention_mask": np.ones((1, len(tokens)), np.int64)}
        feeds["position_ids"] = np.arange(len(tokens) - len(new), len(tokens))[None]
        out = dict(zip(names, made.run(names, feeds | cache), strict=True))
        cache = {name: out[name.replace("past_key_values", "present")] for name in cache}
        new = [int(out["logits"][0, -1].argmax())]
        tokens += new
    return tokens[len(PROMPT) :], out["logits"][0, -1]


@needs_library
def test_64_greedy_tokens_through_the_cache_are_those_of_torch(packed: Path, exported: Path) -> None:
    model = qformat.load(packed, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, min_new_tokens=64, do_sample=False
        )
    made = session(exported)
    assert len(made.weights) == 8 and all(weight.packed for weight in made.weights)
    found, _ = greedy(made, 64)
    assert found == expected[0, len(PROMPT) :].tolist()
    assert len(set(found)) > 5


@needs_library
def test_the_modes_agree(exported: Path) -> None:
    tokens, logits = zip(*(greedy(session(exported, mode), 3) for mode in MODES), strict=True)
    assert tokens[0] == tokens[1] == tokens[2]
    for other in logits[1:]:
        assert np.abs(other - logits[0]).max() < 64 * 2.0**-24 * np.abs(logits[0]).max()


@needs_library
def test_activations_in_float16(packed: Path, exported: Path, tmp_path: Path) -> None:
    export(packed, tmp_path / "half", dtype="float16")
    made = session(tmp_path / "half")
    assert len(made.weights) == 8 and made.get_outputs()[0].type == "tensor(float16)"
    _, half = greedy(made, 1, np.float16)
    _, single = greedy(session(exported), 1)
    assert 0 < np.abs(half - single).max() < 2e-3 * np.abs(single).max()


def test_without_the_library_weights_are_streamed_and_that_is_said(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_load", lambda: (None, "no compiler"))
    with pytest.warns(UserWarning, match="no native library: .* decoded at every run.*mode='fold'"):
        made = session(exported)
    assert made.weights == []
    assert made.get_session_options().get_session_config_entry("optimization.disable_specified_optimizers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # who chose need not be told
        session(exported, "stream")
    with pytest.raises(UnsupportedError, match="expected the native library, found no compiler"):
        session(exported, "plugin")


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(exported, tmp_path / "copy"))


def change(folder: Path, how: Any) -> None:
    proto = onnx.load(folder / FILE, load_external_data=False)
    how(proto)
    (folder / FILE).write_bytes(proto.SerializeToString())


def set_version(domain: str, version: int) -> Any:
    def how(proto: onnx.ModelProto) -> None:
        next(one for one in proto.opset_import if one.domain == domain).version = version

    return how


def test_a_missing_shard(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(SurroundingsError, match=r"model\.safetensors: expected the shard .* found no such file"):
        session(copy)


def test_shards_that_were_written_anew(packed: Path, copy: Path) -> None:
    quantize(packed.with_name("dense"), copy.with_name("other"), codec="int", bits=4)
    shutil.copy(copy.with_name("other") / "model.safetensors", copy)
    with pytest.raises(DamagedError, match="the tensor where the model has it") as caught:
        session(copy)
    assert "export again" in caught.value.hint


def test_another_version_of_the_operators(copy: Path) -> None:
    change(copy, set_version("qformat", 2))
    with pytest.raises(UnsupportedError, match="expected operators of version 1, found 2"):
        session(copy)


def test_another_opset(copy: Path) -> None:
    change(copy, set_version("", 99))
    with pytest.raises(
        UnsupportedError, match=f"Runtime {onnxruntime.__version__} takes, found ONNX Runtime only .*[Oo]pset 99"
    ):
        session(copy)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08"])
def test_no_model(content: bytes, copy: Path) -> None:
    (copy / FILE).write_bytes(content)
    with pytest.raises(QformatError, match=FILE):
        session(copy)


def test_wrong_usage(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected mode plugin, fold, stream, found quick"):
        session(exported, "quick")
    with pytest.raises(UsageError, match=r"an exported folder, or its model\.onnx"):
        session(tmp_path)


@needs_library
def test_options_that_have_the_plugin_already(exported: Path) -> None:
    options = onnxruntime.SessionOptions()
    plugin.register(options)
    with pytest.raises(UsageError, match="expected options without the plugin"):
        session(exported, options=options)
    by_hand = onnxruntime.SessionOptions()
    by_hand.log_severity_level = 4
    by_hand.register_custom_ops_library(str(plugin.library()))
    with pytest.raises(UnsupportedError) as caught:
        session(exported, options=by_hand)
    assert "registered in these options already" in caught.value.hint
