"""Vectors of the manifest and of part names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from qformat import names

from .case import NAME, WIDE, Draft, entry, fill, refused, write_file
from .files import with_tensors

INT = {"codec": "int", "bits": 4, "block": [1, 8], "zero": 8}
SHAPE = (3, 8)


def drafts() -> Iterator[Draft]:
    yield from _valid()
    yield from _parts()
    yield from _versions()
    yield from _entries()
    yield from _names()
    yield from _concat()
    yield from _pieces()


def several(name: str, what: str, rules: str, patterns: list[str], names: list[str], **keys: Any) -> Draft:
    """One entry for several weights, each with its own parts."""
    item = entry(INT, SHAPE)
    item["weights"] = patterns
    tensors = {f"{w}_{part}": a for w in names for part, a in fill(f"{name}/{w}", entry(INT, SHAPE)).items()}
    return Draft(
        name,
        what,
        tuple(rules.split()),
        lambda folder: write_file(folder / "input.safetensors", tensors, [item], **keys),
        entries=(item,),
    )


def _valid() -> Iterator[Draft]:
    names = [f"l.{i}.{side}" for i in range(9, 12) for side in ("up", "down")]
    yield several("manifest/pattern", "patterns of layers 9 to 11", "M5", ["l.{9..11}.up", "l.{9..11}.down"], names)
    pairs = [f"l.{i}.experts.{j}.w" for i in range(2) for j in range(2, 4)]
    yield several(
        "manifest/pattern-product", "two pairs of braces: their product", "M5", ["l.{0..1}.experts.{2..3}.w"], pairs
    )
    yield several(
        "manifest/alias", "a tied weight under its second name", "M6", ["a.w"], ["a.w"], aliases={"b.w": "a.w"}
    )
    extra = {
        "activations": {"bits": 8},
        "kv_cache": None,
        "provenance": {"any": ["thing", 1.5]},
        "x-note": {"unknown": True},
    }
    yield several(
        "manifest/unknown-top-level", "keys of the top level that no version knows", "M2", ["w"], ["w"], **extra
    )

    counted = {"tensors": 3, "consumed": 1, "passed": 1, "left_out": ["rope"]}
    yield several("manifest/source", "where tensors went", "M11", ["w"], ["w"], provenance={"source": counted})
    counted["passed"] = 2
    what = "counts that do not add up, which a reader may leave unchecked"
    wrong = several("manifest/source-counts", what, "M11", ["w"], ["w"], provenance={"source": counted})
    yield replace(wrong, group="optional", error="damaged")


def _parts() -> Iterator[Draft]:
    item = entry(INT, SHAPE)
    whole = {f"{NAME}_{part}": array for part, array in fill("manifest/parts", item).items()}

    def bad(
        name: str, what: str, rules: str, tensors: dict[str, Any], items: list[dict[str, Any]] | None = None
    ) -> Draft:
        return with_tensors(f"manifest/invalid-{name}", what, rules, tensors, items or [item], error="damaged")

    scales = whole[f"{NAME}_scales"]
    yield bad("part-missing", "no scales", "P2", {k: v for k, v in whole.items() if k != f"{NAME}_scales"})
    yield bad(
        "part-dtype",
        "scales of another dtype than the params say",
        "P2",
        {**whole, f"{NAME}_scales": scales.astype(np.float32)},
    )
    yield bad("part-shape", "scales of another shape", "P2", {**whole, f"{NAME}_scales": scales.reshape(1, 3)})
    codes = whole[f"{NAME}_codes"]
    yield bad("part-short", "codes that are a byte short", "P2", {**whole, f"{NAME}_codes": codes[:, :-1].copy()})
    other = {**item, "weights": [f"{NAME}_codes"]}
    both = {**whole, **{f"{NAME}_codes_{part}": array for part, array in fill("manifest/other", item).items()}}
    bias = {**whole, f"{NAME}_bias": np.zeros(SHAPE[0], np.float16)}
    yield with_tensors("manifest/bias", "a tensor of its own whose name begins like a part's", "P3", bias, [item])
    dense = {**whole, NAME: np.zeros(SHAPE, np.float16)}
    yield bad("weight-dense-too", "a tensor with the name of a packed weight", "P3", dense)
    yield bad("part-is-weight", "a weight has the name of another one's part", "P3", both, [item, other])


def _versions() -> Iterator[Draft]:
    item = entry(INT, SHAPE)

    def bad(name: str, what: str, rules: str, error: str = "damaged", **keys: Any) -> Draft:
        return refused(f"manifest/invalid-{name}", what, rules, item, like=item, error=error, **keys)

    yield bad("version-major", "a later major version", "M1", "unsupported", version="1.0")
    yield bad("version-minor", "another minor version of 0", "M1", "unsupported", version="0.2")
    yield bad("version-number", "a version that is a number", "M1", "unsupported", version=0.1)
    yield bad("method", "another quant_method", "M1", quant_method="gptq")
    yield bad("entries", "entries that are no list", "M4", entries={"0": item})
    yield bad("aliases", "an alias of a number", "M6", aliases={"a": 1})
    yield bad("alias-unknown", "an alias of no weight", "M6", aliases={"a": "b"})
    yield bad("alias-alias", "an alias of an alias", "M6", aliases={"a": NAME, "b": "a"})
    yield bad("alias-tensor", "an alias with the name of a part", "M6 P3", aliases={f"{NAME}_codes": NAME})
    counts = {"tensors": 1, "consumed": 1, "passed": 0, "left_out": []}
    yield bad("source", "a source without its counts", "M11", provenance={"source": {"tensors": 1}})
    yield bad("source-key", "a source with a key more", "M11", provenance={"source": {**counts, "lost": 0}})
    tensors = {f"{NAME}_{part}": array for part, array in fill("manifest/twice", item).items()}
    bare = json.dumps({"quant_method": "qformat", "entries": [item]})
    yield with_tensors("manifest/invalid-version-absent", "no version", "M1", tensors, bare, error="unsupported")
    text = json.dumps({"quant_method": "qformat", "version": "0.1", "entries": [item]})
    twice = text.replace('"bits": 4', '"bits": 4, "bits": 4')
    yield with_tensors(
        "manifest/invalid-key-twice", "a key twice, with equal values", "F4", tensors, twice, error="damaged"
    )


def _entries() -> Iterator[Draft]:
    item = entry(INT, SHAPE)

    def bad(name: str, what: str, rules: str, error: str = "damaged", **keys: Any) -> Draft:
        return refused(f"manifest/invalid-{name}", what, rules, {**item, **keys}, like=item, error=error)

    yield bad("unknown-key-entry", "an unknown key of an entry", "M2", colour="red")
    yield bad("unknown-key-term", "an unknown key of a term", "M2", terms=[{**INT, "colour": "red"}])
    yield bad("unknown-key-rotation", "an unknown side", "M2", rotation={"up": {"size": 1}})
    yield bad("unknown-key-side", "an unknown key of a side", "M2", rotation={"in": {"angle": 1}})
    yield bad("unknown-codec", "a codec that this version does not have", "M3", "unsupported", terms=[{"codec": "e9p"}])
    yield bad("no-codec", "a term without a codec", "M4", terms=[{"bits": 4}])
    yield bad("float-for-integer", "bits of 4.0", "M4", terms=[{**INT, "bits": 4.0}])
    yield bad("true-for-integer", "bits of true", "M4", terms=[{**INT, "bits": True}])
    yield bad("no-terms", "no terms", "M4", terms=[])
    yield bad("terms-17", "seventeen terms", "M4 L1", terms=[INT] * 17)
    yield bad("shape-of-9", "nine axes", "M4 L1", shape=[1] * 7 + [3, 8], stack=0)
    yield bad("dtype", "a dtype that weights do not have", "M4", dtype="int8")
    yield bad("label", "an unknown label", "M4", label="perfect")
    yield bad("shape-zero", "an axis of length 0", "M4", shape=[0, 8])
    yield bad("shape-of-1", "a vector", "M7", shape=[24])
    yield bad("stack-too-deep", "a stack of one axis that leaves one", "M7", stack=1)
    yield bad("transposed-conv", "a transposed weight with two axes after out", "M7", shape=[3, 4, 2], transposed=True)
    yield bad("stored-smaller", "a stored_shape smaller than shape", "M8", stored_shape=[3, 7])
    yield bad("stored-conv", "a stored_shape of a convolution", "M8", shape=[3, 4, 2], stored_shape=[3, 4, 2])
    yield bad("stored-rank", "a stored_shape with an axis more", "M8", stored_shape=[1, 3, 8])
    yield bad(
        "stored-stack", "a stored_shape that pads the stack", "M8", shape=[1, 3, 8], stack=1, stored_shape=[2, 3, 8]
    )


def _names() -> Iterator[Draft]:
    item = entry(INT, SHAPE)

    def bad(name: str, what: str, patterns: list[str], rules: str = "M5") -> Draft:
        return refused(f"manifest/invalid-{name}", what, rules, {**item, "weights": patterns}, like=item)

    yield bad("no-weights", "an entry of no weights", [])
    yield bad("weight-twice", "one name by two patterns", [NAME, NAME])
    yield bad("braces-billions", "a pattern of 10^36 names", ["{0..999999999}" * 4], "M5 L1")
    yield bad("ranges-nine", "nine ranges in a pattern", ["{1..1}" * 9], "L1")
    yield bad("braces-down", "a range that ends before it starts", ["w.{3..1}"])
    yield bad("braces-zeros", "a number with a leading zero", ["w.{00..01}"])
    yield bad("braces-open", "a brace that is no range", ["w.{a}"])
    twice = [item, {**item, "label": "rounded"}]
    yield refused("manifest/invalid-weight-in-two", "one name in two entries", "M5", twice, like=item)


def _concat() -> Iterator[Draft]:
    whole = ["l.{0..1}.gate_up"]
    pieces = [{"weights": ["l.{0..1}.gate"], "rows": 1}, {"weights": ["l.0.up", "l.1.up"], "rows": 2}]
    gate, up = pieces
    item = {**entry(INT, SHAPE), "weights": whole, "concat": pieces}

    def tensors(name: str, of: dict[str, Any]) -> dict[str, Any]:
        like = {key: value for key, value in of.items() if key != "concat"}
        each = enumerate(names.expand(of["weights"], 9))
        return {f"{weight}_{part}": a for i, weight in each for part, a in fill(f"{name}/{i}", like).items()}

    def case(name: str, what: str, of: dict[str, Any], rules: str = "M9", **keys: Any) -> Draft:
        held = tensors(name, of)
        return Draft(
            name,
            what,
            tuple(rules.split()),
            lambda folder: write_file(folder / "input.safetensors", held, [of]),
            entries=(of,),
            **keys,
        )

    yield case("manifest/concat", "two weights, each with two of the model's in it", item)
    turned = {**item, "rotation": {"out": {"scale": "float16"}, "in": {"size": 8}}}
    placed = [{**gate, "weights": ["{0..1}.{0..1}.gate"]}, {**up, "weights": ["up.d", "up.c", "up.b", "up.a"]}]
    order = {**item, "weights": ["l.{0..1}.{0..1}.gate_up"], "concat": placed}
    yield case(
        "manifest/concat-order", "names of two ranges belong with those in the same place of a list", order, "M5 M9"
    )
    stacked = {**item, "shape": [3, 2, 8], "stack": 1}
    yield case("manifest/concat-stack", "matrices of a stack are the model's, one and two", stacked)
    yield case("manifest/concat-rotated", "weights of the model within rotated ones", turned, tolerance=WIDE)

    def bad(name: str, what: str, *wrong: dict[str, Any], dense: str = "", rules: str = "M9") -> Draft:
        held = tensors(f"manifest/{name}", item)
        held |= {dense: np.zeros((1, 8), np.float16)} if dense else {}
        broken = [{**item, "concat": list(wrong)}]
        return with_tensors(f"manifest/invalid-concat-{name}", what, rules, held, broken, error="damaged")

    yield bad("rows", "pieces of fewer rows than the weight", gate, {**up, "rows": 1})
    yield bad("rows-zero", "a piece of no rows", {**gate, "rows": 0}, {**up, "rows": 3}, rules="M4 M9")
    yield bad("count", "a piece with fewer names than there are weights", gate, {**up, "weights": ["l.0.up"]})
    yield bad("twice", "one name in two pieces", gate, {**up, "weights": ["l.{0..1}.gate"]})
    yield bad("whole", "a piece with the name of the whole", gate, {**up, "weights": whole})
    yield bad("tensor", "a piece with the name of a tensor", gate, up, dense="l.0.up")
    yield bad("key", "an unknown key of a piece", gate, {**up, "columns": 8}, rules="M2 M9")


def _pieces() -> Iterator[Draft]:
    """A weight in pieces of other bits; one whose matrices were packed one by one; what none may be."""
    finer = {"codec": "int", "bits": 8, "block": [1, 8], "scales": "float32", "zeros": "uint8"}
    first, second = {**entry(INT, (3, 16)), "weights": ["w.0"]}, {**entry(finer, (2, 16)), "weights": ["w.1"]}
    whole = {
        "weights": ["w"],
        "shape": [5, 16],
        "dtype": "float16",
        "pieces": [{"weights": ["w.0"]}, {"weights": ["w.1"]}],
    }
    yield _composed("rows", "rows of 4 bits above rows of 8", [whole, first, second], slices=ROWS)
    beside = [{**whole, "shape": [3, 24], "axis": 1}, first, {**second, "shape": [3, 8]}]
    yield _composed("columns", "columns of 4 bits beside columns of 8", beside, slices=COLUMNS)
    experts = [
        {**whole, "weights": ["l.{0..1}.e"], "shape": [2, 3, 8], "pieces": [{"weights": ["l.{0..1}.e.0"]}]},
        {**first, "weights": ["l.{0..1}.e.0", "l.1.e.1", "l.0.e.1"], "shape": [1, 3, 8], "stack": 1},
    ]
    experts[0]["pieces"] += [{"weights": ["l.0.e.1", "l.1.e.1"]}]
    yield _composed("stack", "two weights of two matrices each, packed one by one", experts)
    turned = [whole, {**first, "rotation": {"in": {"size": 8}}}, second]
    yield _composed("rotated", "a piece within a rotation beside one without", turned, tolerance=WIDE)
    scales = {**finer, "scales": {**finer, "scales": finer}}
    odd = {**second, "terms": [scales]}
    yield _composed("optional", "a piece that a decoder may refuse", [whole, first, odd], group="optional", rules="O1")

    def bad(name: str, what: str, changes: dict[str, Any], *more: dict[str, Any], **keys: Any) -> Draft:
        items = [{**whole, **changes}, first, second, *more]
        return _composed(f"invalid-{name}", what, items, stored=(first, second), group="invalid", **keys)

    one, other = whole["pieces"]
    yield bad("rows", "pieces of fewer rows than the weight", {"shape": [6, 16]})
    yield bad("columns", "pieces of fewer columns than the weight", {"shape": [5, 17]})
    yield bad("rank", "pieces with an axis less than the weight", {"shape": [5, 4, 4]})
    yield bad("axis", "an axis that the weight does not have", {"axis": 2})
    yield bad("axis-negative", "a negative axis", {"axis": -1}, rules="M4")
    yield bad("terms", "pieces and terms", {"terms": [INT]})
    yield bad("stack", "pieces and a stack", {"stack": 1, "shape": [1, 5, 16]})
    yield bad("label", "pieces and a label", {"label": "rounded"})
    yield bad("count", "a piece with more names than there are weights", {"pieces": [one, {"weights": ["w.1", "w.0"]}]})
    yield bad("unknown", "a piece that has no entry", {"pieces": [one, {"weights": ["w.2"]}]})
    yield bad("itself", "a piece that is the weight itself", {"pieces": [{"weights": ["w"]}]})
    yield bad("twice", "a piece that stands twice", {"shape": [6, 16], "pieces": [one, one]})
    yield bad("shared", "a piece of two weights", {}, {**whole, "weights": ["x"]})
    yield bad("key", "an unknown key of a piece", {"pieces": [one, {**other, "rows": 2}]}, rules="M2")
    yield bad("tensor", "a weight in pieces with the name of a tensor", {}, dense="w")
    yield bad("part", "a weight in pieces with the name of a part", {"weights": ["w.0_codes"]}, rules="P3")
    yield bad("none", "an entry with neither terms nor pieces", {"pieces": []})
    for key, what, wrong in (
        ("concat", "a piece of which others are rows", [whole, {**first, "concat": [{"weights": ["q"], "rows": 3}]}]),
        ("axis-alone", "an axis without pieces", [{**first, "axis": 1}]),
    ):
        yield _composed(f"invalid-{key}", what, [*wrong, second], stored=(first, second), group="invalid")


ROWS = ({"axis": 0, "start": 1, "stop": 4}, {"axis": 0, "start": 3, "stop": 5}, {"axis": 1, "start": 8, "stop": 16})
COLUMNS = (
    {"axis": 1, "start": 8, "stop": 24},
    {"axis": 0, "start": 1, "stop": 2},
    {"axis": 1, "start": 4, "stop": 24, "error": "unsupported"},
)


def _composed(
    name: str,
    what: str,
    items: list[dict[str, Any]],
    *,
    stored: tuple[dict[str, Any], ...] = (),
    rules: str = "",
    dense: str = "",
    **keys: Any,
) -> Draft:
    """A case of M10. ``stored``: entries of which the file has the parts, by default all of ``items`` with terms."""
    held = {
        f"{weight}_{part}": array
        for item in stored or [item for item in items if "terms" in item]
        for weight in names.expand(item["weights"], 9)
        for part, array in fill(f"manifest/pieces-{name}/{weight}", item).items()
    }
    held |= {dense: np.zeros((5, 16), np.float16)} if dense else {}
    error = {"invalid": "damaged", "optional": "unsupported"}.get(keys.get("group", ""))
    return Draft(
        f"manifest/{'pieces-' + name if 'invalid' not in name else name.replace('invalid-', 'invalid-pieces-')}",
        what,
        tuple(f"M10 {rules}".split()),
        lambda folder: write_file(folder / "input.safetensors", held, items),
        entries=tuple(items),
        **({"error": error} if error else {}),
        **keys,
    )
