"""How fast importers are, in bytes of the source a second: the parts alone, and the whole conversion.

    python bench/import_speed.py [--only GLOB] [--size 4096] [--repeat 5] [--folder DIR] [--out FILE]

For each scheme a checkpoint of sixteen square weights with random codes (bench/synthetic.py), read before so that it
lies in the page cache. Columns:

- ``parts_1``, ``parts_2``: the parts of every weight made, by one thread and by two; ``core`` is the rate by the time
  that cores spent on it, which says more on a machine that does other work.
- ``write``: the source opened and written as a qformat folder, by as many threads as there are cores; ``convert``: and
  the proof after it.
- ``copy``: the same tensors copied by two threads in the same run; ``ratio``: ``parts_2`` to it.

Medians.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import synthetic

from qformat import checkpoint
from qformat.converters.convert import convert
from qformat.converters.importers import read
from qformat.converters.write import account, write
from qformat.kernels import native

SHM = Path("/dev/shm")
COLUMNS = ("copy", "parts_1", "parts_2", "core", "write", "convert", "ratio")


def seconds(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    run()
    return clock() - start


def all_of(makers: Iterable[Callable[[], Any]], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for made in [pool.submit(make) for make in makers]:
            made.result()


def written(path: Path, target: Path) -> None:
    """What convert does but for the proof."""
    source = checkpoint.open(path)
    plan = read(source)[0]
    write(source, plan, target, account(source, plan), packed=True)


def measure(scheme: str, folder: Path, size: int, repeat: int) -> dict[str, Any]:
    """Rates in GB of source bytes a second."""
    path, target = folder / scheme, folder / "target"
    nbytes = synthetic.write(path, scheme, synthetic.square(16, size))
    source = checkpoint.open(path)
    items = read(source)[0].items
    makers = [item.make for item in items if item.entry is not None]
    copies = [source.raw(name).copy for name in source.tensors]
    runs: dict[str, Callable[[], Any]] = {
        "copy": lambda: all_of(copies, 2),
        "parts_1": lambda: all_of(makers, 1),
        "parts_2": lambda: all_of(makers, 2),
        "write": lambda: written(path, target),
        "convert": lambda: convert(path, target),
        "core": lambda: all_of(makers, 1),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeat + 1):
        for name, run in runs.items():  # interleaved: what slows the machine down slows all of them
            took = seconds(run, time.process_time if name == "core" else time.perf_counter)
            shutil.rmtree(target, ignore_errors=True)
            if turn:
                times[name].append(took)
    rates = {name: round(nbytes / statistics.median(took) / 1e9, 3) for name, took in times.items()}
    shutil.rmtree(path)
    return {"scheme": scheme, "bytes": nbytes, **rates, "ratio": round(rates["parts_2"] / rates["copy"], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="schemes, as a pattern")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=SHM if SHM.is_dir() else None, help="default: /dev/shm")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    result: dict[str, Any] = {"date": str(datetime.date.today()), "machine": machine, "native": native.variant()}
    result |= {"load_before": round(os.getloadavg()[0], 2), "size": options.size, "unit": "GB/s", "rows": []}
    print("GB/s".ljust(14), *(name.rjust(8) for name in COLUMNS))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for scheme in synthetic.SCHEMES:
            if fnmatch(scheme, options.only):
                row = measure(scheme, Path(folder), options.size, options.repeat)
                print(scheme.ljust(14), *(f"{row[name]:8.3f}" for name in COLUMNS), flush=True)
                result["rows"].append(row)
    result["load_after"] = round(os.getloadavg()[0], 2)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
