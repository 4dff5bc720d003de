"""Speed of the native library: encoders, decoders, and linear beside torch's float32 linear in the same run.

    python bench/native_encode.py [--threads N] [--rounds N] [--out bench/results/native_encode.json]

What is compared is measured in turns, ``--rounds`` times; a row holds the median and the spread in seconds.
``packed_gb_s`` counts the packed bytes that were read, ``float_gb_s`` the same weights as float32.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qformat import codecs
from qformat.dtypes import NUMPY, Array
from qformat.kernels import native
from qformat.kernels.cpu.e8p import nearest
from qformat.kernels.cpu.trellis import search

ENCODERS = [(12, 2), (12, 3), (12, 4), (16, 2), (16, 4)]  # (L, bits)
MATRICES: dict[str, tuple[str, dict[str, Any]]] = {
    "int 4": ("int", {"block": [1, 64], "zero": 8, "bits": 4}),
    "int 3": ("int", {"block": [1, 64], "zeros": "uint8", "bits": 3}),
    "int 8": ("int", {"block": [1, -1], "zero": 128, "bits": 8}),
    "table 4": ("table", {"block": [1, 64], "scales": "float16", "bits": 4, "table": "gauss-p1-n16"}),
    "table p=2, 4": ("table", {"block": [-1, -1], "scales": "float16", "bits": 8, "p": 2, "table": "higgs-p2-n256"}),
    "trellis hash 2": ("trellis", codecs.get("trellis").preset(2, True, {})),
    "trellis hash 4": ("trellis", codecs.get("trellis").preset(4, True, {})),
    "trellis mul1 2": ("trellis", codecs.get("trellis").preset(2, True, {"code": "mul1"})),
}
SHAPE = (4096, 4096)
BATCHES = (1, 8, 512)


def cpu() -> str:
    """The model name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def in_turns(tasks: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Run all tasks, one after the other, once to warm up and then ``rounds`` times."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            started = time.perf_counter()
            task()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {
        name: {"median_s": statistics.median(each), "least_s": min(each), "most_s": max(each)}
        for name, each in times.items()
    }


def encoders(threads: int, rounds: int) -> list[dict[str, Any]]:
    tasks, sizes = {}, {}
    for L, bits in ENCODERS:
        _, params = codecs.read_params(
            {"codec": "trellis", **codecs.get("trellis").preset(2, True, {"code": "mul1", "L": L, "bits": [bits]})}
        )
        tiles = 2 ** (25 - L) // 64  # about as long for every L
        targets = np.random.default_rng(0).standard_normal((tiles, params.steps, 1), dtype=np.float32)
        values = codecs.get("trellis").values(params, {})
        name = f"L = {L}, {bits} bits"
        tasks[name] = lambda p=params, t=targets, v=values: search(p, t, v, threads=threads)
        sizes[name] = targets.size
    return [
        {"what": "trellis encoder", "name": name, **row, "weights_per_s": sizes[name] / row["median_s"]}
        for name, row in in_turns(tasks, rounds).items()
    ]


def lattice_encoders(threads: int, rounds: int) -> list[dict[str, Any]]:
    vectors = np.random.default_rng(0).standard_normal((1 << 17, 8), dtype=np.float32)
    tasks: dict[str, Callable[[], Any]] = {
        f"{bits} bits": lambda bits=bits: nearest(vectors, bits, threads=threads) for bits in (1, 2)
    }
    return [
        {"what": "e8p encoder", "name": name, **row, "weights_per_s": vectors.size / row["median_s"]}
        for name, row in in_turns(tasks, rounds).items()
    ]


def random_parts(codec: Any, params: Any) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    parts = {}
    for part in codec.layout(params, SHAPE):
        dtype = NUMPY[part.dtype]
        draw = rng.integers(0, 256, part.shape) if dtype.kind in "iu" else rng.standard_normal(part.shape)
        parts[part.name] = draw.astype(dtype)
    return parts


def products(threads: int, rounds: int) -> list[dict[str, Any]]:
    matrices, packed = {}, {}
    for name, (codec_name, term) in MATRICES.items():
        codec, params = codecs.read_params({"codec": codec_name, **term})
        parts = random_parts(codec, params)
        matrix = native.matrix(codec_name, params, SHAPE, parts)
        assert matrix is not None, name
        matrices[name], packed[name] = matrix, sum(part.nbytes for part in parts.values())
    rows = []
    decoders = {name: lambda m=matrix: m.decode(threads=threads) for name, matrix in matrices.items()}
    for name, row in in_turns(decoders, rounds).items():
        rows.append({"what": "decode", "name": name, **row, **_rates(packed[name], row["median_s"])})
    for batch in BATCHES:
        x = np.random.default_rng(1).standard_normal((batch, SHAPE[1]), dtype=np.float32)
        tasks: dict[str, Callable[[], Any]] = {
            name: lambda m=matrix, x=x: m.linear(x, threads=threads) for name, matrix in matrices.items()
        }
        if importlib.util.find_spec("torch"):
            tasks = {"torch float32": _torch_linear(x, threads), **tasks}
        for name, row in in_turns(tasks, rounds).items():
            size = packed.get(name, 4 * SHAPE[0] * SHAPE[1])
            rows.append({"what": "linear", "name": name, "batch": batch, **row, **_rates(size, row["median_s"])})
    return rows


def _torch_linear(x: Array, threads: int) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(threads)
    weight, source = torch.randn(SHAPE), torch.from_numpy(x)
    return lambda: torch.nn.functional.linear(source, weight)


def _rates(packed: int, seconds: float) -> dict[str, float]:
    return {"packed_gb_s": packed / seconds / 1e9, "float_gb_s": 4 * SHAPE[0] * SHAPE[1] / seconds / 1e9}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "native_encode.json")
    options = parser.parse_args()
    measures = (encoders, lattice_encoders, products)
    rows = [row for measure in measures for row in measure(options.threads, options.rounds)]
    for row in rows:
        rate = row.get("weights_per_s")
        speed = f"{rate / 1e3:9.1f} kw/s" if rate else f"{row['packed_gb_s']:6.2f} GB/s {row['float_gb_s']:6.1f} float"
        print(f"{row['what']:16} {row['name']:16} {row.get('batch', ''):>4} {1e3 * row['median_s']:9.2f} ms {speed}")
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": cpu(),
        "variant": native.variant(),
        "threads": options.threads,
        "shape": SHAPE,
        "load": os.getloadavg()[0],  # a figure taken on a busy machine says so
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
