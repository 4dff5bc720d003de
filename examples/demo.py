"""Pack a model at 4 and at 2 bits with each codec, measure it against the dense one, run it three ways.

    scripts/demo [--model PATH_OR_NAME] [--tokens 20480] [--out build/demo]

Leaves in the folder: the packed models, ``demo.json`` (the table's rows), ``kl.png``, and the 2-bit trellis model
exported to ``onnx/``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from rich.console import Console
from rich.table import Table

import qformat

HERE = Path(__file__).resolve().parent
PROMPT = "And the LORD said unto Moses,"
PACKINGS: list[tuple[str, dict[str, Any]]] = [  # folder, how it is packed
    ("int-4", {"codec": "int", "bits": 4}),
    ("nf4", {"codec": "table", "bits": 4, "settings": {"table": "nf4"}}),
    ("table-4-rotated", {"codec": "table", "bits": 4, "rotate": "hadamard"}),
    ("float-4", {"codec": "float", "bits": 4}),
    ("trellis-4", {"codec": "trellis", "bits": 4}),
    ("int-2", {"codec": "int", "bits": 2}),
    ("int-2-zeros", {"codec": "int", "bits": 2, "settings": {"zeros": "uint8"}}),
    ("table-2", {"codec": "table", "bits": 2}),
    ("table-2-rotated", {"codec": "table", "bits": 2, "rotate": "hadamard"}),
    ("additive-2", {"codec": "additive", "bits": 2}),
    ("e8p-2", {"codec": "e8p", "bits": 2}),
    ("trellis-2", {"codec": "trellis", "bits": 2}),
]
RUN = "trellis-2"  # the model that is run, exported and quoted
console = Console(highlight=False)


def pack(model: str, out: Path, tokens: int) -> list[dict[str, Any]]:
    """One row for each packing: size, speed, and distance from the dense model."""
    rows = []
    for name, how in PACKINGS:
        console.print(f"[dim]{name}: packing, then measuring on {tokens} tokens[/]")
        packed = qformat.quantize(model, out / name, overwrite=True, **how)
        measured = qformat.evaluate(out / name, reference=model, tokens=tokens)
        rows.append(
            {
                "name": name,
                "codec": how["codec"],
                "terms": packed["terms"],
                "rotate": packed["rotate"],
                "stored_bits": packed["stored_bits"],
                "bytes": packed["bytes"],
                "seconds": packed["seconds"],
                **{
                    key: measured[key]
                    for key in (
                        "kl",
                        "kl_ci95",
                        "perplexity",
                        "reference_perplexity",
                        "reference_bytes",
                        "top1",
                        "tokens",
                    )
                },
            }
        )
    return rows


def show(rows: list[dict[str, Any]], model: str) -> None:
    dense, perplexity = rows[0]["reference_bytes"] / 1e6, rows[0]["reference_perplexity"]
    table = Table(box=None, title=f"{Path(model).name}, dense {dense:.2f} MB, perplexity {perplexity:.3f}")
    table.add_column("packing")
    for header in ("stored bits", "KL, nats", "perplexity", "top-1", "size, MB", "seconds"):
        table.add_column(header, justify="right")
    for row in rows:
        numbers = (row["stored_bits"], row["kl"], row["perplexity"], row["top1"], row["bytes"] / 1e6, row["seconds"])
        forms = (".3f", ".5f", ".3f", ".4f", ".2f", ".1f")
        table.add_row(row["name"], *(format(number, form) for number, form in zip(numbers, forms, strict=True)))
    console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """KL against stored bits, a panel for each rate, with the bootstrap interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = sorted({int(row["stored_bits"]) for row in rows})
    figure, panels = pyplot.subplots(1, len(rates), figsize=(5 * len(rates), 4.5), layout="constrained", squeeze=False)
    marks = {"additive": "P", "e8p": "v", "float": "D", "int": "s", "table": "o", "trellis": "^"}
    for rate, axes in zip(rates, panels[0], strict=True):
        shown = [row for row in rows if int(row["stored_bits"]) == rate]
        for row in shown:
            low, high = row["kl_ci95"]
            bars = [[row["kl"] - low], [high - row["kl"]]]
            axes.errorbar(row["stored_bits"], row["kl"], yerr=bars, fmt=marks[row["codec"]], capsize=3)
            place = (row["stored_bits"], row["kl"])
            down = -13 if any(map(partial(_close_below, row), shown)) else -3  # points
            axes.annotate(row["name"], place, xytext=(7, down), textcoords="offset points", fontsize=9)
        axes.set(xlabel="stored bits per packed weight", xlim=(rate, rate + 0.9), title=f"{rate} bits")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("KL(dense ‖ packed), nats: lower is better")
    figure.savefig(path, dpi=150)


def _close_below(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the label of ``row`` would lie on that of ``other``."""
    return 1 < other["kl"] / row["kl"] < 1.05 and abs(row["stored_bits"] - other["stored_bits"]) < 0.1


def run(folder: Path, onnx: Path) -> None:
    """Generate a sentence from the packed model, then the same logits from ONNX Runtime."""
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    from qformat.runtime.ort import session

    model, tokenizer = qformat.load(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        logits = model(input_ids=ids).logits.numpy()
    console.print(f"\n{folder.name} writes: {tokenizer.decode(out[0], skip_special_tokens=True)!r}")
    report = qformat.export(folder, onnx, overwrite=True)
    count, heads, size = _cache(model.config)
    feeds = {
        "input_ids": ids.numpy(),
        "position_ids": np.arange(ids.shape[1])[None],
        "attention_mask": np.ones(ids.shape, np.int64),
        **{
            f"past_key_values.{i}.{kind}": np.zeros((1, heads, 0, size), np.float32)
            for i in range(count)
            for kind in ("key", "value")
        },
    }
    found = session(onnx).run(["logits"], feeds)[0]
    difference = float(np.abs(found - logits).max())
    size = report["onnx_bytes"] / 1e3
    console.print(f"ONNX Runtime, {size:.0f} kB of graph beside the same shards: logits within {difference:.1e}")
    if difference > 1e-3:
        sys.exit("the exported model does not compute what the packed one does")


def _cache(config: Any) -> tuple[int, int, int]:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads, head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(HERE / "tiny-llama"), help="a dense model: folder, or org/name on the Hub"
    )
    parser.add_argument("--tokens", type=int, default=20_480, help="of the held-out text, to measure on")
    parser.add_argument("--out", type=Path, default=HERE.parent / "build" / "demo")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = pack(options.model, options.out, options.tokens)
    (options.out / "demo.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, options.out / "kl.png")
    show(rows, options.model)
    run(options.out / RUN, options.out / "onnx")
    console.print(f"\nall of it is in {options.out}")


if __name__ == "__main__":
    main()
