"""Models some of whose weights are rows of one that is stored: QuIP#'s own layers, imported, in a small model each."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import making
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qformat
from qformat.errors import DamagedError, UnsupportedError
from qformat.runtime.evaluate import evaluate
from qformat.runtime.pytorch.modules import Packed, QLinear
from qformat.verify import verify

LAYERS = Path(__file__).resolve().parents[1] / "data/layers"
QKV, UPGATE = [f"self_attn.{one}_proj" for one in "qkv"], ["mlp.up_proj", "mlp.gate_proj"]
NAMES = {"quip-e8p12": QKV, "quip-e8p12rvq3b": UPGATE, "quip-e8p12rvq4b": QKV}  # unequal rows; sums of two terms
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def source(name: str, folder: Path) -> Path:
    """A model of one layer, in which the layers of the case take their places."""
    config = json.loads((LAYERS / name / "config.json").read_text()) | {"vocab_size": 64}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(folder))
    replaced = json.loads((LAYERS / name / "case.json").read_text())["expected"]
    rest = {key: tensor.half() for key, tensor in model.state_dict().items() if key not in replaced}
    save_file({**rest, **load_file(LAYERS / name / "model.safetensors")}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case's model, imported when first asked for."""
    root = tmp_path_factory.mktemp("packed")

    def make(name: str) -> Path:
        if not (root / name).exists():
            qformat.convert(source(name, root / f"{name}-source"), root / name)  # type: ignore[operator]
        return root / name

    return make


def load(path: Path, **options: Any) -> Any:
    return qformat.load(path, **options)  # type: ignore[operator]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_decoded_weights(name: str, packed: Callable[[str], Path], tmp_path: Path) -> None:
    qformat.convert(packed(name), tmp_path / "dense", to="dense", dtype="float32")  # type: ignore[operator]
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    model = load(packed(name), dtype=torch.float32)
    found, of_float32, exact = logits(model), logits(reference), logits(reference.double())
    assert (found - exact).square().mean() <= 4 * (of_float32 - exact).square().mean()
    assert all(type(model.model.layers[0].get_submodule(layer)) is QLinear for layer in NAMES[name])


def test_what_is_stored_lies_in_memory_once(packed: Callable[[str], Path]) -> None:
    attention = load(packed("quip-e8p12")).model.layers[0].self_attn
    stored = qformat.open(packed("quip-e8p12"))  # type: ignore[operator]
    assert {name for name, _ in attention.named_parameters()} == {
        *(f"qkv_proj.weight_{part}" for part in ("codes", "in_scale", "out_scale")),
        "o_proj.weight",
    }
    q, v = attention.q_proj, attention.v_proj
    assert all(one is other for one, other in zip(q.parts(), v.parts(), strict=True))
    for name, layer in (("q", q), ("k", attention.k_proj), ("v", v)):
        decoded = stored[f"model.layers.0.self_attn.{name}_proj.weight"].decode()
        assert layer.weight.shape == decoded.shape and layer.weight.dtype == torch.float16
        np.testing.assert_array_max_ulp(
            layer.weight.float().numpy(), decoded.astype(np.float16).astype(np.float32), 8192
        )


@pytest.mark.parametrize("how", ["copied", "cast", "compiled"])
def test_a_model_as_any_other(how: str, packed: Callable[[str], Path]) -> None:
    model = load(packed("quip-e8p12"), dtype=torch.float32)
    wanted = logits(model)
    if how == "copied":
        other, own = copy.deepcopy(model), model.model.layers[0].self_attn.qkv_proj
        attention = other.model.layers[0].self_attn
        assert attention.q_proj.packed["weight"].owner is attention.qkv_proj is not own
    elif how == "cast":
        other = copy.deepcopy(model)
        assert other.model.layers[0].double().self_attn.q_proj.weight.dtype == torch.float64
        other.model.layers[0].float()
    else:
        other = torch.compile(model, backend="aot_eager")
    assert torch.equal(logits(other), wanted)


def test_derivatives_go_through(packed: Callable[[str], Path]) -> None:
    model = load(packed("quip-e8p12"), dtype=torch.float32)
    plain = copy.deepcopy(model).dequantize()
    assert not any(isinstance(module, Packed) for module in plain.modules())
    assert "model.layers.0.self_attn.qkv_proj" not in dict(plain.named_modules())
    grads = []
    for one in (model, plain):
        inputs = one.get_input_embeddings()(IDS).detach().requires_grad_()
        one(inputs_embeds=inputs, labels=IDS).loss.backward()
        grads.append(inputs.grad)
    assert torch.allclose(*grads, atol=1e-5 * float(grads[1].abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_saved_again_it_has_the_same_tensors(name: str, packed: Callable[[str], Path], tmp_path: Path) -> None:
    path, wanted = packed(name), qformat.open(packed(name))  # type: ignore[operator]
    for target, size in (("whole", "1GB"), ("shards", "60KB")):
        transformers.AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / target, max_shard_size=size)
        path = tmp_path / target
        found = qformat.open(path)  # type: ignore[operator]
        assert verify(found) == [] and found.settings == wanted.settings
        assert found.tensors.keys() == wanted.tensors.keys()
        assert all(found.raw(tensor).tobytes() == wanted.raw(tensor).tobytes() for tensor in found.tensors)
    assert torch.equal(logits(load(path)), logits(load(packed(name))))


def test_the_base_model_alone(packed: Callable[[str], Path]) -> None:
    """Names lose what the model with a head has before them."""
    base = transformers.LlamaModel.from_pretrained(packed("quip-e8p12"))
    assert "layers.0.self_attn.qkv_proj.weight_codes" in base.state_dict()
    wanted = load(packed("quip-e8p12"))
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, wanted.model(IDS).last_hidden_state)


def changed(path: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a model with other tensors."""
    target.mkdir()
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((path / "config.json").read_text())
    return target


def test_a_tensor_that_is_lacking_or_over(packed: Callable[[str], Path], tmp_path: Path) -> None:
    stored = "model.layers.0.self_attn.qkv_proj.weight"
    key = "model.layers.0.self_attn.k_proj.weight"
    missing = changed(packed("quip-e8p12"), tmp_path / "missing", lambda t: t.pop(f"{stored}_codes"))
    twice = changed(packed("quip-e8p12"), tmp_path / "twice", lambda t: t.update({key: torch.zeros(64, 192)}))
    for loading in (load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(DamagedError, match=f"{stored}: expected part codes, found none"):
            loading(missing)
        with pytest.raises(DamagedError, match=f"{key}: expected a weight that other ones hold, stored once"):
            loading(twice)


def test_a_name_that_the_holder_cannot_have(packed: Callable[[str], Path], tmp_path: Path) -> None:
    """What is stored keeps its name: beside the model's own modules, not in a list of them, nor in a weight's place."""
    for name, error, message in (
        ("fused.0", None, ""),
        ("model.layers.weight", None, ""),
        ("model.layers.qkv.weight", UnsupportedError, "expected a stored weight beside those of the model"),
        ("model.norm.weight", DamagedError, "expected a stored weight of which several of the model's are rows"),
    ):

        def rename(tensors: dict[str, Any], name: str = name) -> None:
            for part in ("codes", "in_scale", "out_scale"):
                tensors[f"{name}_{part}"] = tensors.pop(f"model.layers.0.self_attn.qkv_proj.weight_{part}")

        renamed = changed(packed("quip-e8p12"), tmp_path / f"{name}-tensors", rename)
        path = with_entry(renamed, tmp_path / name, weights=[name])
        if error is None:
            model = load(path)
            assert torch.equal(logits(model), logits(load(packed("quip-e8p12"))))
            model.save_pretrained(tmp_path / f"{name}-saved")
            assert verify(qformat.open(tmp_path / f"{name}-saved")) == []  # type: ignore[operator]
            continue
        with pytest.raises(error, match=f"{name}: {message}"):
            load(path)


def with_entry(path: Path, target: Path, **changes: Any) -> Path:
    changed(path, target, lambda tensors: None)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["entries"][0].update(changes)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_what_the_model_has_no_place_for(packed: Callable[[str], Path], tmp_path: Path) -> None:
    pieces = json.loads((packed("quip-e8p12") / "config.json").read_text())["quantization_config"]["entries"][0][
        "concat"
    ]
    other = [{**piece, "weights": [f"other.{i}.weight"]} for i, piece in enumerate(pieces)]
    with pytest.raises(DamagedError, match="expected a tensor that the model needs, found none"):
        load(with_entry(packed("quip-e8p12"), tmp_path / "none", concat=other))
    with pytest.raises(DamagedError, match="other.1.weight: expected a place in the model for each weight, found none"):
        load(with_entry(packed("quip-e8p12"), tmp_path / "one", concat=[pieces[0], other[1], pieces[2]]))
    turned = [pieces[1], pieces[0], pieces[2]]
    with pytest.raises(
        DamagedError, match=r"qkv_proj.weight: expected the model's shape \[64, 192\], found \[192, 192\]"
    ):
        rows = [{**piece, "rows": n} for piece, n in zip(turned, (192, 64, 64), strict=True)]
        load(with_entry(packed("quip-e8p12"), tmp_path / "rows", concat=rows))


def test_eval(packed: Callable[[str], Path], tmp_path: Path) -> None:
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 3, "b": 5, "?": 0}, "unk_token": "?"}}
    target = changed(packed("quip-e8p12"), tmp_path / "model", lambda tensors: None)
    (target / "tokenizer.json").write_text(json.dumps({**tokenizer, "pre_tokenizer": {"type": "Whitespace"}}))
    (tmp_path / "text").write_text("a b b a " * 8)
    qformat.convert(target, tmp_path / "dense", to="dense", dtype="float32")  # type: ignore[operator]
    found = evaluate(target, reference=tmp_path / "dense", text=tmp_path / "text", window=8)
    assert found["kl"] < 1e-9 and found["top1"] == 1 and 2 < found["stored_bits"] < 3


def test_experts_under_other_names(tmp_path: Path) -> None:
    """Each expert's gate and up in one: the model fuses experts, and has renamed what is around them."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "num_local_experts": 4}
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).save_pretrained(tmp_path / "source")
    source = qformat.open(tmp_path / "source")  # type: ignore[operator]
    term = {"codec": "int", "bits": 4, "block": [1, 64], "zero": 8}
    weights, members = {}, set[str]()
    for expert in (f"model.layers.0.block_sparse_moe.experts.{number}" for number in range(4)):
        pieces = [{"weights": [f"{expert}.{name}.weight"], "rows": 96} for name in ("w1", "w3")]
        name = f"{expert}.w13.weight"
        of = making.entry((192, 64), term, weights=(name,), concat=pieces, rotation={"out": {"size": 64}})
        weights[name] = making.packed(np.random.default_rng(len(weights)), of, name)
        members |= {piece["weights"][0] for piece in pieces}
    path = making.folder(
        tmp_path / "packed", weights, {one: source.array(one) for one in source.tensors if one not in members}
    )
    settings = json.loads((path / "config.json").read_text())
    config = json.loads((tmp_path / "source/config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | config))
    qformat.convert(path, tmp_path / "dense", to="dense", dtype="float32")  # type: ignore[operator]
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    model, wanted = load(path, dtype=torch.float32), logits(reference)
    assert (logits(model) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    model.save_pretrained(tmp_path / "saved")
    found, stored = (qformat.open(folder) for folder in (tmp_path / "saved", path))  # type: ignore[operator]
    assert verify(found) == [] and found.tensors.keys() == stored.tensors.keys()
