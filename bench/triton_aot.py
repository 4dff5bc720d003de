"""The Triton kernels compiled ahead of time, without a GPU: registers, spills and shared memory of each.

    python bench/triton_aot.py [--only GLOB]... [--out bench/results/triton_aot.json]

Each row is the kernel that ``dequantize`` would launch for one packed matrix, compiled for one GPU through Triton's own
launcher. On NVIDIA the figures are those of ``ptxas -v``, on AMD those that the assembly text states. ``instructions``
are those of the whole kernel for each element that a thread makes. Nothing runs: no figure is a speed.

Exit code 1 where a kernel spills.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import re
import subprocess
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # read when a kernel is defined

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from qformat import codecs
from qformat.codecs import trellis

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


class Case(NamedTuple):
    term: dict[str, Any]
    shape: tuple[int, int] = (4096, 4096)
    dtype: torch.dtype = torch.bfloat16
    rows: int | None = None


INT = {"codec": "int", "bits": 4, "block": [1, 128], "zeros": "uint8"}
TABLE = {"codec": "table", "bits": 4, "table": "nf4", "block": [1, 64], "scales": "float32"}
ADDITIVE = {"codec": "additive", "scales": "float16"}
FLOAT = {"codec": "float", "format": "e2m1", "block": [1, 16], "scales": "float8_e4m3fn"}
TRELLIS = {"codec": "trellis", "scales": "float16", "order": "c0 c3 r3 c1 c2 r0 r1 r2", "reversed": True, "L": 16}
CASES = {
    "int-4": Case(INT),
    "int-4-float32": Case(INT, dtype=torch.float32),
    "int-4-rows": Case(INT, rows=512),
    "int-4-row": Case(INT, rows=1),
    "int-4-one": Case(INT, (1, 1)),
    "int-3-ragged": Case({**INT, "bits": 3, "block": [3, 5]}, (1000, 1001)),
    "int-8-groups": Case({**INT, "bits": 8, "groups": "int32"}),
    "int-4-view": Case({**INT, "block": [64, 1], "view": [64, 1 << 18], "zeros": "float16"}),
    "int-4-fused": Case(
        {"codec": "int", "bits": 4, "offsets": "bfloat16", "rounding": "fused", "round_dtype": "bfloat16"}
    ),
    "table-nf4": Case(TABLE),
    "table-p4": Case({**TABLE, "bits": 8, "p": 4, "table": "gauss-p4-n256", "block": [-1, -1]}),
    "table-rows-of-11": Case({**TABLE, "bits": 11, "table": "float16", "table_block": [1, -1]}, dtype=torch.float16),
    "additive-2x8": Case({**ADDITIVE, "bits": 8, "books": 2}),
    "additive-1x16": Case({**ADDITIVE, "bits": 16}),
    "additive-tiles": Case({**ADDITIVE, "bits": 5, "books": 3, "group": [4, 6], "block": [3, 7]}, (1000, 1200)),
    "e8p-2": Case({"codec": "e8p", "scales": "float16"}),
    "e8p-1-rounded": Case(
        {"codec": "e8p", "bits": 1, "scales": "float32", "rounding": "once", "round_dtype": "float16"}
    ),
    "e8p-blocks": Case({"codec": "e8p", "block": [3, 5], "scales": "bfloat16"}, (1000, 1000)),
    "float-fp8": Case({**FLOAT, "format": "e4m3fn", "block": [128, 128], "scales": "float32"}),
    "float-mxfp4": Case({**FLOAT, "block": [1, 32], "scales": "float8_e8m0fnu"}),
    "float-nvfp4": Case({**FLOAT, "global_scale": "float32"}),
    "float-nvfp4-last": Case({**FLOAT, "global_scale": "float32", "global_form": "last"}),
    "float-6": Case({**FLOAT, "format": "e2m3", "block": [3, 5]}, (1000, 1001)),
    **{f"trellis-hash-{bits}": Case({"codec": "trellis", **trellis.preset(bits, True, {})}) for bits in (2, 3, 4)},
    **{f"trellis-{code}": Case({**TRELLIS, "bits": [2], "code": code}) for code in ("1mad", "3inst", "mcg", "mul1")},
    "trellis-hyb": Case({**TRELLIS, "bits": [2], "V": 2, "code": "hyb", "index": [9], "table": "hyb-q9"}),
    "trellis-table": Case({**TRELLIS, "bits": [2], "V": 2, "code": "table", "table": "float16"}),
    "trellis-bytes": Case(
        {**TRELLIS, "bits": [1] * 16 + [1, 2] * 8, "code": "mcg", "tile": [4, 8], "order": "c0 c1 c2 r0 r1"}
    ),
}


class Machine:
    """Stands in for the GPU that Triton asks what to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


class Compiler:
    """Stands in for a kernel: compiles what would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def compile(*args: Any, **kwargs: Any) -> None:
            self.compiled, self.tile = self.kernel.warmup(*args, grid=grid, **kwargs), kwargs["TILE"]

        return compile


def measure(name: str, case: Case, target: GPUTarget) -> dict[str, Any]:
    codec, params = codecs.read_params(case.term)
    parts = {p.name: torch.empty(p.shape, dtype=getattr(torch, str(p.dtype))) for p in codec.layout(params, case.shape)}
    rows = None if case.rows is None else torch.zeros(case.rows, dtype=torch.int64)
    module: Any = importlib.import_module(f"qformat.kernels.gpu.{codec.NAME}")
    compiler = Compiler(module.kernel)
    driver.set_active(Machine(target))
    module.kernel = compiler
    try:
        module.dequantize(params, case.shape, parts, case.dtype, rows)
    finally:
        module.kernel = compiler.kernel
    compiled, tile = compiler.compiled, compiler.tile
    threads = compiled.metadata.num_warps * target.warp_size
    used, instructions = nvidia(compiled.asm) if target.backend == "cuda" else amd(compiled.asm["amdgcn"])
    return {
        "name": name,
        "target": next(key for key, value in TARGETS.items() if value == target),
        **used,
        "shared": compiled.metadata.shared,
        "instructions": round(instructions / max(1, tile.rows * tile.cols // threads), 1),
        "term": case.term,
        "shape": case.shape,
        "rows": case.rows,
        "dtype": str(case.dtype).removeprefix("torch."),
    }


def nvidia(asm: dict[str, Any]) -> tuple[dict[str, int], int]:
    """Registers and bytes of spills, as ptxas prints them, and the number of instructions."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(asm["ptx"])
        arch = re.search(r"\.target (\w+)", asm["ptx"])[1]  # type: ignore[index]
        # as Triton calls it for kernels without contraction
        command = [BIN / "ptxas", "-v", "--fmad=false", f"--gpu-name={arch}", ptx, "-o", cubin]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        listing = subprocess.run([BIN / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups())  # type: ignore[union-attr]
    registers = int(re.search(r"Used (\d+) registers", said)[1])  # type: ignore[index]
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?(?!NOP)[A-Z]", listing)
    return {"registers": registers, "spills": stores + loads}, len(instructions)


def amd(text: str) -> tuple[dict[str, int], int]:
    """Vector registers, spilled registers of either kind, and the number of instructions."""
    said = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    spills = said["vgpr_spill_count"] + said["sgpr_spill_count"]
    instructions = re.findall(r"^\t(?:v|s|global|flat|ds|buffer|scratch)_\w+", text, re.MULTILINE)
    return {"registers": said["vgpr_count"], "spills": spills}, len(instructions)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "triton_aot.json")
    options = parser.parse_args()
    rows = []
    for name, case in CASES.items():
        if options.only and not any(fnmatch(name, only) for only in options.only):
            continue
        for target in TARGETS.values():
            row = measure(name, case, target)
            rows.append(row)
            keys = ("name", "target", "registers", "spills", "shared", "instructions")
            print(*(f"{key} {row[key]}" for key in keys), flush=True)
    head = {"date": datetime.date.today().isoformat(), "triton": triton.__version__, "machine": platform.machine()}
    lines = ",\n".join(json.dumps(row) for row in rows)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n')
    return int(any(row["spills"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
