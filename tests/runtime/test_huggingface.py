"""Packed models in transformers: loaded, run, saved again; and every way in which a tensor can be lacking."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import qformat
from qformat.dtypes import Array, name_of
from qformat.errors import DamagedError, UnsupportedError, UsageError
from qformat.runtime import huggingface
from qformat.runtime.pytorch import matrix
from qformat.runtime.pytorch.modules import Packed, QEmbedding, QLinear
from qformat.runtime.pytorch.tensor import PackedTensor
from qformat.shards import ShardWriter, spec
from qformat.verify import verify

ROOT = Path(__file__).resolve().parents[2]
LLAMA, MOE = ROOT / "examples/tiny-llama", ROOT / "examples/tiny-moe"
FIRST = [f"*layers.{layer}.*" for layer in range(1, 6)]  # excluded, so that packing takes no time
IDS = torch.randint(3, 4096, (2, 12), generator=torch.Generator().manual_seed(0))
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"

MODELS: dict[str, tuple[Path, dict[str, Any]]] = {
    "int": (LLAMA, {"codec": "int", "bits": 4}),
    "trellis": (LLAMA, {"codec": "trellis", "bits": 2, "exclude": FIRST}),
    "grid": (LLAMA, {"codec": "table", "bits": 4, "rotate": "hadamard", "include": ["lm_head*"], "exclude": FIRST}),
    "moe-some": (MOE, {"codec": "int", "bits": 4, "exclude": ["*layers.1.mlp.experts.[02]*"]}),  # dense siblings
    "moe-tied": (MOE, {"codec": "table", "bits": 4, "include": ["*embed_tokens*", "*mlp.gate*"]}),
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of ``MODELS``, packed when first asked for."""
    folder = tmp_path_factory.mktemp("packed")

    def make(name: str) -> Path:
        if not (folder / name).exists():
            source, settings = MODELS[name]
            qformat.quantize(source, folder / name, **settings)  # type: ignore[operator]
        return folder / name

    return make


def load(path: Path, **options: Any) -> Any:
    return qformat.load(path, **options)  # type: ignore[operator]


def dense(path: Path, folder: Path) -> Any:
    """The model of the decoded values, float32."""
    qformat.convert(path, folder, to="dense", dtype="float32")  # type: ignore[operator]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_experts_implementation("eager")  # runs in float64 too
    return model


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def same_tensors(one: Path, other: Path) -> bool:
    a, b = qformat.open(one), qformat.open(other)  # type: ignore[operator]
    return a.tensors.keys() == b.tensors.keys() and all(
        a.tensors[name][:2] == b.tensors[name][:2] and a.raw(name).tobytes() == b.raw(name).tobytes()
        for name in a.tensors
    )


def with_settings(path: Path, target: Path, others: Mapping[str, Any] | None = None, **settings: Any) -> Path:
    """A copy of a packed model with other ``settings`` in its manifest and ``others`` beside it in the config."""
    shutil.copytree(path, target)
    config = json.loads((target / "config.json").read_text()) | (others or {})
    config["quantization_config"] |= settings
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_decoded_values(name: str, packed: Callable[[str], Path], tmp_path: Path) -> None:
    model, reference = load(packed(name), dtype=torch.float32), dense(packed(name), tmp_path / "dense")
    found, of_float32 = logits(model), logits(reference)
    ids = IDS[:1, :6]
    wanted = reference.generate(ids, max_new_tokens=4, do_sample=False)
    exact = logits(reference.double())
    assert (found - exact).square().mean() <= 4 * (of_float32 - exact).square().mean()
    assert not model.training
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), wanted)


@pytest.mark.parametrize("name", ["grid", "moe-some", "moe-tied"])
def test_saved_again_it_has_the_same_tensors(name: str, packed: Callable[[str], Path], tmp_path: Path) -> None:
    path = packed(name)
    for target, options in (("whole", {}), ("shards", {"max_shard_size": "500KB"})):
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        model.save_pretrained(tmp_path / target, **options)
        assert same_tensors(packed(name), tmp_path / target)
        before, after = (json.loads((folder / "config.json").read_text()) for folder in (path, tmp_path / target))
        assert before == after
        assert verify(qformat.open(tmp_path / target)) == []  # type: ignore[operator]
        path = tmp_path / target  # the second time from what was saved the first time
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "shards")), logits(load(packed(name))))


def test_modules_and_dtypes(packed: Callable[[str], Path]) -> None:
    model = load(packed("grid"))
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert type(model.lm_head) is QLinear and type(model.model.embed_tokens) is torch.nn.Embedding
    assert type(model.model.layers[0].mlp.up_proj) is QLinear
    assert type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear
    assert model.dtype == model.lm_head.weight.dtype == torch.bfloat16 and logits(model).dtype == torch.bfloat16
    stored = qformat.open(packed("grid"))  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        if name in stored.packed_tensors:
            assert not parameter.requires_grad
            assert str(parameter.dtype) == f"torch.{stored.tensors[name].dtype}"
    assert model.hf_quantizer.is_trainable and "quant_method" in model.config.to_dict()["quantization_config"]


def test_tied_weights_are_one(packed: Callable[[str], Path]) -> None:
    model = load(packed("moe-tied"))
    head, embedding = model.lm_head, model.get_input_embeddings()
    assert type(head) is QLinear and type(embedding) is QEmbedding
    assert all(a is b for a, b in zip(head.parts(), embedding.parts(), strict=True))
    assert model.dtype == torch.bfloat16  # and not that of the scales, which come first
    model.tie_weights()
    assert all(a is b for a, b in zip(head.parts(), embedding.parts(), strict=True))


def test_aliases_tie_what_the_config_does_not(packed: Callable[[str], Path], tmp_path: Path) -> None:
    aliases = {"lm_head.weight": "model.embed_tokens.weight"}
    path = with_settings(packed("moe-tied"), tmp_path / "aliased", {"tie_word_embeddings": False}, aliases=aliases)
    model = load(path)
    assert model.lm_head.weight_codes is model.model.embed_tokens.weight_codes
    assert torch.equal(logits(model), logits(load(packed("moe-tied"))))
    model.save_pretrained(tmp_path / "saved")
    assert same_tensors(path, tmp_path / "saved")
    assert verify(qformat.open(tmp_path / "saved")) == []  # type: ignore[operator]


def test_experts_keep_their_names(packed: Callable[[str], Path]) -> None:
    model = load(packed("moe-some"))
    experts = model.model.layers[1].mlp.experts
    assert type(experts.get_submodule("0.up_proj")) is torch.nn.Linear
    assert type(experts.get_submodule("1.up_proj")) is QLinear


def test_dequantized_it_is_an_ordinary_model(packed: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("trellis", "moe-tied"):
        model = load(packed(name), dtype=torch.float32)
        found = logits(model)
        plain = model.dequantize()
        assert not any(isinstance(module, Packed) for module in plain.modules())
        assert torch.allclose(logits(plain), found, atol=1e-4)
        plain.save_pretrained(tmp_path / name)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.allclose(logits(again), found, atol=1e-4)


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "pad_token_id": 0}
FAMILIES: dict[str, Callable[[], Any]] = {
    # experts under other names on the Hub
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4),
    # experts in one tensor, in before out, with biases and a product of their own
    "gpt_oss": lambda: transformers.GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    # an embedding with a forward of its own, tied
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL),
    # linear layers that hold their matrix the other way round
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family: str, tmp_path: Path) -> None:
    """Every matrix packed, embeddings and routers as well."""
    config = FAMILIES[family]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    tensors = qformat.open(tmp_path / "source").tensors  # type: ignore[operator]
    matrices = [name for name, tensor in tensors.items() if len(tensor.shape) == 2]
    settings = {"block": [1, 16]}
    qformat.quantize(  # type: ignore[operator]
        tmp_path / "source", tmp_path / "packed", codec="int", bits=4, settings=settings, include=matrices
    )
    found = load(tmp_path / "packed", dtype=torch.float32)
    wanted = dense(tmp_path / "packed", tmp_path / "dense")
    ids = IDS % 128
    assert torch.allclose(logits(found, ids), logits(wanted, ids), atol=1e-5 * float(logits(wanted, ids).abs().max()))
    load(tmp_path / "packed").save_pretrained(tmp_path / "saved")
    assert same_tensors(tmp_path / "packed", tmp_path / "saved")


ORDERS = {
    "qformat": "import qformat\nassert 'torch' not in sys.modules\nimport transformers",
    "transformers": "import transformers\nimport qformat",
    "quantizers": "import transformers.quantizers.auto\nimport qformat",
}


@pytest.mark.parametrize("order", ORDERS)
def test_importing_is_enough_in_any_order(order: str, packed: Callable[[str], Path]) -> None:
    code = f"""import sys\n{ORDERS[order]}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(packed("trellis"))!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "QLinear\n"


def changed(path: Path, target: Path, change: Callable[[dict[str, Array]], object]) -> Path:
    """A copy of a packed model with other tensors."""
    source = qformat.open(path)  # type: ignore[operator]
    tensors: dict[str, Array] = {name: source.array(name) for name in source.tensors}
    change(tensors)
    shutil.copytree(path, target)
    specs = {name: spec(name_of(array.dtype), array.shape) for name, array in tensors.items()}
    with ShardWriter(target / "model.safetensors", specs, {"format": "pt"}) as out:
        for name, array in tensors.items():
            out.put(name, array)
    return target


def _put(name: str, make: Callable[[Array], Array]) -> Callable[[dict[str, Array]], object]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


DAMAGE: Mapping[str, tuple[Callable[[dict[str, Array]], object], str]] = {
    "missing": (lambda t: t.pop(f"{Q_PROJ}_codes"), f"{Q_PROJ}: expected part codes, found none"),
    "short": (_put(f"{Q_PROJ}_codes", lambda a: a[:-1]), f"{Q_PROJ}: expected part codes uint8 .256, 128., found"),
    "turned": (_put(f"{Q_PROJ}_scales", lambda a: np.ascontiguousarray(a.T)), f"{Q_PROJ}: expected part scales"),
    "cast": (_put(f"{Q_PROJ}_scales", lambda a: a.astype(np.float32)), f"{Q_PROJ}: expected part scales float16"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_weight_is_never_random_memory(how: str, packed: Callable[[str], Path], tmp_path: Path) -> None:
    change, message = DAMAGE[how]
    path = changed(packed("int"), tmp_path / "damaged", change)
    for loading in (load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(DamagedError, match=message) as raised:
            loading(path)
        assert str(path) in raised.value.file and raised.value.weight == Q_PROJ


def test_what_was_not_loaded_is_found_afterwards(
    packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second net: for whatever way there is between the files and the model on which a tensor gets lost."""
    monkeypatch.setattr(huggingface, "check_parts", lambda *args: None)
    path = changed(packed("int"), tmp_path / "damaged", DAMAGE["missing"][0])
    with pytest.raises(DamagedError, match=f"{Q_PROJ}_codes: expected a tensor that was loaded"):
        transformers.AutoModelForCausalLM.from_pretrained(path)


def test_load_accounts_for_dense_tensors_too(packed: Callable[[str], Path], tmp_path: Path) -> None:
    norm = "model.norm.weight"
    for how, change, message in (
        ("missing", lambda t: t.pop(norm), f"{norm}: expected a tensor that the model needs, found none"),
        ("misshapen", _put(norm, lambda a: a[1:]), f"{norm}: expected shape .256., found .255."),
        ("unknown", lambda t: t.update(extra=t[norm]), "extra: expected only tensors that the model has a place for"),
    ):
        with pytest.raises(DamagedError, match=message):
            load(changed(packed("trellis"), tmp_path / how, change))


def test_what_is_no_packed_model_is_refused(packed: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a qformat model, found another"):
        load(LLAMA)
    with pytest.raises(UsageError, match="expected a model folder, found none"):
        load(tmp_path / "nothing")
    with pytest.raises(UsageError, match="expected a model folder, found a file"):
        load(packed("int") / "model.safetensors")
    with pytest.raises(UnsupportedError, match="int16"):
        load(packed("int"), activations="int16")


def test_settings_of_a_later_version(packed: Callable[[str], Path], tmp_path: Path) -> None:
    """Keys that are unknown come out as they went in, a version that is unknown is refused."""
    newer = with_settings(packed("trellis"), tmp_path / "newer", later={"to_dict": [1, None]})
    load(newer).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text()) == json.loads((newer / "config.json").read_text())
    with pytest.raises(UnsupportedError, match="version"):
        transformers.AutoModelForCausalLM.from_pretrained(with_settings(newer, tmp_path / "next", version="9.0"))


def test_a_missing_kernel_is_told_once(
    packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = packed("int")
    with caplog.at_level(logging.WARNING, "qformat"):
        load(path)
        assert caplog.messages == []
        monkeypatch.setattr(matrix, "MATRICES", {})
        load(path)
    assert len(caplog.messages) == 1 and "no kernel for int" in caplog.text and "s a forward pass" in caplog.text


def test_nothing_is_decoded_to_load_or_save(
    packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(PackedTensor, "decode", lambda self: pytest.fail("decoded"))
    for name in ("int", "moe-tied"):
        model = load(packed(name))
        logits(model)
        model.save_pretrained(tmp_path / name)
