"""Layers that the schemes' own tools wrote import, verify, and decode to what their authors' code gives."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest

from qformat import verify
from qformat.checkpoint import Checkpoint
from qformat.converters.convert import convert
from qformat.converters.report import verify as verify_any
from qformat.dtypes import NUMPY, Array

CASES = sorted((foreign.DATA / "layers").iterdir())


def differs(found: Array, wanted: dict[str, Any], stored: Array | None) -> str:
    """How ``found`` falls short of an expectation of ``case.json``; empty where it does not."""
    if list(found.shape) != wanted["shape"]:
        return f"shape {found.shape}"
    if stored is not None:
        error = foreign.difference(found[:: wanted["step"]], stored)
        return "" if error <= wanted["error"] else f"relative error {error:.2e}"
    values = found.astype(NUMPY[wanted["equal"]]) + NUMPY[wanted["equal"]].type(0)  # minus zero is zero
    return "" if hashlib.sha256(values.tobytes()).hexdigest() == wanted["sha256"] else "other values"


def values(packed: Checkpoint, dense: Checkpoint, name: str) -> Array:
    rotated = name.removesuffix("_rotated")
    return dense.array(name) if rotated == name else packed[rotated].decode(rotated=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layer(case: Path, tmp_path: Path) -> None:
    facts = json.loads((case / "case.json").read_text())
    stored = (
        foreign.checkpoint.open(case / "expected.safetensors") if (case / "expected.safetensors").exists() else None
    )
    source = tmp_path / "source"
    source.mkdir()
    for file in case.iterdir():
        if file.name not in ("case.json", "expected.safetensors"):
            (source / file.name).symlink_to(file)
    packed = foreign.converted(source, tmp_path)
    convert(tmp_path / "packed", tmp_path / "dense", "dense", dtype="float32")
    dense = foreign.checkpoint.open(tmp_path / "dense")
    assert verify_any(source)["ok"] and verify.verify(packed) == []
    for name, wanted in facts["expected"].items():
        sample = stored.array(name) if stored is not None and name in stored.tensors else None
        assert differs(values(packed, dense, name), wanted, sample) == "", name


def test_the_comparison_can_fail() -> None:
    """One value off by its last bit, or off by more than the limit, is seen."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    digest = hashlib.sha256(values.astype(np.float16).tobytes()).hexdigest()
    equal = {"shape": [2, 3], "equal": "float16", "sha256": digest}
    close = {"shape": [2, 3], "error": 1e-6, "step": 1}
    assert (
        differs(values, equal, None) == differs(values, close, values) == differs(values * -1 * -1, equal, None) == ""
    )
    off = values.copy()
    off[1, 2] = np.nextafter(np.float16(5), np.float16(6))
    assert differs(off, equal, None) and differs(off, close, values) and differs(values[:1], equal, None)
