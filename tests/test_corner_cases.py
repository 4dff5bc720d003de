"""Manifest entries and part lists of awkward schemes, written by hand: what the format must be able to say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qformat import codecs, manifest, rotation, weight
from qformat.errors import UnsupportedError
from qformat.layout import Part
from qformat.manifest import Entry
from qformat.records import read_record

CASES = json.loads((Path(__file__).parent / "data" / "corner-cases.json").read_text())


def listed(parts: list[Part]) -> dict[str, list[Any]]:
    return {part.name: [part.dtype, list(part.shape)] for part in parts}


def read(case: dict[str, Any]) -> manifest.Manifest:
    return manifest.read({"quant_method": "qformat", "version": "0.1", "entries": [case["entry"]]})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["scheme"])
def test_awkward_schemes_can_be_said(case: dict[str, Any]) -> None:
    """Where all codecs are there the entry has exactly the parts listed. Where one is to come, that is all that is
    wrong: the rest of the entry, its other terms and its rotation are read, and have their part of the list.
    """
    to_come = set(case.get("to_come", ()))
    if not to_come:
        (entry,) = read(case).entries
        assert listed(weight.layout(entry)) == case["parts"]
        return
    assert not to_come & set(codecs.NAMES), "this codec has come: its case is a whole one now"
    with pytest.raises(UnsupportedError) as refused:
        read(case)
    assert any(repr(name) in refused.value.found for name in to_come)
    entry = read_record(Entry, case["entry"])
    shape, known, prefixes = weight.matrix_shape(entry), [], []
    for prefix, term, _ in weight.terms_of(entry):
        if term["codec"] in to_come:
            prefixes.append(prefix)
        else:
            known += [part.named(prefix) for part in weight._expand(term, shape)]
    if entry.rotation is not None:
        known += rotation.layout(entry.rotation, shape)
    known = [part.stacked(entry.shape[: entry.stack]) for part in known]
    rest = {name: part for name, part in case["parts"].items() if name not in listed(known)}
    assert listed(known) | rest == case["parts"]
    assert rest and all(name.startswith(tuple(prefixes)) for name in rest)
