"""Whole models through the converters: a foreign one in, run, out and in again; packed ones out and in again.

    python bench/round_trips.py [--gptq FOLDER --text FILE] [--out FILE]

Without options the bundled model is packed as ``int`` and exported to GPTQ and AWQ, and as ``trellis`` with mul1 to
EXL3; each is imported again, and its weights compared with those that were packed. ``--gptq``: a GPTQ model of that
architecture with a ``reference.json`` (prompt_ids, logits_last_top20, perplexity_first_20k_tokens): its logits and its
perplexity on the text beside the recorded ones, the export to GPTQ, and what the export to AWQ says.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

import qformat
from qformat.converters.convert import convert
from qformat.converters.quantize.job import quantize
from qformat.errors import QformatError

MODEL = Path(__file__).resolve().parents[1] / "examples/tiny-llama"
INT = {"codec": "int", "bits": 4, "settings": {"zeros": "uint8", "block": [1, 32]}}
MUL1 = {"code": "mul1", "scales": None, "reversed": True, "order": "c0 c3 r3 c1 c2 r0 r1 r2"}
PACKINGS: dict[str, dict[str, Any]] = {
    "gptq": INT,
    "awq": INT,
    "exl3": {"codec": "trellis", "bits": 3, "rotate": "128", "settings": MUL1},
}
WINDOW, WINDOWS = 512, 39


def out_and_in(packed: Path, to: str, work: Path) -> dict[str, Any]:
    """How many weights are the same after an export and an import."""
    exported = convert(packed, work / "exported", to)
    convert(work / "exported", work / "again")
    before, after = qformat.open(packed), qformat.open(work / "again")
    equal = sum(np.array_equal(before[name].decode(), after[name].decode()) for name in before)
    return {"to": to, "weights": len(list(before)), "equal": int(equal), "proof": exported["proof"]}


def foreign(source: Path, text: Path, work: Path) -> dict[str, Any]:
    """A GPTQ model beside what is recorded of it."""
    reference = json.loads((source / "reference.json").read_text())
    report = convert(source, work / "packed")
    model = qformat.load(work / "packed", dtype=torch.float32)
    top = reference["logits_last_top20"]
    ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(text.read_text(), add_special_tokens=False).ids
    lost = 0.0
    with torch.no_grad():
        logits = model(torch.tensor([reference["prompt_ids"]])).logits[0, -1]
        for window in torch.tensor(ids[: WINDOW * WINDOWS]).reshape(WINDOWS, 1, WINDOW):
            chances = torch.log_softmax(model(window).logits[0, :-1].double(), -1)
            lost -= float(chances.gather(1, window[0, 1:, None]).sum())
    try:
        awq = str(convert(work / "packed", work / "awq", "awq")["format"])
    except QformatError as error:
        awq = str(error)
    return {
        "proof": report["proof"],
        "logits_apart": float(np.abs(logits.numpy()[top["ids"]] - np.array(top["values"])).max()),
        "perplexity": math.exp(lost / (WINDOWS * (WINDOW - 1))),
        "recorded_perplexity": reference["perplexity_first_20k_tokens"]["perplexity"],
        "gptq": out_and_in(work / "packed", "gptq", work),
        "awq": awq.replace(str(work), ""),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gptq", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "qformat": qformat.__version__, "bundled": []}
    for to, packing in PACKINGS.items():
        with tempfile.TemporaryDirectory() as work:
            quantize(MODEL, Path(work, "packed"), **packing)
            result["bundled"].append(out_and_in(Path(work, "packed"), to, Path(work)))
    if options.gptq:
        with tempfile.TemporaryDirectory() as work:
            result["gptq"] = foreign(options.gptq, options.text, Path(work))
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
