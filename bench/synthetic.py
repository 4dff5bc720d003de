"""Checkpoints of foreign schemes with random codes, of any size: what importers are measured with.

    python bench/synthetic.py SCHEME FOLDER [--layers 32] [--shard-bytes 1000000000]

writes a model shaped like a Llama of 7B (hidden 4096, inner 11008, vocabulary 32000) in several shards, a tensor at a
time. Codes are valid and mean nothing; scales are finite.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qformat import tables
from qformat.dtypes import NUMPY, Array
from qformat.shards import ShardWriter, spec

HIDDEN, INNER, VOCABULARY = 4096, 11008, 32000
GROUP = 128
FLOATS = {
    "float16": ("u2", 0x83FF, 0x2400),
    "bfloat16": ("u2", 0x807F, 0x3C80),
    "float32": ("u4", 0x807FFFFF, 0x3C800000),
}


class Part(NamedTuple):
    """A tensor. ``fill``: all its numbers, or the bits that random ones may have; floats without are 2**-6 to 2**-5."""

    dtype: str
    shape: tuple[int, ...]
    fill: Array | None = None
    mask: int | None = None

    def make(self, rng: np.random.Generator) -> Array:
        if self.fill is not None:
            return np.broadcast_to(self.fill, self.shape).astype(NUMPY[self.dtype])
        word, keep, set_ = FLOATS.get(self.dtype, (f"u{NUMPY[self.dtype].itemsize}", self.mask, 0))
        count = math.prod(self.shape) * np.dtype(word).itemsize
        bits = rng.integers(0, 1 << 64, -(-count // 8), np.uint64).view(np.uint8)[:count].view(word)
        if keep is not None:
            bits &= keep
            bits |= set_
        return bits.view(NUMPY[self.dtype]).reshape(self.shape)


class Module(NamedTuple):
    name: str
    rows: int
    cols: int


Parts = dict[str, Part]


class Scheme(NamedTuple):
    """``parts`` of one module, by what follows its name; ``settings`` are config.json's keys for these modules."""

    parts: Callable[[Module], Parts]
    settings: Callable[[Iterable[Module]], dict[str, Any]]


def quantized(method: str, **settings: Any) -> Callable[[Iterable[Module]], dict[str, Any]]:
    return lambda modules: {"quantization_config": {"quant_method": method, **settings}}


def gptq(bits: int, version: str) -> Scheme:
    def parts(module: Module) -> Parts:
        _, rows, cols = module
        groups = cols // GROUP
        order = np.arange(cols) // GROUP
        return {
            "qweight": Part("int32", (cols * bits // 32, rows)),
            "qzeros": Part("int32", (groups, rows * bits // 32)),
            "scales": Part("float16", (groups, rows)),
            "g_idx": Part("int32", (cols,), order),
        }

    return Scheme(parts, quantized("gptq", bits=bits, group_size=GROUP, checkpoint_format=version, sym=False))


def marlin(module: Module) -> Parts:
    _, rows, cols = module
    return {"B": Part("int32", (cols // 16, 2 * rows)), "s": Part("float16", (cols // GROUP, rows))}


def awq(module: Module) -> Parts:
    _, rows, cols = module
    groups = cols // GROUP
    return {
        "qweight": Part("int32", (cols, rows // 8)),
        "qzeros": Part("int32", (groups, rows // 8)),
        "scales": Part("float16", (groups, rows)),
    }


def exl3(bits: int) -> Scheme:
    def parts(module: Module) -> Parts:
        _, rows, cols = module
        return {
            "trellis": Part("int16", (cols // 16, rows // 16, 16 * bits)),
            "suh": Part("float16", (cols,)),
            "svh": Part("float16", (rows,)),
        }

    return Scheme(parts, quantized("exl3", bits=bits))


def qtip(bits: int, code: str) -> Scheme:
    mode, pairs = {"hyb": ("quantlut_sym", 2), "3inst": ("3inst", 1)}[code]

    def parts(module: Module) -> Parts:
        _, rows, cols = module
        table = {"tlut": Part("float16", (512, 2))} if code == "hyb" else {}
        return {
            "trellis": Part("int16", (rows // 16 * cols // 16, 16 * bits)),
            "SU": Part("float16", (cols,)),
            "SV": Part("float16", (rows,)),
            "rcp": Part("int64", (), np.array(0)),
            **table,
        }

    settings = {"codebook": "bitshift", "codebook_version": 0, "decode_mode": mode, "L": 16, "K": bits, "V": pairs}
    settings |= {"tlut_bits": 9, "td_x": 16, "td_y": 16}
    return Scheme(parts, lambda modules: {"quip_params": settings})


def quip(codebook: str, number: int, version: int, dtype: str, words: float) -> Scheme:
    """``words`` of Qidxs for each column."""

    def parts(module: Module) -> Parts:
        _, rows, cols = module
        return {
            "Qidxs": Part(dtype, (rows, int(cols * words))),
            "codebook_id": Part("int64", (), np.array(number)),
            "SU": Part("float16", (cols,)),
            "SV": Part("float16", (rows,)),
            "Wscale": Part("float32", (), np.array(0.5)),
        }

    settings = {"codebook": codebook, "codebook_version": version, "codesz": 8, "rescale_WH": False}
    return Scheme(parts, lambda modules: {"quip_params": settings})


def aqlm(books: int, bits: int) -> Scheme:
    def parts(module: Module) -> Parts:
        _, rows, cols = module
        codes = Part("int8" if bits == 8 else "int16", (rows, cols // 8, books))
        if bits not in (8, 16):
            codes = codes._replace(mask=(1 << (bits - 1)) - 1)
        table = Part("float16", (books, 1 << bits, 1, 8))
        return {"codes": codes, "codebooks": table, "scales": Part("float16", (rows, 1, 1, 1))}

    return Scheme(parts, quantized("aqlm"))


def higgs(bits: int, p: int) -> Scheme:
    entries, size, group = 2**bits, 512, 256

    def parts(module: Module) -> Parts:
        _, rows, cols = module
        padded = -(-cols // size) * size
        single = np.linspace(-2, 2, entries, dtype=np.float16)
        pairs = np.stack(np.broadcast_arrays(single[:, None], single[None]), axis=-1) if p == 1 else None
        return {
            "weight": Part("int16", (rows * bits // 16, padded)),
            "scales": Part("float16", (rows, padded // group)),
            "tables": Part("float16", (entries,), single),
            "tables2": Part("float16", (entries, entries, 2), pairs),
        }

    def settings(modules: Iterable[Module]) -> dict[str, Any]:
        tuned = {module.name: {"template_id": {2: 4, 3: 4, 4: 16}[bits]} for module in modules}
        own = {"bits": bits, "p": p, "group_size": group, "hadamard_size": size, "tune_metadata": tuned}
        return quantized("higgs", **own)(modules)

    return Scheme(parts, settings)


def nf4(module: Module) -> Parts:
    _, rows, cols = module
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [rows, cols]}).encode()
    return {
        "weight": Part("uint8", (rows * cols // 2, 1)),
        "weight.absmax": Part("float32", (rows * cols // 64,)),
        "weight.quant_map": Part("float32", (16,), tables.named("nf4")[:, 0]),
        "weight.quant_state.bitsandbytes__nf4": Part("uint8", (len(state),), np.frombuffer(state, np.uint8)),
    }


def fp8(module: Module) -> Parts:
    _, rows, cols = module
    scales = Part("float32", (-(-rows // 128), -(-cols // 128)))
    return {"weight": Part("float8_e4m3fn", (rows, cols), mask=0xFE), "weight_scale_inv": scales}  # no NaN


def mxfp4(module: Module) -> Parts:
    """As one expert of the original files."""
    _, rows, cols = module
    scales = Part("uint8", (1, rows, cols // 32), mask=0x7F)
    return {"weight.blocks": Part("uint8", (1, rows, cols // 32, 16)), "weight.scales": scales}


SCHEMES: Mapping[str, Scheme] = {
    "gptq-4": gptq(4, "gptq_v2"),
    "gptq-3": gptq(3, "gptq_v2"),
    "gptq-3-planar": gptq(3, "gptq_p"),
    "gptq-marlin": Scheme(marlin, quantized("gptq", bits=4, group_size=GROUP, checkpoint_format="marlin")),
    "awq-gemm": Scheme(awq, quantized("awq", bits=4, group_size=GROUP, version="gemm", zero_point=True)),
    "exl3-3": exl3(3),
    "exl3-4": exl3(4),
    "qtip-hyb-2": qtip(2, "hyb"),
    "qtip-hyb-3": qtip(3, "hyb"),
    "qtip-3inst-3": qtip(3, "3inst"),
    "quip-e8p12": quip("E8P12", 7, 1, "int64", 1 / 32),
    "quip-rvq3b": quip("E8P12RVQ3B", 18, 0, "int64", 3 / 64),
    "quip-rvq4b": quip("E8P12RVQ4B", 17, 1, "int64", 2 / 32),
    "quip-d4": quip("D4", 0, 0, "uint8", 1 / 4),
    "quip-hi4b1c": quip("HI4B1C", 10, 0, "int32", 1 / 8),
    "aqlm-2x8": aqlm(2, 8),
    "aqlm-1x16": aqlm(1, 16),
    "aqlm-1x12": aqlm(1, 12),
    **{f"higgs-{bits}-p{p}": higgs(bits, p) for bits in (2, 3, 4) for p in (1, 2)},
    "bnb-nf4": Scheme(nf4, quantized("bitsandbytes", load_in_4bit=True)),
    "fp8-block": Scheme(fp8, quantized("fp8", weight_block_size=[128, 128])),
    "mxfp4": Scheme(mxfp4, quantized("mxfp4")),
}


def square(count: int = 4, size: int = HIDDEN) -> list[Module]:
    """``count`` modules of ``size`` x ``size``."""
    return [Module(f"model.layers.{n // 4}.self_attn.{'qkvo'[n % 4]}_proj", size, size) for n in range(count)]


def llama(layers: int = 32) -> list[Module]:
    """The packed modules of a Llama of 7B."""
    shapes = dict.fromkeys((f"self_attn.{name}_proj" for name in "qkvo"), (HIDDEN, HIDDEN))
    shapes |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
    return [Module(f"model.layers.{n}.{name}", *shape) for n in range(layers) for name, shape in shapes.items()]


def dense(layers: int) -> Parts:
    """What stays dense in it."""
    norms = [f"model.layers.{n}.{name}_layernorm.weight" for n in range(layers) for name in ("input", "post_attention")]
    vectors = dict.fromkeys((*norms, "model.norm.weight"), Part("float16", (HIDDEN,)))
    return vectors | dict.fromkeys(
        ("model.embed_tokens.weight", "lm_head.weight"), Part("float16", (VOCABULARY, HIDDEN))
    )


def write(
    folder: Path, scheme: str, modules: list[Module], rest: Parts | None = None, shard_bytes: int = 1_000_000_000
) -> int:
    """A model folder; no more than one tensor is in memory. Returns the bytes of all tensors."""
    parts = {f"{module.name}.{part}": one for module in modules for part, one in SCHEMES[scheme].parts(module).items()}
    specs = {name: spec(one.dtype, one.shape) for name, one in {**parts, **(rest or {})}.items()}
    shards: list[list[str]] = [[]]
    size = 0
    for name, one in specs.items():
        if shards[-1] and size + one.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += one.nbytes
    folder.mkdir(parents=True)
    rng, index = np.random.default_rng(0), {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        with ShardWriter(folder / file, {name: specs[name] for name in names}, {"format": "pt"}) as out:
            for name in names:
                out.put(name, {**parts, **(rest or {})}[name].make(rng))
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 32, "vocab_size": VOCABULARY, "num_hidden_layers": max(1, len(modules) // 7)}
    (folder / "config.json").write_text(json.dumps({**config, **SCHEMES[scheme].settings(modules)}))
    return sum(one.nbytes for one in specs.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scheme", choices=SCHEMES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shard-bytes", type=int, default=1_000_000_000)
    options = parser.parse_args()
    modules, rest = llama(options.layers), dense(options.layers)
    print(write(options.folder, options.scheme, modules, rest, options.shard_bytes), "bytes")


if __name__ == "__main__":
    main()
