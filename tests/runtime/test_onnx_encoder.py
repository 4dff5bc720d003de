"""An exported encoder: a small BERT, its weights in every family, and what its other forms are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
import onnx_models as models
import pytest
import torch
import transformers
from onnx.reference import ReferenceEvaluator
from onnx_models import STREAMED, folder, session

import qformat
from qformat.dtypes import Array
from qformat.errors import UnsupportedError
from qformat.runtime.ort import trace
from qformat.runtime.ort.export import FILE
from qformat.runtime.ort.tasks import Encoder

CODECS = {  # a part of a weight's name -> how it is packed
    "word_embeddings": ("int", 8, "none"),
    "query": ("int", 4, "none"),
    "key": ("table", 4, "none"),
    "value": ("e8p", 2, "hadamard"),
    "attention.output.dense": ("trellis", 3, "hadamard"),
    "intermediate.dense": ("additive", 2, "none"),
    "output.dense": ("float", 8, "none"),
}
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
SIZES |= {"num_hidden_layers": 2, "vocab_size": 99, "max_position_embeddings": 32}


class Case(NamedTuple):
    packed: Path
    exported: Path
    feeds: dict[str, Array]


def bert(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.BertConfig(**SIZES | {"initializer_range": 0.2} | more))
    for parameter in model.parameters():  # norms and biases that do something
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def packed_model(path: Path, model: Any) -> Path:
    """Dense tensors in bfloat16."""
    arrays = {name: value.numpy().astype(ml_dtypes.bfloat16) for name, value in model.state_dict().items()}
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return folder(path, *models.packed(arrays, CODECS), config)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    base = tmp_path_factory.mktemp("encoder")
    packed = packed_model(base / "packed", bert("BertModel"))
    qformat.export(packed, base / "exported")
    return Case(packed, base / "exported", feeds())


def feeds() -> dict[str, Array]:
    """Rows of 11, 4 and 1 tokens."""
    rng = np.random.default_rng(0)
    mask = (np.arange(11) < np.array([[11], [4], [1]])).astype(np.int64)
    kinds = rng.integers(0, 2, mask.shape)
    return {"input_ids": rng.integers(0, 99, mask.shape), "attention_mask": mask, "token_type_ids": kinds}


def of_torch(model: Any, given: dict[str, Array]) -> dict[str, Array]:
    with torch.no_grad():
        out = model(**{name: torch.from_numpy(array) for name, array in given.items()})
    return {name: value.numpy() for name, value in out.items()}


def check(found: list[Array], expected: dict[str, Array]) -> None:
    for one, exact in zip(found, expected.values(), strict=True):
        assert one.shape == exact.shape
        assert np.abs(one - exact).max() < 64 * 2.0**-24 * np.abs(exact).max()


def test_inputs_and_outputs(case: Case) -> None:
    model = session(case.exported)
    assert {i.name: (i.shape, i.type) for i in model.get_inputs()} == {
        name: (["batch", "seq"], "tensor(int64)") for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    shapes = {"last_hidden_state": ["batch", "seq", 64], "pooler_output": ["batch", 64]}
    assert {o.name: o.shape for o in model.get_outputs()} == shapes
    assert (case.exported / FILE).stat().st_size < 100_000  # most of it functions


def test_torch_and_every_way_to_run_it_agree(case: Case, tmp_path: Path) -> None:
    exact = of_torch(models.exact(case.packed), case.feeds)
    assert list(exact) == ["last_hidden_state", "pooler_output"]
    check(list(of_torch(qformat.load(case.packed, dtype=torch.float32), case.feeds).values()), exact)
    check(session(case.exported).run(None, case.feeds), exact)
    check(session(case.exported, **STREAMED).run(None, case.feeds), exact)
    copied = shutil.copytree(case.exported, tmp_path / "copied")  # onnx reads no file that has two links
    onnx.checker.check_model(copied / FILE)
    check(ReferenceEvaluator(str(copied / FILE)).run(None, case.feeds), exact)


def test_rows_are_gathered_before_they_are_cast(case: Case) -> None:
    """Folding would keep a second, larger copy of an embedding."""
    graph = onnx.load(case.exported / FILE, load_external_data=False).graph
    users = {name: [node.op_type for node in graph.node if name in node.input] for name in stored(graph)}
    names = [f"embeddings.{kind}_embeddings.weight" for kind in ("position", "token_type")]
    assert [users[name] for name in names] == [["Gather"]] * 2
    assert users["pooler.dense.weight"] == ["Cast"]


def stored(graph: Any) -> list[str]:
    return [tensor.name for tensor in graph.initializer if tensor.external_data]


def test_a_head_and_other_names(tmp_path: Path) -> None:
    """Names of long ago, or without the base model's prefix, are brought to the model's as transformers does it."""
    packed = packed_model(tmp_path / "packed", bert("BertForSequenceClassification", num_labels=3, num_hidden_layers=1))
    exact = of_torch(models.exact(packed), feeds())
    opened = qformat.open(packed)
    weights = {name.removeprefix("bert."): opened[name] for name in opened}
    dense = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): opened.array(name) for name in opened.dense}
    assert not weights.keys() & set(opened) and dense.keys() != set(opened.dense)
    renamed = folder(tmp_path / "renamed", weights, dense, json.loads((packed / "config.json").read_text()))
    qformat.export(renamed, tmp_path / "out")
    run = session(tmp_path / "out")
    assert [o.name for o in run.get_outputs()] == list(exact) == ["logits"]
    check(run.run(None, feeds()), exact)


def test_layers_that_share_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AlbertModel(transformers.AlbertConfig(**SIZES, embedding_size=32))
    packed = packed_model(tmp_path / "packed", model.eval())
    qformat.export(packed, tmp_path / "out")
    found = session(tmp_path / "out").run(None, feeds())
    check(found, of_torch(models.exact(packed), feeds()))


def test_token_types_where_there_are_some() -> None:
    names = ["input_ids", "attention_mask"]
    assert list(Encoder(bert("BertModel")).inputs()) == [*names, "token_type_ids"]
    assert list(Encoder(bert("BertModel", type_vocab_size=1)).inputs()) == names


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        ("BartModel", "bart"),
        ("BartForConditionalGeneration", "bart"),
        ("T5ForConditionalGeneration", "t5"),
        ("CLIPModel", "clip"),
        ("ViTModel", "vit"),
        ("BertModel", "llama"),
    ],
)
def test_what_is_refused(kind: str, model_type: str, tmp_path: Path) -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "num_hidden_layers": 1, "vocab_size": 99}
    config = {"model_type": model_type, "architectures": [kind], **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="a decoder or an encoder of text"), torch.device("meta"):
        trace.skeleton(tmp_path, torch.float32)
