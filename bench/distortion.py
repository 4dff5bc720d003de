"""Distortion of the codecs on a Gaussian matrix: mean squared error relative to the variance, and stored bits.

    python bench/distortion.py [--size 4096] [--only GLOB] [--out bench/results/distortion.json]

Each row quantizes the same matrix of unit Gaussian numbers with the codec's own encoder and decodes it with the
reference; ``bound`` is what the codec is held to, ``limit`` the rate-distortion bound 4**-bits. Tables that
are built into a codec are not stored bytes. Rows of earlier runs at the same size are kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from qformat import codecs
from qformat.converters.quantize.weight import entry_of, pack
from qformat.kernels import native

HASH32 = {"shift": 7, "taps": [0, 3, 5, 12], "index": [3, 2], "table": "hash-32", "L": 14, "code": "hash"}
ONE = {"block": [-1, -1], "scales": "float16"}
CASES = {  # name: codec, bits, settings, bound
    "int-2": ("int", 2, {}, None),
    "table-lloyd-2": ("table", 2, {"bits": 2, "p": 1, "table": "gauss-p1-n4", **ONE}, 0.1178),
    "table-lloyd-3": ("table", 3, {"bits": 3, "p": 1, "table": "gauss-p1-n8", **ONE}, None),
    "table-lloyd-4": ("table", 4, {"bits": 4, "p": 1, "table": "gauss-p1-n16", **ONE}, None),
    "table-lloyd-4-blocks": ("table", 4, {}, None),
    "table-p2-4": ("table", 4, {"bits": 8, "p": 2, "table": "higgs-p2-n256", **ONE}, 0.0078),
    "table-p4-2": ("table", 2, {}, None),
    "e8p-2": ("e8p", 2, {}, 0.0916),
    "e8p-3": ("e8p", 3, {}, 0.0308),
    "e8p-4": ("e8p", 4, {}, 0.0098),
    "hash-2": ("trellis", 2, {}, 0.0735),
    "hash-3": ("trellis", 3, {}, 0.0187),
    "hash-4": ("trellis", 4, {}, 0.0053),
    "hash32-2-L14": ("trellis", 2, HASH32, 0.0709),
    "mul1-2": ("trellis", 2, {"code": "mul1"}, 0.0687),
    "3inst-2": ("trellis", 2, {"code": "3inst"}, 0.0691),
    "1mad-2": ("trellis", 2, {"code": "1mad"}, 0.0691),
    "hyb-2": ("trellis", 2, {"code": "hyb"}, 0.0711),
}


def measure(name: str, matrix: np.ndarray) -> dict[str, object]:
    codec, bits, settings, bound = CASES[name]
    terms = codecs.preset(codec, bits, True, settings)
    entry = entry_of(name, matrix.shape, "float32", terms, "none")
    started = time.perf_counter()
    packed = pack(entry, matrix)
    seconds = time.perf_counter() - started
    error = matrix.astype(np.float64) - packed.decode()
    mse = float((error**2).mean() / (matrix.astype(np.float64) ** 2).mean())
    return {
        "name": name,
        "terms": terms,
        "bits": bits,
        "stored_bits": round(packed.stored_bits, 5),
        "mse": round(mse, 6),
        "bound": bound,
        "holds": bound is None or (mse <= bound and packed.stored_bits <= bits + 0.02),
        "limit": 4.0**-bits,
        "seconds": round(seconds, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--only", default="*")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "distortion.json")
    options = parser.parse_args()
    matrix = np.random.default_rng(0).standard_normal((options.size, options.size), dtype=np.float32)
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows = {row["name"]: row for row in before.get("rows", []) if before["size"] == options.size}
    for name in CASES:
        if not fnmatch(name, options.only):
            continue
        row = rows[name] = measure(name, matrix)
        print(
            f"{name:14} {row['stored_bits']:8} bits  mse {row['mse']:.5f}  bound {row['bound']}  {row['seconds']} s",
            flush=True,
        )
        options.out.parent.mkdir(exist_ok=True)
        about = {"date": datetime.date.today().isoformat(), "size": options.size, "native": native.variant()}
        kept = [rows[name] for name in CASES if name in rows]
        options.out.write_text(json.dumps({**about, "rows": kept}, indent=1) + "\n")
    return 0 if all(row["holds"] for row in rows.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
