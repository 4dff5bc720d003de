"""What config.json says of a module by its role: the sizes of its matrix, whether it has a bias."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]

HIDDEN, QUERY, KEY_VALUE, INNER, VOCABULARY = "hidden", "query", "key_value", "inner", "vocabulary"
ROLES = {  # last component of a module's name -> (out, in)
    "q_proj": (QUERY, HIDDEN),
    **dict.fromkeys(("k_proj", "v_proj"), (KEY_VALUE, HIDDEN)),
    "o_proj": (HIDDEN, QUERY),
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), (INNER, HIDDEN)),
    **dict.fromkeys(("down_proj", "w2"), (HIDDEN, INNER)),
    "lm_head": (VOCABULARY, HIDDEN),
}
# Linear layers with a bias, by model type, where config.json has no key for it. Others of these models have none.
BIASED = {
    **dict.fromkeys(("llama", "mistral", "ministral", "mixtral", "gemma", "gemma2", "gemma3", "gemma3_text"), ()),
    **dict.fromkeys(("qwen3", "qwen3_moe", "phi3", "cohere", "cohere2", "olmo2", "granite"), ()),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), ()),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl"), ("q_proj", "k_proj", "v_proj")),
}

CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # model types with weights [in, out] ...
CONV1D_LAYERS = ("c_attn", "q_attn", "c_fc", "c_proj")  # ... in these layers


def is_conv1d(config: Config, module: str) -> bool:
    """Whether the model holds the layer's weight as [in, out]."""
    return module.rpartition(".")[2] in CONV1D_LAYERS and part_of(config, module).get("model_type") in CONV1D


def candidates(config: Config, module: str) -> tuple[list[int], list[int]]:
    """What rows and columns of a layer's weight may be, likeliest first; empty where config.json does not say."""
    config = part_of(config, module)
    out, in_ = ROLES.get(module.rpartition(".")[2], ("", ""))
    return _sizes(config, module, out), _sizes(config, module, in_)


def has_bias(config: Config, module: str) -> bool | None:
    """None: not known."""
    config = part_of(config, module)
    last = module.rpartition(".")[2]
    role = ROLES.get(last, ("", ""))
    attention = QUERY in role or KEY_VALUE in role
    keys = {"attention_bias": attention, "qkv_bias": attention and role[0] != HIDDEN, "mlp_bias": INNER in role}
    for key, applies in keys.items():
        if applies and isinstance(config.get(key), bool):
            return bool(config[key])
    names = BIASED.get(str(config.get("model_type")))
    return last in names if names is not None and last in ROLES else None


def part_of(config: Config, module: str) -> Config:
    """The sub-config of the part of a composed model that a module belongs to, over the keys of the whole."""
    key = "vision_config" if re.search(r"vision|visual", module) else "text_config"
    inner = config.get(key)
    return {**config, **inner} if isinstance(inner, Mapping) else config


def _sizes(config: Config, module: str, role: str) -> list[int]:
    def number(key: str) -> int:
        value = config.get(key)
        return value if type(value) is int and 0 < value < 1 << 32 else 0

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    head = number("head_dim") or (hidden // heads if heads else 0)
    latent = [number("qk_nope_head_dim") + number("qk_rope_head_dim"), number("v_head_dim")]
    query = [heads * size for size in (*latent, head, 2 * head)]  # the last where an output gate is a part of it
    inner = [number("intermediate_size")]
    if re.search(r"shared_expert", module):
        shared = number("n_shared_experts") * number("moe_intermediate_size")
        inner = [number("shared_expert_intermediate_size"), shared, *inner]
    elif "expert" in module:
        inner = [number("moe_intermediate_size"), *inner]
    found = {
        HIDDEN: [hidden],
        QUERY: query,
        KEY_VALUE: [(number("num_key_value_heads") or heads) * head],
        INNER: inner,
        VOCABULARY: [number("vocab_size")],
    }
    return [size for size in found.get(role, []) if size]
