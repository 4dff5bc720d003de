"""What packing costs a model: KL divergence from it, perplexity and agreement, for rotated codecs at 2, 3 and 4 bits.

    python bench/kl.py [--model PATH] [--only GLOB] [--tokens 100000] [--out bench/results/kl.json]

Each row packs the model and measures it as ``qformat quantize`` and ``qformat eval`` do, on the bundled text. Rows of
earlier runs of the same model and number of tokens are kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qformat.converters.quantize.job import quantize
from qformat.kernels import native
from qformat.runtime.evaluate import evaluate

ROOT = Path(__file__).parents[1]
CASES = {f"{codec}-{bits}": (codec, bits) for bits in (2, 3, 4) for codec in ("trellis", "e8p", "table")}
MEASURED = ("kl", "kl_ci95", "perplexity", "reference_perplexity", "top1")


def measure(name: str, model: Path, tokens: int) -> dict[str, Any]:
    codec, bits = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        packed = quantize(model, Path(folder) / "packed", codec=codec, bits=bits, rotate="hadamard")
        found = evaluate(Path(folder) / "packed", reference=model, tokens=tokens)
    row = {key: packed[key] for key in ("terms", "rotate", "stored_bits")}
    return {"name": name, **row, **{key: found[key] for key in MEASURED}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny-llama")
    parser.add_argument("--only", default="*")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "kl.json")
    options = parser.parse_args()
    about = {"model": options.model.name, "tokens": options.tokens}
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows = {row["name"]: row for row in before.get("rows", [])} if before.items() >= about.items() else {}
    about |= {"date": datetime.date.today().isoformat(), "machine": f"{platform.system()} {platform.machine()}"}
    about |= {"native": native.variant()}
    for name in CASES:
        if not fnmatch(name, options.only):
            continue
        row = rows[name] = measure(name, options.model, options.tokens)
        print(f"{name:10} {row['stored_bits']:8.5f} bits  kl {row['kl']:.5f}  top-1 {row['top1']:.4f}", flush=True)
        kept = [rows[name] for name in CASES if name in rows]
        options.out.write_text(json.dumps({**about, "rows": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
