"""Memory and time of importing a model shaped like a Llama of 7B, with random codes (bench/synthetic.py).

    python bench/import_7b.py [--schemes gptq-4 aqlm-2x8 exl3-4] [--layers 32] [--folder DIR] [--out FILE]

Each is written in shards of 1 GB, then imported twice, of which the second counts: the first brings the source and free
memory in. The import runs in a process of its own, which asks the system every few milliseconds how much memory it has
to itself (RssAnon); pages of mapped files, which the system takes back when it needs them, are not counted.

``private`` is the peak beyond what the process had before, once while the folder is written and once in the proof after
it. It is held against ``bound``: 1.3 times the largest weight of the model, as it is stored, and ``BUFFERS``.
``packed_weights`` is the peak in sizes of the largest packed weight; dense tensors go from the map to the file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import synthetic

import qformat
from qformat import checkpoint
from qformat.converters.importers import read
from qformat.converters.proof import prove
from qformat.converters.write import account, write

BUFFERS = 64 << 20  # weights that wait for the writer, and what the interpreter needs
EVERY = 0.003  # seconds


def private() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def watched(run: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """What it returns; its seconds and the peak of private memory beyond that before."""
    before, done = private(), threading.Event()
    peak = before

    def watch() -> None:
        nonlocal peak
        while not done.wait(EVERY):
            peak = max(peak, private())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        result = run()
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    return result, {"seconds": round(seconds, 2), "private": peak - before}


def imported(path: Path, target: Path) -> dict[str, Any]:
    """As ``convert`` does, the proof by itself; in this process."""
    source = checkpoint.open(path)
    (plan, scheme, _), planned = watched(lambda: read(source))
    packed = [item for item in plan.items if item.entry is not None]
    sizes = [sum(source.tensors[name].nbytes for name in item.consumes) for item in packed]
    _, written = watched(lambda: write(source, plan, target, account(source, plan), packed=True))
    found, proven = watched(lambda: prove(source, plan, scheme, "qformat", target))
    return {
        "weights": len(packed),
        "largest": max(tensor.nbytes for tensor in source.tensors.values()),
        "largest_packed": max(sizes),
        "plan": planned,
        "write": written,
        "proof": {**proven, "values": found["values"] if found else 0},
    }


def measure(scheme: str, folder: Path, layers: int) -> dict[str, Any]:
    path, target = folder / scheme, folder / "target"
    nbytes = synthetic.write(path, scheme, synthetic.llama(layers), synthetic.dense(layers))
    shards = len(list(path.glob("*.safetensors")))
    command = [sys.executable, __file__, "--imported", str(path), "--folder", str(target)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        shutil.rmtree(target)
    shutil.rmtree(path)
    row = {"scheme": scheme, "bytes": nbytes, "shards": shards, **json.loads(done.stdout)}
    bound = int(1.3 * row["largest"]) + BUFFERS
    peak = max(row[phase]["private"] for phase in ("plan", "write", "proof"))
    rate = round(nbytes / (row["plan"]["seconds"] + row["write"]["seconds"]) / 1e9, 3)
    row |= {"private": peak, "packed_weights": round(peak / row["largest_packed"], 1)}
    return {**row, "bound": bound, "holds": peak <= bound, "gb_per_s": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", choices=synthetic.SCHEMES, default=["gptq-4", "aqlm-2x8", "exl3-4"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--imported", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.imported:
        print(json.dumps(imported(options.imported, options.folder)))
        return
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    result: dict[str, Any] = {"qformat": qformat.__version__, "date": str(datetime.date.today()), "machine": machine}
    result |= {"layers": options.layers, "buffers": BUFFERS, "load_before": round(os.getloadavg()[0], 2), "rows": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for scheme in options.schemes:
            result["rows"].append(measure(scheme, Path(folder), options.layers))
            print(json.dumps(result["rows"][-1]), flush=True)
    result["load_after"] = round(os.getloadavg()[0], 2)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
