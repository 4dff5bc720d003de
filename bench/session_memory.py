"""Memory of an exported model in ONNX Runtime: before its session is made, after, and after a run.

    python bench/session_memory.py [--codec int] [--bits 4] [--layers 8] [--hidden 2048] [--tokens 32] [--out FILE]

``private`` is memory of the process's own (RssAnon), ``mapped`` pages of files, which the system takes back when it
needs them (RssFile); ``peak`` is the most private memory until then. The model is a Llama of random numbers, all of its
matrices packed. Each mode of :func:`qformat.runtime.ort.session` is measured in a process of its own, after a
session of a small model has run. ``activations`` is what a graph of this size needs at once in any runtime: the logits,
the cache, and the widest tensors between.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from load_memory import make, resident

import qformat
from qformat import codecs
from qformat.runtime.ort import session
from qformat.runtime.ort.sessions import MODES

PACKED_BUT = 20_000_000  # bytes beside packed weights and activations that a session may take


def feeds(made: Any, tokens: int) -> dict[str, Any]:
    ids = np.arange(3, 3 + tokens)[None]
    caches = [one for one in made.get_inputs() if len(one.shape) == 4]
    empty = {one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32) for one in caches}
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": ids - 3, **empty}


def peak() -> int:
    """The most private memory so far: the high-water mark, less what is mapped now."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return (int(status["VmHWM"].split()[0]) - int(status["RssFile"].split()[0])) * 1024


def measure(folder: Path, small: Path, mode: str, tokens: int) -> dict[str, Any]:
    warm = session(small, mode)
    warm.run(None, feeds(warm, 4))
    out: dict[str, Any] = {"before": resident()}
    started = time.perf_counter()
    made = session(folder, mode)
    out |= {"seconds": round(time.perf_counter() - started, 2), "session": resident(), "session_peak": peak()}
    results = made.run(None, feeds(made, tokens))
    out |= {"after_run": resident(), "run_peak": peak(), "outputs": sum(one.nbytes for one in results)}
    started = time.perf_counter()
    made.run(None, feeds(made, tokens))
    return {**out, "run_seconds": round(time.perf_counter() - started, 3)}


def export(folder: Path, terms: Any, rotate: Any, hidden: int, layers: int) -> tuple[Path, int, int]:
    from qformat.runtime.ort.export import export as job

    folder.mkdir()
    nbytes = make(folder / "packed", terms, rotate, hidden, layers, wholly=True)
    report = job(folder / "packed", folder / "exported")
    return folder / "exported", nbytes, report["onnx_bytes"]


def activations(hidden: int, layers: int, tokens: int, vocabulary: int = 4096) -> int:
    """Bytes: logits, keys and values, and for one layer x, its gate, its up and their product; float32."""
    inner = hidden * 11 // 4
    return 4 * tokens * (vocabulary + 2 * layers * hidden + 4 * hidden + 3 * inner)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", default="int")
    parser.add_argument("--bits", type=float, default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "SMALL", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, small, mode = options.measure
        print(json.dumps(measure(Path(folder), Path(small), mode, options.tokens)))
        return
    rotate = "hadamard" if options.codec in ("trellis", "e8p") else "none"
    terms = codecs.preset(options.codec, options.bits, rotate == "hadamard", {})
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": f"{platform.system()} {platform.machine()}"}
    result |= {"qformat": qformat.__version__, "onnxruntime": onnxruntime.__version__, "terms": terms, "rotate": rotate}
    result |= {"layers": options.layers, "hidden": options.hidden, "tokens": options.tokens}
    with tempfile.TemporaryDirectory() as work:
        small, _, _ = export(Path(work, "small"), terms, rotate, 256, 1)
        big, packed, onnx = export(Path(work, "big"), terms, rotate, options.hidden, options.layers)
        needed = activations(options.hidden, options.layers, options.tokens)
        result |= {"packed_bytes": packed, "onnx_bytes": onnx, "activations": needed, "modes": {}}
        for mode in MODES:
            command = [sys.executable, __file__, "--tokens", str(options.tokens)]
            done = subprocess.run([*command, "--measure", big, small, mode], capture_output=True, text=True, check=True)
            result["modes"][mode] = json.loads(done.stdout)
    grown = result["modes"]["plugin"]
    more = sum(grown["after_run"].values()) - sum(grown["before"].values())
    result |= {"plugin_grows_by": more, "bound": packed + needed + PACKED_BUT}
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
