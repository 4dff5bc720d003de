"""The additive encoder on a weight from a file: relative squared error, and that of its codes alone.

    python bench/additive.py FILE [--weight NAME] [--books 2] [--bits 8] [--group 8] [--solution FILE] [--bound 0.0865]

FILE is a safetensors file. Each encoder of this installation, the reference and the C++ library, makes codes, books and
scales; the error is |W' - W|^2 / |W|^2 in float64, the stored bits count the books. With --solution the AQLM tensors
``codes``, ``codebooks`` and ``scales`` of another file are measured in the same way. Ends with 1 where an error is
above --bound or where the two encoders differ.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from qformat.codecs import additive
from qformat.kernels import native
from qformat.shards import Shard


def error(weight: np.ndarray, found: np.ndarray) -> float:
    exact = weight.astype(np.float64)
    return float(((found - exact) ** 2).sum() / (exact**2).sum())


def solution(path: Path) -> np.ndarray:
    """What another encoder's AQLM tensors decode to: float32 [out, in]."""
    file = Shard(path)
    codes, books, scales = (file.array(name) for name in ("codes", "codebooks", "scales"))
    codes = codes.astype(np.int64) % books.shape[1]
    tiles = sum(book.astype(np.float32)[codes[..., m]] for m, book in enumerate(books))
    values = (tiles * scales.astype(np.float32)).transpose(0, 2, 1, 3)
    return values.reshape(codes.shape[0] * books.shape[2], -1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--weight", default="weight")
    parser.add_argument("--books", type=int, default=2)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--solution", type=Path)
    parser.add_argument("--bound", type=float, default=0.0865)
    options = parser.parse_args()
    weight = Shard(options.file).array(options.weight).astype(np.float32)
    params = additive.Params(bits=options.bits, books=options.books, group=(1, options.group), scales="float16")
    encoders = {"reference": additive.encode}
    if native.available():
        encoders[native.variant()] = native.binding("additive").encode
    rows, made = [], []
    for name, encode in encoders.items():
        started = time.perf_counter()
        parts = encode(params, weight)
        seconds = time.perf_counter() - started
        made.append({part: array.tobytes() for part, array in parts.items()})
        bits = 8 * sum(array.nbytes for array in parts.values()) / weight.size
        found = error(weight, additive.decode(params, weight.shape, parts))
        figures = {"error": round(found, 6), "stored_bits": round(bits, 4), "seconds": round(seconds, 2)}
        rows.append({"encoder": name, **figures})
    if options.solution:
        rows.append({"encoder": options.solution.name, "error": round(error(weight, solution(options.solution)), 6)})
    print(json.dumps({"shape": list(weight.shape), "bound": options.bound, "rows": rows}, indent=1))
    held = all(row["error"] <= options.bound for row in rows[: len(made)])
    return 0 if held and all(one == made[0] for one in made) else 1


if __name__ == "__main__":
    raise SystemExit(main())
