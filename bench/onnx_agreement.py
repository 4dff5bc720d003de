"""A model packed in every family and exported: do torch and the ways to run it in ONNX agree, and how big is it?

    python bench/onnx_agreement.py MODEL [--codec int ...] [--out FILE]

MODEL is the folder of a dense decoder or encoder. ``torch`` is the packed model in transformers, in float32; every
difference is the largest of any output at a token that is not padding, as a part of the largest number of that output.
``plugin`` is ONNX Runtime with the kernels of the C++ library, ``fold`` and ``stream`` are it alone, weights decoded
when it loads or at every run; ``reference`` is ``onnx.reference``.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator

import qformat
from qformat.dtypes import Array
from qformat.errors import QformatError
from qformat.runtime.ort import session
from qformat.runtime.ort.sessions import MODES

RATES = [("int", 4), ("table", 4), ("trellis", 2), ("trellis", 3), ("trellis", 4), ("e8p", 2), ("additive", 2)]
RATES += [("float", 4), ("float", 8)]
LENGTHS = (17, 9, 3)  # tokens of each row of the batch; the rest is padding


def feeds_for(inputs: list[Any], vocabulary: int) -> dict[str, Array]:
    """Random tokens for the model's inputs; caches are empty."""
    rng = np.random.default_rng(0)
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    known = {
        "input_ids": rng.integers(0, vocabulary, mask.shape),
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, 2, mask.shape),
        "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0),
    }
    caches = {i.name: np.zeros((len(mask), i.shape[1], 0, i.shape[3]), np.float32) for i in inputs if len(i.shape) == 4}
    return {i.name: known[i.name] for i in inputs if i.name in known} | caches


def truth(packed: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    model = qformat.load(packed, dtype=torch.float32)
    with torch.no_grad():
        out = model(**{name: torch.from_numpy(array) for name, array in feeds.items() if array.dtype == np.int64})
    return {name: value.numpy() for name, value in out.items() if isinstance(value, torch.Tensor)}


def difference(found: Mapping[str, Array], expected: Mapping[str, Array], mask: Array) -> float:
    worst = 0.0
    for name, array in expected.items():
        apart = np.abs(found[name] - array)
        by_token = apart.shape[:2] == mask.shape
        worst = max(worst, float((apart[mask.astype(bool)] if by_token else apart).max() / np.abs(array).max()))
    return worst


def by_reference(exported: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    copied = Path(shutil.copytree(exported, exported.parent / "copied"))  # onnx reads no file that has two links
    evaluator = ReferenceEvaluator(str(copied / "model.onnx"))
    found = dict(zip(evaluator.output_names, evaluator.run(None, dict(feeds)), strict=True))
    shutil.rmtree(copied)
    return found


def by_runtime(model: onnxruntime.InferenceSession, feeds: Mapping[str, Array]) -> dict[str, Array]:
    return dict(zip([o.name for o in model.get_outputs()], model.run(None, dict(feeds)), strict=True))


def measure(packed: Path, exported: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    written = qformat.export(packed, exported)
    sessions = {mode: session(exported, mode) for mode in MODES}
    feeds = feeds_for(sessions["fold"].get_inputs(), json.loads((packed / "config.json").read_text())["vocab_size"])
    expected = truth(packed, feeds)
    found = {mode: by_runtime(one, feeds) for mode, one in sessions.items()}
    found["reference"] = by_reference(exported, feeds)
    apart = {how: difference(one, expected, feeds["attention_mask"]) for how, one in found.items()}
    sizes = {"onnx_bytes": written["onnx_bytes"], "bytes": written["bytes"], "stored_bits": report["stored_bits"]}
    return {"outputs": {name: list(array.shape) for name, array in expected.items()}, **sizes, "apart": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--codec", nargs="*", help="these alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    config = json.loads((options.model / "config.json").read_text())
    versions = {"qformat": qformat.__version__, "onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    result: dict[str, Any] = {**versions, "onnx": onnx.__version__, "machine": platform.machine()}
    result |= {"architecture": config["architectures"][0], "rows": []}
    for codec, bits in RATES:
        if options.codec and codec not in options.codec:
            continue
        with tempfile.TemporaryDirectory() as folder:
            packed, exported = Path(folder) / "packed", Path(folder) / "exported"
            try:
                report = qformat.quantize(options.model, packed, codec=codec, bits=bits)
                row = {"codec": codec, "bits": bits, **measure(packed, exported, report)}
            except QformatError as error:
                row = {"codec": codec, "bits": bits, "error": str(error)}
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
