"""Damaged checkpoints are refused with an error that names what is wrong, and leave nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import foreign
import pytest

from qformat.converters.convert import convert
from qformat.errors import QformatError

CASES = sorted((foreign.DATA / "damaged").iterdir())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_damaged_checkpoint(case: Path, tmp_path: Path) -> None:
    facts = json.loads((case / "case.json").read_text())
    with pytest.raises(QformatError) as caught:
        convert(case, tmp_path / "packed")
    assert caught.value.exit_code in (3, 4)
    assert [word for word in facts["mentions"] if word.lower() not in str(caught.value).lower()] == []
    assert list(tmp_path.iterdir()) == []
