"""The manifest: what is read, what is refused, what is written."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import e8p_terms, entry, float_terms, int_terms, table_terms, trellis_terms

from qformat import manifest, weight
from qformat.errors import DamagedError, QformatError, UnsupportedError
from qformat.records import write_record

TERM = {"codec": "int", "bits": 4, "zero": 8}


def one(**fields: Any) -> dict[str, Any]:
    return {"weights": ["l.0.w"], "shape": [4, 64], "dtype": "float16", "terms": [TERM], **fields}


def whole(*entries: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"quant_method": "qformat", "version": manifest.VERSION, "entries": list(entries), **fields}


terms = st.one_of(e8p_terms((8, 8)), float_terms((8, 8)), int_terms((8, 8)), table_terms((8, 8)), trellis_terms())
SCHEMA = jsonschema.Draft202012Validator(manifest.schema())


@settings(max_examples=30)
@given(st.lists(terms, min_size=1, max_size=3), st.booleans())
def test_what_is_written_reads_back_and_fits_the_schema(terms: list[dict[str, Any]], outside: bool) -> None:
    if outside and len(terms) > 1:
        terms[-1] = {**terms[-1], "outside": True}
    text = json.dumps(whole(one(terms=terms, label="bit-exact", stored_shape=[8, 64]), kv_cache={"a": 1}, later=[2]))
    found = manifest.read(json.loads(text))
    again = manifest.write(found)
    assert manifest.read(json.loads(json.dumps(again))) == found
    assert again["kv_cache"] == {"a": 1} and again["later"] == [2]
    SCHEMA.validate(json.loads(json.dumps(again)))


BAD: list[tuple[dict[str, Any], type[QformatError], str]] = [
    (whole(quant_method="gptq"), DamagedError, "quant_method"),
    (whole(version="0.2"), UnsupportedError, "version 0.1, found '0.2'"),
    (whole(version="1.0"), UnsupportedError, "version"),
    (whole(version=0.1), UnsupportedError, "version"),
    (whole(version=None), UnsupportedError, "version"),
    (whole(entries={}), DamagedError, "list of entries, found dict"),
    (whole(entries=None), DamagedError, "list of entries"),
    (whole([]), DamagedError, "entry as an object, found list"),  # type: ignore[arg-type]
    (whole(aliases=[]), DamagedError, "aliases as an object, found list"),
    (whole(aliases={"a": 1}), DamagedError, "a: .*found 1"),
    (whole(provenance=[]), DamagedError, "provenance as an object"),
    (whole(provenance={"source": []}), DamagedError, "provenance.source as an object"),
    (whole(provenance={"source": {"tensors": 1, "consumed": 1, "passed": 0}}), DamagedError, "key `left_out`"),
    (
        whole(provenance={"source": {"tensors": -1, "consumed": 1, "passed": 0, "left_out": []}}),
        DamagedError,
        "`int` >= 0 at `\\$.tensors`, found -1",
    ),
    (whole(one(extra=1)), DamagedError, "l.0.w: expected known keys, found `extra`"),
    (whole(one(terms=[{**TERM, "extra": 1}])), DamagedError, "l.0.w: expected known keys, found `extra`"),
    (whole(one(rotation={"in": {"twist": 1}})), DamagedError, "known keys at `\\$.rotation.in`, found `twist`"),
    (whole(one(rotation={"up": {}})), DamagedError, "known keys at `\\$.rotation`, found `up`"),
    (whole(one(weights=[])), DamagedError, "length >= 1"),
    (whole(one(weights=[5])), DamagedError, "`str` at `\\$.weights\\[0\\]`, found `int`"),
    (whole(one(weights="w")), DamagedError, "`array` at `\\$.weights`, found `str`"),
    (whole(one(shape=[64])), DamagedError, "length >= 2"),
    (whole(one(shape=[4, 0])), DamagedError, "`int` >= 1 at `\\$.shape\\[1\\]`, found 0"),
    (whole(one(shape=[4, 2**41])), DamagedError, "found 2199023255552"),
    (whole(one(shape=[4, True])), DamagedError, "`int` at `\\$.shape\\[1\\]`, found `bool`"),
    (whole(one(shape=[4, 64.0])), DamagedError, "found `float`"),
    (whole(one(dtype="float8")), DamagedError, "known value at `\\$.dtype`, found 'float8'"),
    (whole(one(terms=[])), DamagedError, "terms or pieces, found none"),
    (whole(one(terms=[TERM] * 17)), DamagedError, "length <= 16"),
    (whole(one(terms=[{"bits": 4}])), DamagedError, "name of a codec, found None"),
    (whole(one(terms=[{"codec": 4}])), DamagedError, "name of a codec, found 4"),
    (whole(one(terms=[{"codec": "turbo"}])), UnsupportedError, "l.0.w: .*found 'turbo'"),
    (whole(one(terms=[{"codec": "../int", "bits": 4}])), UnsupportedError, "found '../int'"),
    (whole(one(terms=[{"codec": "_trellis_codes"}])), UnsupportedError, "codecs"),
    (whole(one(terms=[{**TERM, "scales": {"codec": "turbo"}}])), UnsupportedError, "found 'turbo'"),
    (whole(one(terms=[{**TERM, "scales": {"codec": "int", "bits": 9}}])), DamagedError, "<= 8"),
    (whole(one(terms=[{"codec": "int"}])), DamagedError, "key `bits`, found none"),
    (whole(one(terms=[{**TERM, "outside": True}])), DamagedError, "a term inside the rotation, found none"),
    (whole(one(terms=[TERM, {**TERM, "outside": 1}])), DamagedError, "outside true or false, found 1"),
    (whole(one(stack=-1)), DamagedError, ">= 0"),
    (whole(one(stack=1)), DamagedError, "1 leading axes"),
    (whole(one(shape=[4, 4, 3, 3], transposed=True)), DamagedError, "transposed weights with one axis in"),
    (whole(one(stored_shape=[4, 32])), DamagedError, "stored_shape that pads \\[4, 64\\], found \\[4, 32\\]"),
    (whole(one(stored_shape=[4, 64, 64])), DamagedError, "stored_shape that pads"),
    (whole(one(stack=1, shape=[2, 4, 64], stored_shape=[3, 4, 64])), DamagedError, "stored_shape that pads"),
    (whole(one(shape=[4, 4, 3, 3], stored_shape=[4, 8, 3, 3])), DamagedError, "stored_shape that pads"),
    ([], DamagedError, "quant_method"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("data", "kind", "message"), BAD, ids=range(len(BAD)))
def test_what_is_refused(data: dict[str, Any], kind: type[QformatError], message: str) -> None:
    with pytest.raises(QformatError, match=message) as caught:
        manifest.read(data)
    assert type(caught.value) is kind and caught.value.found


def test_unknown_keys_at_the_top_and_in_provenance_are_kept() -> None:
    found = manifest.read(whole(one(), later={"a": 1}, provenance={"later": 2}))
    written = manifest.write(found)
    assert written["later"] == {"a": 1} and written["provenance"] == {"later": 2}


def test_at_most_two_levels_of_packed_parts() -> None:
    deepest: dict[str, Any] = {"codec": "int", "bits": 8}
    two = {"codec": "int", "bits": 8, "scales": {**deepest, "scales": deepest}}
    manifest.read(whole(one(terms=[two])))
    with pytest.raises(DamagedError, match="at most 2 levels"):
        manifest.read(whole(one(terms=[{"codec": "int", "bits": 8, "scales": two}])))


def test_weights_have_one_entry_each() -> None:
    found = manifest.read(whole(one(weights=["a", "b{0..2}"]), one(weights=["b1"])))
    with pytest.raises(DamagedError, match="b1: expected every weight in one entry, found in two"):
        found.names(limit=10)
    with pytest.raises(DamagedError, match="at most 3 weights, found 3 more"):
        found.names(limit=3)


def test_a_huge_shape_costs_nothing() -> None:
    found = manifest.read(whole(one(shape=[2**40] * 8, stack=4, rotation={"in": {"size": 2**40, "scale": "int8"}})))
    sizes = {part.name: part.nbytes for part in weight.layout(found.entries[0])}
    assert sizes["codes"] == 2 ** (8 * 40) // 2
    assert sizes["in_scale"] == 2 ** (4 * 40) * 2 ** (3 * 40)


def test_alike_weights_share_an_entry() -> None:
    weights = [(f"l.{i}.{kind}", entry((4, 64), TERM)) for i in range(9) for kind in ("up", "gate")]
    weights += [("l.0.down", entry((64, 4), TERM))]
    entries = manifest.group(weights)
    assert sorted(tuple(one.weights) for one in entries) == [
        ("l.0.down",),
        ("l.{0..8}.gate", "l.{0..8}.up"),
    ]
    assert {name: write_record(one)["shape"] for name, one in manifest.Manifest(entries=entries).names(19).items()} == {
        name: write_record(one)["shape"] for name, one in weights
    }
