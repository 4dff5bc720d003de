"""Weights that are stored as several, in PyTorch and in small models of transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import making
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import qformat
from qformat.errors import DamagedError, UnsupportedError
from qformat.manifest import Entry
from qformat.runtime.pytorch.modules import Packed, linear, tensors, unpack
from qformat.runtime.pytorch.prepared import spec
from qformat.runtime.pytorch.tensor import PackedTensor, PiecesTensor
from qformat.verify import verify
from qformat.weight import PackedWeight

INT = {"codec": "int", "bits": 4, "block": [1, 16], "zero": 8}
NF4 = {"codec": "table", "bits": 4, "table": "nf4", "block": [1, 16], "scales": "float32"}
TURN = {"in": {"size": 16, "scale": "int8"}, "out": {"size": 8}}
IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))

# axis and the pieces along it
CASES: dict[str, tuple[int, list[Entry]]] = {
    "rows": (0, [making.entry((24, 64), INT), making.entry((8, 64), NF4, rotation=TURN), making.entry((5, 64), INT)]),
    "columns": (1, [making.entry((24, 32), NF4), making.entry((24, 64), INT, rotation=TURN)]),
    "transposed-rows": (
        0,
        [making.entry((16, 24), INT, transposed=True), making.entry((32, 24), NF4, transposed=True)],
    ),
    "transposed-columns": (1, [making.entry((32, 24), INT, transposed=True)] * 2),
    "unlike": (0, [making.entry((16, 32), INT, transposed=True), making.entry((8, 32), INT)]),
}


def made(name: str) -> tuple[PiecesTensor, Tensor]:
    """A case, and its decoded values."""
    axis, entries = CASES[name]
    weights = [making.packed(np.random.default_rng(i), one) for i, one in enumerate(entries)]
    return pieces(weights, axis), torch.from_numpy(np.concatenate([one.decode() for one in weights], axis))


def pieces(weights: list[PackedWeight], axis: int) -> PiecesTensor:
    each = [PackedTensor(list(tensors(one.parts).values()), spec(one.entry), torch.float32) for one in weights]
    return PiecesTensor(each, axis, torch.float32)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("name", CASES)
def test_products_and_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, dense = made(name)
    assert weight.shape == dense.shape and torch.allclose(weight.decode(), dense, rtol=1e-6, atol=1e-7)
    if name != "unlike":  # a product with which is made with the decoded weight
        monkeypatch.setattr(PackedTensor, "decode", lambda self: pytest.fail("decoded"))
        monkeypatch.setattr(PiecesTensor, "decode", lambda self: pytest.fail("decoded"))
    turned = name.startswith("transposed")
    matrix = dense.mT if turned else dense
    x = normal(2, 3, matrix.shape[1]).requires_grad_()
    y: Any = x @ weight if turned else functional.linear(x, weight)
    exact = x.double() @ matrix.double().mT
    assert y.dtype == torch.float32 and (y - exact).abs().max() <= 1e-5 * exact.abs().max()
    y.sum().backward()
    assert x.grad is not None and torch.allclose(x.grad[0, 0], matrix.sum(dim=0), atol=1e-3)
    if not turned:
        rows = torch.tensor([[0, len(dense) - 1], [3, len(dense) - 1]])
        found = functional.embedding(rows, weight)
        assert (found - dense[rows]).abs().max() <= 1e-6 * dense.abs().max()
    for row in (-1, len(dense)) if name in ("rows", "columns") else ():
        with pytest.raises(IndexError, match=f"rows from 0 to {len(dense) - 1} expected"):
            functional.embedding(torch.tensor([row]), weight)


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_a_layer(name: str) -> None:
    axis, entries = CASES[name]
    stored = tuple(making.packed(np.random.default_rng(i), one, f"w.{i}") for i, one in enumerate(entries))
    dense = torch.from_numpy(np.concatenate([one.decode() for one in stored], axis))
    listed = [{"weights": [one.name]} for one in stored]
    whole = making.entry(tuple(dense.shape), pieces=listed, **({"axis": axis} if axis else {}))
    bias = normal(len(dense))
    layer: Any = linear(PackedWeight("w", whole, {}, pieces=stored), bias)
    wanted = {"bias", *(f"weight_{i}_{part}" for i, one in enumerate(stored) for part in one.parts)}
    assert layer.state_dict().keys() == wanted
    x = normal(3, dense.shape[1])
    y = layer(x)
    exact = x.double() @ dense.double().mT + bias
    assert (y - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert torch.equal(copy.deepcopy(layer)(x), y)
    unpack(layer)
    assert type(layer) is nn.Linear and layer.state_dict().keys() == {"weight", "bias"}
    assert torch.allclose(layer(x), y, rtol=1e-4, atol=1e-3)


def test_narrow_sums_are_rounded_once() -> None:
    weight, _ = made("columns")
    x = normal(4, 96).bfloat16()
    assert torch.equal(functional.linear(x, weight), functional.linear(x.float(), weight).bfloat16())


def test_matrices_of_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    along = [making.packed(rng, making.entry((n, 8, 32), INT, stack=1)) for n in (1, 2)]
    across = [making.packed(rng, making.entry((3, n, 32), INT, stack=1)) for n in (8, 16)]
    x = normal(2, 32)
    monkeypatch.setattr(PackedTensor, "decode", lambda self: pytest.fail("decoded"))
    for weights, axis in ((along, 0), (across, 1)):
        weight, dense = pieces(weights, axis), torch.from_numpy(np.concatenate([one.decode() for one in weights], axis))
        for index in (0, torch.tensor(2), -1):
            found: Any = functional.linear(x, weight[index])
            assert torch.allclose(found, x @ dense[index].mT, atol=1e-4)


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "pad_token_id": 0, "dtype": "float32"}


def llama() -> tuple[Any, dict[str, tuple[int, list[tuple[str, Entry]]]]]:
    """Rows of two codecs, columns, and an embedding; pieces beside the weight and within its module."""
    config = transformers.LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"])
    weights = {
        "model.embed_tokens": (0, [("model.common.weight", (16, 64), INT), ("model.rare.weight", (48, 64), NF4)])
    }
    for i in range(2):
        up, down = f"model.layers.{i}.mlp.up_proj", f"model.layers.{i}.mlp.down_proj"
        weights[up] = 0, [(f"{up}.first", (32, 64), INT), (f"{up}.second", (64, 64), NF4)]
        weights[down] = 1, [(f"{down}_0.weight", (64, 32), NF4), (f"{down}_1.weight", (64, 64), INT)]
    return config, {
        f"{name}.weight": (axis, [(piece, making.entry(shape, term)) for piece, shape, term in listed])
        for name, (axis, listed) in weights.items()
    }


def gpt_oss() -> tuple[Any, dict[str, tuple[int, list[tuple[str, Entry]]]]]:
    """Experts of one tensor, packed one by one."""
    sizes = {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "architectures": ["GptOssForCausalLM"]}
    one = {"stack": 1, "transposed": True}
    weights = {}
    for name, shape in (("gate_up_proj", (1, 64, 192)), ("down_proj", (1, 96, 64))):
        for experts in (f"model.layers.{i}.mlp.experts" for i in range(2)):
            listed = [(f"{experts}.{number}.{name}", making.entry(shape, INT, **one)) for number in range(4)]
            weights[f"{experts}.{name}"] = 0, listed
    return transformers.GptOssConfig(**sizes), weights


@pytest.fixture(scope="module", params=[llama, gpt_oss], ids=["llama", "gpt_oss"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model some of whose weights are pieces."""
    path: Path = tmp_path_factory.mktemp(request.node.name.strip("[]")) / "model"
    config, composed = request.param()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    rng = np.random.default_rng(0)
    weights = {}
    for name, (axis, listed) in composed.items():
        of = {piece: scaled(making.packed(rng, one, piece)) for piece, one in listed}
        shape = np.concatenate([one.decode() for one in of.values()], axis).shape
        along = {"axis": axis} if axis else {}
        whole = making.entry(shape, weights=(name,), pieces=[{"weights": [piece]} for piece in of], **along)
        weights |= {**of, name: PackedWeight(name, whole, {})}
    dense = {name: one.detach().numpy() for name, one in model.state_dict().items() if name not in weights}
    making.folder(path, weights, dense)
    own = json.loads((path / "config.json").read_text())
    model.config.architectures = config.architectures
    settings = {"quantization_config": own["quantization_config"]}
    (path / "config.json").write_text(json.dumps({**model.config.to_dict(), **settings}))
    return path


def scaled(weight: PackedWeight) -> PackedWeight:
    """With values like those of a model that is new."""
    parts: Mapping[str, Any] = {
        name: part * part.dtype.type(0.01) if name == "scales" else part for name, part in weight.parts.items()
    }
    return PackedWeight(weight.name, weight.entry, parts)


def load(path: Path) -> Any:
    return qformat.load(path, dtype=torch.float32)  # type: ignore[operator]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def test_a_model(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify(qformat.open(packed)) == []  # type: ignore[operator]
    qformat.convert(packed, tmp_path / "dense", to="dense", dtype="float32")  # type: ignore[operator]
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    reference.set_experts_implementation("eager")
    model = load(packed)
    with monkeypatch.context() as patched:
        patched.setattr(PackedTensor, "decode", lambda self: pytest.fail("decoded"))
        found = logits(model)
    of_float32, exact = logits(reference), logits(reference.double())
    assert (found - exact).square().mean() <= 4 * (of_float32 - exact).square().mean()
    assert torch.equal(logits(copy.deepcopy(model)), found)
    plain = model.dequantize()
    assert not any(isinstance(module, Packed) for module in plain.modules())
    assert torch.allclose(logits(plain), found, atol=1e-4)
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in reference.named_parameters()}


def test_saved_again_it_has_the_same_tensors(packed: Path, tmp_path: Path) -> None:
    load(packed).save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    before, after = qformat.open(packed), qformat.open(tmp_path / "saved")  # type: ignore[operator]
    assert verify(after) == [] and before.settings == after.settings
    assert before.tensors.keys() == after.tensors.keys()
    assert all(before.raw(name).tobytes() == after.raw(name).tobytes() for name in before.tensors)
    assert torch.equal(logits(load(tmp_path / "saved")), logits(load(packed)))


def test_what_is_lacking_is_named(packed: Path, tmp_path: Path) -> None:
    opened = qformat.open(packed)  # type: ignore[operator]
    name, (first, *_) = next(iter(opened.composed.items()))
    tensors = {one: opened.array(one) for one in opened.tensors if one != f"{first}_codes"}
    making.dense_folder(tmp_path / "damaged", tensors)
    (tmp_path / "damaged/config.json").write_text((packed / "config.json").read_text())
    with pytest.raises(DamagedError, match=f"{first}: expected part codes, found none"):
        load(tmp_path / "damaged")
    making.dense_folder(tmp_path / "twice", {**{one: opened.array(one) for one in opened.tensors}, name: np.ones(1)})
    (tmp_path / "twice/config.json").write_text((packed / "config.json").read_text())
    for loading in (load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(DamagedError, match=f"{name}: expected a weight that other ones hold, stored once"):
            loading(tmp_path / "twice")


def test_a_tied_weight_needs_parts_of_its_own(packed: Path, tmp_path: Path) -> None:
    if "model.embed_tokens.weight" not in qformat.open(packed).composed:  # type: ignore[operator]
        pytest.skip("no embedding in pieces")
    config = json.loads((packed / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "model.safetensors").symlink_to(packed / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UnsupportedError, match="embed_tokens.weight: expected a weight with parts of its own, to be tied"
    ):
        load(tmp_path)
