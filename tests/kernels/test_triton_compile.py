"""The Triton kernels compile for every target, without a GPU and without spilling registers."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCH = Path(__file__).resolve().parents[2] / "bench" / "triton_aot.py"
CASES = ("int-8-groups", "int-4-fused", "table-rows-of-11", "trellis-hash-4", "trellis-1mad")
TARGETS = ("sm_80", "sm_90", "gfx942")


def test_compiles_for_every_target(tmp_path: Path) -> None:
    """In a process of its own: in this one the kernels may be interpreted."""
    out = tmp_path / "aot.json"
    only = itertools.chain.from_iterable(("--only", case) for case in CASES)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(BENCH), *only, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = {(row["name"], row["target"]): row for row in json.loads(out.read_text())["rows"]}
    assert rows.keys() == set(itertools.product(CASES, TARGETS))
    for row in rows.values():
        assert 0 < row["registers"] <= 255 and row["spills"] == 0, row
