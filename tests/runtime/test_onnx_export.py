"""An exported decoder: one layer of the bundled model with tied, packed embeddings, its weights in every codec."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import making
import ml_dtypes
import numpy as np
import onnx
import onnx_models as models
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx_models import STREAMED, folder, session

import qformat
from qformat import checkpoint
from qformat.converters.quantize.weight import pack
from qformat.dtypes import Array
from qformat.errors import DamagedError, UnsupportedError, UsageError
from qformat.runtime.ort.export import FILE, bring_files
from qformat.runtime.ort.functions import DOMAIN, text

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples/tiny-llama"
CODECS = {  # a part of a weight's name -> how it is packed
    "embed_tokens": ("int", 8, "none"),
    "q_proj": ("int", 3, "none"),
    "k_proj": ("int", 3, "none"),
    "v_proj": ("table", 4, "none"),
    "o_proj": ("table", 4, "hadamard"),
    "gate_proj": ("trellis", 2, "hadamard"),
    "up_proj": ("trellis", 2, "hadamard"),
    "down_proj": ("trellis", 4, "hadamard"),
}
INT = {"codec": "int", "bits": 4, "block": [1, 16], "zero": 8}


class Case(NamedTuple):
    packed: Path
    exported: Path
    output: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    base = tmp_path_factory.mktemp("onnx")
    packed, exported = packed_model(base / "packed"), base / "exported"
    command = [sys.executable, "-m", "qformat", "export", str(packed), str(exported), "--json"]
    return Case(packed, exported, subprocess.run(command, cwd=ROOT, capture_output=True, text=True))


def packed_model(path: Path) -> Path:
    """One layer, the head tied to the embedding."""
    dense = checkpoint.open(TINY)
    names = [n for n in dense.tensors if n.partition("layers.")[2][:1] <= "0" and n != "lm_head.weight"]
    config = dense.config | {"num_hidden_layers": 1, "tie_word_embeddings": True}
    folder(path, *models.packed({name: dense.array(name) for name in names}, CODECS), config)
    shutil.copy(TINY / "tokenizer.json", path)
    return path


class Text(NamedTuple):
    """Token ids [2, 9]; the first three of row 0 are padding."""

    ids: Array
    mask: Array
    position: Array

    def feeds(self, start: int, stop: int, past: list[Array]) -> dict[str, Array]:
        part = slice(start, stop)
        return {
            "input_ids": self.ids[:, part],
            "position_ids": self.position[:, part],
            "attention_mask": self.mask[:, :stop],
            "past_key_values.0.key": past[0],
            "past_key_values.0.value": past[1],
        }


@pytest.fixture(scope="module")
def words() -> Text:
    ids = np.random.default_rng(0).integers(0, 4096, (2, 9))
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    return Text(ids, mask, np.maximum(mask.cumsum(axis=1) - 1, 0))


EMPTY = [np.zeros((2, 2, 0, 64), np.float32)] * 2


def logits(model: Any, words: Text) -> Array:
    ids, mask, position = map(torch.from_numpy, words)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=position).logits.numpy()  # type: ignore[no-any-return]


def test_says_what_it_wrote_and_nothing_else(case: Case) -> None:
    assert (case.output.returncode, case.output.stderr) == (0, "")
    report = json.loads(case.output.stdout)
    file = (case.exported / FILE).read_bytes()
    nbytes = checkpoint.open(case.packed).nbytes
    assert report == {"path": str(case.exported), "onnx_bytes": len(file), "bytes": nbytes}
    assert len(file) < 60_000  # most of it functions, of which a model of many layers has no more
    assert b"site-packages" not in file  # the exporter notes where in the code each node comes from


def test_the_folder_is_usable(case: Case) -> None:
    assert (case.exported / "model.safetensors").samefile(case.packed / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        assert (case.exported / name).read_bytes() == (case.packed / name).read_bytes()
        assert not (case.exported / name).samefile(case.packed / name)
    assert list(checkpoint.open(case.exported)) == list(checkpoint.open(case.packed))


def test_weights_lie_in_the_shards_alone(case: Case) -> None:
    opened = checkpoint.open(case.packed)
    model = onnx.load(case.exported / FILE, load_external_data=False)
    outside = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data}
    assert set(outside) == set(opened.tensors)
    for name, tensor in opened.tensors.items():
        place = {"location": "model.safetensors", "offset": str(tensor.start), "length": str(tensor.nbytes)}
        assert outside[name] == place
    inside = [t for t in model.graph.initializer if not t.external_data]
    assert max(t.ByteSize() for t in inside) < 300  # the inverse frequencies of the rotary embedding


def test_nodes_name_their_weights(case: Case) -> None:
    opened = checkpoint.open(case.packed)
    model = onnx.load(case.exported / FILE, load_external_data=False)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    packed = {node.name: {attribute.name: attribute.s.decode() for attribute in node.attribute} for node in nodes}
    found = [(name.partition("_")[0], attributes["weight"]) for name, attributes in packed.items()]
    tied = "model.embed_tokens.weight"
    assert sorted(found) == sorted([("Embedding", tied), *(("Linear", name) for name in opened)])
    for name, attributes in packed.items():
        assert attributes["entry"] == text(opened[attributes["weight"]].entry)
        assert name == f"{name.partition('/')[0]}/{attributes['weight']}"
    assert {node.op_type for node in nodes} == {function.name for function in model.functions}
    assert len(model.functions) == 8  # the eight linear weights are packed in seven ways; the embedding is one more


def test_inputs_and_outputs(case: Case) -> None:
    model = session(case.exported)
    new, cache = ["batch", "seq"], ["batch", 2, "past", 64]
    assert {i.name: i.shape for i in model.get_inputs()} == {
        **{"input_ids": new, "position_ids": new, "attention_mask": ["batch", "total"]},
        **{"past_key_values.0.key": cache, "past_key_values.0.value": cache},
    }
    assert [o.name for o in model.get_outputs()] == ["logits", "present.0.key", "present.0.value"]
    assert {i.type for i in [*model.get_inputs(), *model.get_outputs()]} == {"tensor(int64)", "tensor(float)"}


def test_logits_are_those_of_torch(case: Case, words: Text) -> None:
    """Without a past, with one of padding and text, token by token. The bound is 64 float32 roundings of the largest
    logit; torch's own float32 is 2 of them off, ONNX Runtime 4.
    """
    exact = logits(models.exact(case.packed), words)
    kept = words.mask.astype(bool)
    bound = 64 * 2.0**-24 * np.abs(exact).max()
    packed = logits(qformat.load(case.packed, dtype=torch.float32), words)
    model = session(case.exported)
    for steps in ([0, 9], [0, 5, 9], [*range(10)]):
        past, found = EMPTY, []
        for start, stop in zip(steps, steps[1:], strict=False):
            some, *past = model.run(None, words.feeds(start, stop, past))
            assert past[0].shape == past[1].shape == (2, 2, stop, 64)
            found.append(some)
        for other in (packed, exact):
            assert np.abs(np.concatenate(found, axis=1) - other)[kept].max() < bound


def test_streamed_and_by_the_reference(case: Case, words: Text, tmp_path: Path) -> None:
    """Decoded at every run, and by another runtime: the same up to float32 rounding."""
    feeds = words.feeds(0, 9, EMPTY)
    whole, *_ = session(case.exported).run(None, feeds)
    streamed, *_ = session(case.exported, **STREAMED).run(None, feeds)
    copied = shutil.copytree(case.exported, tmp_path / "copied")  # onnx reads no file that has two links
    onnx.checker.check_model(copied / FILE)
    reference, *_ = ReferenceEvaluator(str(copied / FILE)).run(None, feeds)
    for found in (streamed, reference):
        assert np.abs(found - whole)[words.mask.astype(bool)].max() < 1e-5 * np.abs(whole).max()


def test_weights_that_are_stored_as_one(words: Text, tmp_path: Path) -> None:
    """One product gives q, k and v; of rows, the first is not that of the stored weight."""
    dense = checkpoint.open(TINY)
    rest = {n: dense.array(n) for n in dense.tensors if n.partition("layers.")[2][:1] <= "0"}
    at = "model.layers.0.self_attn"
    turn = {"in": {"size": 32, "scale": "int8"}, "out": {"size": 16, "scale": "float16"}}
    joined = {
        f"{at}.qkv.weight": [f"{at}.{one}_proj.weight" for one in "qkv"],
        "model.both.weight": ["lm_head.weight", "model.embed_tokens.weight"],
    }
    weights = {}
    for name, members in joined.items():
        pieces = [{"weights": [one], "rows": len(rest[one])} for one in members]
        whole = np.concatenate([rest.pop(one) for one in members])
        weights[name] = pack(making.entry(whole.shape, INT, weights=(name,), concat=pieces, rotation=turn), whole)
    packed = folder(tmp_path / "packed", weights, rest, dense.config | {"num_hidden_layers": 1})
    qformat.export(packed, tmp_path / "out")
    nodes = [n for n in onnx.load(tmp_path / "out" / FILE, load_external_data=False).graph.node if n.domain == DOMAIN]
    assert sorted(node.name.partition("/")[2] for node in nodes) == sorted([*joined, "model.both.weight"])
    found, *_ = session(tmp_path / "out").run(None, words.feeds(0, 9, EMPTY))
    expected = logits(models.exact(packed), words)
    kept = words.mask.astype(bool)
    assert np.abs(found - expected)[kept].max() < 64 * 2.0**-24 * np.abs(expected).max()


def test_shards_are_copied_where_they_cannot_be_linked(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("another device")

    monkeypatch.setattr("os.link", refuse)
    bring_files(checkpoint.open(case.packed), tmp_path)
    own, copied = case.packed / "model.safetensors", tmp_path / "model.safetensors"
    assert not copied.samefile(own) and copied.read_bytes() == own.read_bytes()


def test_a_missing_shard(case: Case, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    shutil.copy(case.exported / FILE, tmp_path / "alone")
    with pytest.raises(Exception, match="model.safetensors"):
        session(tmp_path / "alone")
    shutil.copy(case.packed / "config.json", tmp_path / "alone")
    with pytest.raises(DamagedError, match="alone"):
        qformat.export(tmp_path / "alone", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_tensor_and_a_misshapen_one(tmp_path: Path) -> None:
    config = json.loads((TINY / "config.json").read_text()) | {"num_hidden_layers": 1}
    tensors = {name: checkpoint.open(TINY).array(name) for name in ("model.norm.weight", "lm_head.weight")}
    packed = {"model.embed_tokens.weight": making.packed(np.random.default_rng(0), making.entry((4096, 64), INT))}
    with pytest.raises(DamagedError, match="model.layers.0.* a tensor that the model needs"):
        qformat.export(folder(tmp_path / "missing", packed, tensors, config), tmp_path / "out")
    config["num_hidden_layers"] = 0
    with pytest.raises(DamagedError, match=r"embed_tokens.weight: .*\[4096, 256\], found \[4096, 64\]"):
        qformat.export(folder(tmp_path / "misshapen", packed, tensors, config), tmp_path / "out")
    whole = {"model.embed_tokens.weight": making.packed(np.random.default_rng(0), making.entry((4096, 256), INT))}
    small = tensors | {"model.norm.weight": np.ones(256, ml_dtypes.float8_e4m3fn)}
    with pytest.raises(UnsupportedError, match=r"norm.weight: .* found float8_e4m3fn"):
        qformat.export(folder(tmp_path / "small", whole, small, config), tmp_path / "out")


def test_what_is_refused(case: Case, tmp_path: Path) -> None:
    moe = checkpoint.open(ROOT / "examples/tiny-moe")
    experts = [name for name in moe.tensors if ".experts." in name]
    packed = {n: making.packed(np.random.default_rng(0), making.entry(moe.tensors[n].shape, INT)) for n in experts}
    rest = {name: moe.array(name) for name in moe.tensors if name not in packed}
    with pytest.raises(UnsupportedError, match=str(moe.config["architectures"][0])):
        qformat.export(folder(tmp_path / "moe", packed, rest, moe.config), tmp_path / "out")
    with pytest.raises(UnsupportedError, match="a decoder or an encoder of text"):
        qformat.export(making.folder(tmp_path / "unknown", packed), tmp_path / "out")
    pieces = {f"w.{i}": making.packed(np.random.default_rng(0), making.entry((8, 16), INT)) for i in range(2)}
    whole = making.entry((16, 16), weights=("w",), pieces=[{"weights": [name]} for name in pieces])
    pieces["w"] = making.packed(np.random.default_rng(0), whole)
    with pytest.raises(UnsupportedError, match="w: expected whole weights, for ONNX, found one in pieces"):
        qformat.export(making.folder(tmp_path / "pieces", pieces), tmp_path / "out")
    with pytest.raises(UsageError, match="a qformat model"):
        qformat.export(TINY, tmp_path / "out")
    with pytest.raises(UsageError, match="float32 or float16"):
        qformat.export(case.packed, tmp_path / "out", dtype="bfloat16")
    with pytest.raises(UsageError, match="does not exist"):
        qformat.export(case.packed, case.exported)
