"""Memory of a packed model in transformers: before it is loaded, after, and after a forward pass.

    python bench/load_memory.py [--codec int] [--bits 4] [--layers 8] [--hidden 2048] [--out FILE]

``private`` is memory of the process's own (RssAnon), ``mapped`` pages of files, which the system takes back when it
needs them (RssFile). The model is a Llama of random numbers, packed and, to compare with, dense in bfloat16; each is
measured in a process of its own, after everything has been imported and a small model has been run.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import qformat
from qformat import codecs, weight
from qformat.checkpoint import KEY
from qformat.converters.quantize.weight import entry_of
from qformat.dtypes import NUMPY, Array
from qformat.manifest import Manifest, group, write
from qformat.shards import ShardWriter, spec

SMALL = Path(__file__).resolve().parents[1] / "examples/tiny-llama"


def shapes(hidden: int, layers: int, vocabulary: int = 4096) -> dict[str, tuple[int, ...]]:
    inner = hidden * 11 // 4
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        out |= {f"{at}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        out |= {f"{at}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        out |= {f"{at}.mlp.down_proj.weight": (hidden, inner)}
        out |= {f"{at}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return out | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def numbers(dtype: str, shape: tuple[int, ...], scale: float) -> Array:
    rng = np.random.default_rng(math.prod(shape))
    if dtype in ("uint8", "int8"):
        return rng.integers(0, 256, shape, np.uint8) if dtype == "uint8" else rng.choice([-1, 1], shape).astype(np.int8)
    return (scale * rng.standard_normal(shape, np.float32)).astype(NUMPY[dtype])


def make(
    folder: Path, terms: tuple[dict[str, Any], ...] | None, rotate: Any, hidden: int, layers: int, wholly: bool = False
) -> int:
    """Write the model, packed by ``terms`` (``wholly``: embedding and head, too) or dense; the bytes of its packed
    weights.
    """
    config = json.loads((SMALL / "config.json").read_text())
    config |= {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers}
    config |= {"head_dim": 64, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    specs, entries, packed = {}, {}, 0
    for name, shape in shapes(hidden, layers).items():
        if terms is not None and (wholly or ".layers." in name) and len(shape) == 2:
            entries[name] = entry_of(name, shape, "bfloat16", terms, rotate)
            parts = weight.layout(entries[name])
            specs |= {f"{name}_{part.name}": spec(str(part.dtype), part.shape) for part in parts}
            packed += sum(part.nbytes for part in parts)
        else:
            specs[name] = spec("bfloat16", shape)
    folder.mkdir()
    with ShardWriter(folder / "model.safetensors", specs, {"format": "pt"}) as out:
        for name, one in specs.items():
            dtype = {"BF16": "bfloat16", "F16": "float16", "U8": "uint8", "I8": "int8", "F32": "float32"}[one.tag]
            out.put(name, numbers(dtype, one.shape, 1.0 if len(one.shape) == 1 else 0.02))
    if terms is not None:
        config[KEY] = write(Manifest(entries=group(entries.items())))
    (folder / "config.json").write_text(json.dumps(config))
    return packed


def resident() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    found = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[0].startswith("Rss")}
    return {"private": found["RssAnon"], "mapped": found["RssFile"]}


def measure(path: Path) -> dict[str, Any]:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    ids = torch.arange(3, 35)[None]

    def run(folder: Path) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        yield resident()
        with torch.no_grad():
            model(input_ids=ids)
        yield resident()

    list(run(SMALL))
    out = {"before": resident()}
    out |= dict(zip(("loaded", "after_forward"), run(path), strict=True))
    return {**out, "file_bytes": (path / "model.safetensors").stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", default="int")
    parser.add_argument("--bits", type=float, default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    rotate = "hadamard" if options.codec == "trellis" else "none"
    terms = codecs.preset(options.codec, options.bits, rotate == "hadamard", {})
    machine = f"{platform.system()} {platform.machine()}"
    result: dict[str, Any] = {"qformat": qformat.__version__, "machine": machine, "terms": terms, "rotate": rotate}
    result |= {"layers": options.layers, "hidden": options.hidden}
    with tempfile.TemporaryDirectory() as folder:
        for name, how in (("packed", terms), ("dense", None)):
            nbytes = make(Path(folder) / name, how, rotate, options.hidden, options.layers)
            command = [sys.executable, __file__, "--measure", str(Path(folder) / name)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result[name] = json.loads(done.stdout) | ({"packed_bytes": nbytes} if how else {})
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
