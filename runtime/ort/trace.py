"""A decoder as a graph of ONNX, its weights left open: the model is built without them and traced by ``torch.onnx``."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from onnxscript import ir
from torch import Tensor, nn

from qformat.errors import UnsupportedError

from .body import OPSET
from .functions import DOMAIN, Kind

BATCH, SEQUENCE, PAST = 2, 3, 4  # sizes of the traced example; all are free in the graph


class Stand(NamedTuple):
    """What stands in the graph for a module whose weight is packed: ``name`` is the weight's."""

    name: str
    kind: Kind
    operator: str
    entry: str


class Packed(nn.Module):
    """Leaves the node ``qformat::<operator>`` in the graph, for now without the parts."""

    def __init__(self, stand: Stand, width: int, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.stand, self.width, self.bias, self.dtype = stand, width, bias, dtype

    def forward(self, x: Tensor) -> Tensor:
        linear = self.stand.kind == "Linear"
        y = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{self.stand.operator}",
            (x,),
            {"entry": self.stand.entry, "weight": self.stand.name},
            dtype=x.dtype if linear else torch.float32,
            shape=(*x.shape[: -1 if linear else None], self.width),
            version=1,
        )
        return (y if self.bias is None else y + self.bias).to(self.dtype)


class Decoder(nn.Module):
    """``input_ids, attention_mask, position_ids, past...`` -> ``logits, present...``; keys, values, layer by layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=DynamicCache(list(zip(past[::2], past[1::2], strict=True))),
            use_cache=True,
        )
        return out.logits, *(tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values))


def skeleton(path: Path, dtype: torch.dtype) -> Any:
    """The transformers model of a folder, its weights allocated and never written: they cost no memory."""
    import transformers
    from transformers.initialization import no_init_weights

    try:
        config = transformers.AutoConfig.from_pretrained(path)
        with no_init_weights():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    except ValueError as error:
        raise UnsupportedError("a decoder that transformers knows", str(error).partition("\n")[0]) from None
    model.tie_weights()
    return model


def architecture(model: Any) -> str:
    return (model.config.architectures or [type(model).__name__])[0]


def kind_of(model: Any, module: str) -> Kind | None:
    """What stands for a module whose weight is packed; None where nothing does."""
    kinds: dict[type, Kind] = {nn.Linear: "Linear", nn.Embedding: "Embedding"}
    return kinds.get(type(model.get_submodule(module)))


def stand_in(model: Any, module: str, stand: Stand) -> None:
    """Replace a linear layer or an embedding by what leaves ``stand`` in the graph."""
    old = model.get_submodule(module)
    width = old.out_features if stand.kind == "Linear" else old.embedding_dim
    model.set_submodule(module, Packed(stand, width, getattr(old, "bias", None), model.dtype))


def trace(model: Any, kept: Mapping[str, object]) -> ir.Model:
    """The graph. Initializers are called as the model's parameters; those in ``kept`` have no value yet, so that no
    optimization can fold them.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers
    cache = [torch.zeros(BATCH, heads, PAST, width, dtype=model.dtype) for _ in range(2 * layers)]
    tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
    mask = torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.int64)
    position = torch.arange(PAST, PAST + SEQUENCE).expand(BATCH, SEQUENCE).contiguous()
    new, old = {0: "batch", 1: "seq"}, {0: "batch", 2: "past"}
    names = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                Decoder(model).eval(),
                (tokens, mask, position, *cache),
                dynamo=True,
                verbose=False,
                input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{n}" for n in names)],
                output_names=["logits", *(f"present.{name}" for name in names)],
                dynamic_shapes=(new, {0: "batch", 1: "total"}, new, (old,) * len(cache)),
                opset_version=OPSET,
                optimize=False,
            )
            graph = program.model.graph
            for name in list(graph.initializers):
                value = graph.initializers.pop(name)
                value.name = name.removeprefix("model.")
                value.const_value = None if value.name in kept else value.const_value
                graph.initializers[value.name] = value
            program.optimize()
    except torch.onnx.OnnxExporterError as error:
        why = str(error.__cause__ or error).strip().partition("\n")[0]
        raise UnsupportedError("a decoder that torch.onnx can trace", f"{architecture(model)}: {why}") from error
    return program.model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter tells of its own progress and of what it does without."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
