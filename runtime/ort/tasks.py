"""What an exported model takes and gives: a decoder with its cache, or an encoder."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

BATCH, SEQUENCE, PAST = 2, 3, 4  # sizes of the traced example; all are free in the graph


class Input(NamedTuple):
    """An example, and the names of its free axes."""

    value: Tensor
    axes: dict[int, str]


class Decoder(nn.Module):
    """``input_ids, attention_mask, position_ids, past...`` -> ``logits, present...``; keys, values, layer by layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        layers = range(config.num_hidden_layers)
        self.cached = [f"{layer}.{kind}" for layer in layers for kind in ("key", "value")]

    def inputs(self) -> dict[str, Input]:
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        tokens, new = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64), {0: "batch", 1: "seq"}
        mask = torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.int64)
        position = torch.arange(PAST, PAST + SEQUENCE).expand(BATCH, SEQUENCE).contiguous()
        return {
            "input_ids": Input(tokens, new),
            "attention_mask": Input(mask, {0: "batch", 1: "total"}),
            "position_ids": Input(position, new),
        } | {
            f"past_key_values.{name}": Input(
                torch.zeros(BATCH, heads, PAST, width, dtype=self.model.dtype), {0: "batch", 2: "past"}
            )
            for name in self.cached
        }

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        from transformers import DynamicCache

        ids, mask, position, *past = tensors
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=DynamicCache(list(zip(past[::2], past[1::2], strict=True))),
            use_cache=True,
        )
        present = [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return {"logits": out.logits} | {f"present.{n}": x for n, x in zip(self.cached, present, strict=True)}


class Encoder(nn.Module):
    """``input_ids, attention_mask, token_type_ids`` (where the model tells types apart) -> every tensor that the model
    gives, under its own name: ``last_hidden_state``, ``pooler_output``, ``logits``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        model.config.use_cache = False

    def inputs(self) -> dict[str, Input]:
        names = ["input_ids", "attention_mask"]
        takes = inspect.signature(self.model.forward).parameters
        if "token_type_ids" in takes and getattr(self.model.config, "type_vocab_size", 0) > 1:
            names.append("token_type_ids")
        example = torch.ones(BATCH, SEQUENCE, dtype=torch.int64)
        return {name: Input(example.clone(), {0: "batch", 1: "seq"}) for name in names}

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        out = self.model(**dict(zip(self.inputs(), tensors, strict=True)))
        return {name: value for name, value in out.items() if isinstance(value, Tensor)}
