"""The pages of ``spec/`` say what the code does: headings, tables, examples, rules, schema."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from qformat import checkpoint, codecs, conformance, dtypes, files, manifest, names, shards, weight
from qformat.layout import Part
from qformat.manifest import Entry
from qformat.records import read_record
from qformat.rotation import Side

SPEC = Path(__file__).resolve().parents[1] / "spec"
PAGES = sorted(SPEC.rglob("*.md"))
TEXTS = {page.relative_to(SPEC).as_posix(): page.read_text() for page in PAGES}
README = TEXTS["README.md"]
CASES = conformance.find()
HEADINGS = "Name, Parameters, Parts, Bit layout, Decode arithmetic, Validity, Example, Encoder, Sources, Changes".split(
    ", "
)
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RULE = re.compile(r"^\*\*([A-Z]\d+|[a-z][a-z0-9]*-\d+)\.\*\*", re.MULTILINE)
SCHEMA = manifest.schema()
ENTRY = SCHEMA["properties"]["entries"]["items"]


def section(page: str, heading: str) -> str:
    """The text under a heading of level 2 or 3, up to the next of its level or above."""
    found = re.search(rf"^(##+) {re.escape(heading)}\n(.*?)(?=^##? |\Z)", TEXTS[page], re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[2]


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    """Every table as rows from column name to cell."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = ([c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines())
        yield [dict(zip(head, row, strict=True)) for row in rows]


def table(page: str, heading: str, first: str) -> list[dict[str, str]]:
    """The table under a heading whose first row begins with ``first``."""
    return next(t for t in tables(section(page, heading)) if next(iter(t[0].values())) == first)


def ticked(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


# ---- codec pages


@pytest.mark.parametrize("codec", codecs.NAMES)
def test_headings_stand_in_their_order(codec: str) -> None:
    assert re.findall(r"^## (.*)$", TEXTS[f"codecs/{codec}.md"], re.MULTILINE) == HEADINGS
    assert section(f"codecs/{codec}.md", "Name").strip() == f"`{codec}`"


def test_every_codec_has_a_page_and_every_page_a_codec() -> None:
    assert {page.stem for page in (SPEC / "codecs").glob("*.md")} == set(codecs.NAMES)


def terms_of_schema() -> dict[str, dict[str, Any]]:
    return {term["properties"]["codec"]["const"]: term for term in ENTRY["properties"]["terms"]["items"]["oneOf"]}


def check_keys(rows: list[dict[str, str]], schema: dict[str, Any], known: tuple[str, ...]) -> None:
    """Names in order, defaults, and of the types all that a schema says."""
    key = next(iter(rows[0]))
    assert [ticked(row[key])[0] for row in rows] == list(known)
    for row in rows:
        name = ticked(row[key])[0]
        prop = schema["properties"][name]
        required = name in schema["required"]
        default = "required" if required else f"`{json.dumps(prop.get('default'))}`"
        assert row["default"] == default, name
        check_type(row["type"], prop, name)


def check_type(cell: str, prop: dict[str, Any], name: str) -> None:
    kinds = [kind for kind in prop.get("anyOf", [prop]) if kind != {"type": "null"}]
    values = [json.dumps(v) for kind in kinds for v in kind.get("enum", [kind["const"]] if "const" in kind else [])]
    if values:
        assert sorted(ticked(cell)) == sorted(values), name
    for kind in kinds:
        if "type" in kind:
            assert kind["type"].replace("array", "list").replace("object", "term" if values else "object") in cell, name
        low, high = kind.get("minItems"), kind.get("maxItems")
        if high is not None:
            expected = f"list of {low}" if low == high else f"{low} to {high}" if low else f"at most {high}"
            assert expected in cell, name
        number = {**kind, **(kind.get("prefixItems") or [kind.get("items") or {}])[0]} if high else kind
        top = number.get("maximum", number.get("exclusiveMaximum", 0) - 1)
        if 0 < top < 2**32:
            assert re.search(rf"{number['minimum']} to {top}\b", cell), name


@pytest.mark.parametrize("codec", codecs.NAMES)
def test_parameters_are_those_of_the_codec(codec: str) -> None:
    params = codecs.get(codec).Params
    rows = next(tables(section(f"codecs/{codec}.md", "Parameters")))
    check_keys(rows, terms_of_schema()[codec], params.__struct_fields__)


def terms_in_vectors() -> Iterator[tuple[str, codecs.Codec, Any, tuple[int, int]]]:
    """Every term of a vector that decodes, those of packed parts too, with the shape of its matrix."""
    for case in CASES:
        if case.facts.group != "invalid":
            for item in case.facts.entries:
                entry = read_record(Entry, item)
                for term in entry.terms:
                    plain = {key: value for key, value in term.items() if key != "outside"}
                    yield from terms_below(case.name, plain, weight.matrix_shape(entry))


def terms_below(
    case: str, term: dict[str, Any], shape: tuple[int, int]
) -> Iterator[tuple[str, codecs.Codec, Any, tuple[int, int]]]:
    codec, params = codecs.read_params(term)
    yield case, codec, params, shape
    for part in codec.layout(params, shape):
        if not isinstance(part.dtype, str):
            yield from terms_below(case, dict(part.dtype), (math.prod(part.shape[:-1]), part.shape[-1]))


def variables(params: Any, shape: tuple[int, int]) -> dict[str, Any]:
    """What the formulas of a page may name: the params, and the derived sizes that its text defines."""
    known = {name: getattr(params, name) for name in params.__struct_fields__}
    whole = known.get("view") or shape
    known |= {"rows": shape[0], "cols": shape[1], "R": whole[0], "C": whole[1], "ceil": math.ceil, "Fraction": Fraction}
    known["b"] = resolved(known["block"], whole)
    if "format" in known:
        known["bits"] = params.bits
    if "table_block" in known:
        known["t"] = resolved(known["table_block"], shape)
    if "books" in known:
        known["n"] = 8 // math.gcd(8, known["books"] * known["bits"])
    if "tile" in known:
        steps = known["tile"][0] * known["tile"][1] // known["V"]
        known["N"] = sum(known["V"] * known["bits"][u % len(known["bits"])] for u in range(steps))
    return known


def resolved(block: tuple[int, int], whole: tuple[int, int]) -> list[int]:
    return [full if one == -1 else min(one, full) for one, full in zip(block, whole, strict=True)]


def present(when: str, known: dict[str, Any]) -> bool:
    """``always``, or conditions that all hold: `x` given, `x` a dtype, `x` = word, `x`, not `x`."""

    def holds(condition: str) -> bool:
        name = ticked(condition)[0]
        value = known[name]
        rest = condition.replace(f"`{name}`", "").strip()
        if rest.startswith("="):
            return bool(value == rest[1:].strip())
        return {
            "given": value is not None,
            "a dtype": isinstance(value, str) and value in dtypes.NUMPY,
            "": bool(value),
            "not": not value,
        }[rest]

    return when == "always" or all(holds(condition) for condition in when.split(", "))


def run_along(cell: str, known: dict[str, Any]) -> tuple[int | None, Fraction]:
    """``axis 1, unit `8 / bits` `` -> (1, Fraction)."""
    if cell == "-":
        return None, Fraction(0)
    axis, unit = re.fullmatch(r"axis (\d), unit `(.*)`", cell).groups()  # type: ignore[union-attr]
    return int(axis), eval(unit, {"__builtins__": {}}, known | {"bits": fraction(known["bits"])})


def fraction(value: Any) -> Any:
    return Fraction(value) if isinstance(value, int) else value


def documented(page: str, params: Any, shape: tuple[int, int]) -> list[Part]:
    """The layout as the page has it."""
    known, parts = variables(params, shape), []
    for row in next(tables(section(page, "Parts"))):
        if not present(row["when"], known):
            continue
        name, dtype = ticked(row["name"])[0], ticked(row["dtype"])[0]
        size = eval(ticked(row["shape"])[0], {"__builtins__": {}}, known)
        out, out_unit = run_along(row["runs with rows"], known)
        along, in_unit = run_along(row["runs with columns"], known)
        # what the text below the table takes away
        block = known.get("table_block") if name == "table" else known["block"]
        if block is not None and name in ("scales", "zeros", "offsets", "table"):
            viewed = known.get("view") and name != "table"
            if viewed or block[0] == -1:
                out, out_unit = None, Fraction(0)
            if viewed or block[1] == -1 or known.get("groups"):
                along, in_unit = None, Fraction(0)
        shape_of = tuple(int(n) for n in size)
        parts.append(Part(name, known.get(dtype, dtype), shape_of, out, Fraction(out_unit), along, Fraction(in_unit)))
    return parts


@pytest.mark.parametrize("codec", codecs.NAMES)
def test_parts_are_those_of_the_layout(codec: str) -> None:
    page, seen, used = f"codecs/{codec}.md", set(), Counter[str]()
    for case, module, params, shape in terms_in_vectors():
        if codec == module.NAME:
            expected = module.layout(params, shape)
            assert documented(page, params, shape) == expected, case
            seen.add(case)
            used.update(part.name for part in expected)
    rows = {ticked(row["name"])[0] for row in next(tables(section(page, "Parts")))}
    assert len(seen) > 20 and set(used) == rows


# ---- README


@pytest.mark.parametrize(
    ("first", "heading", "schema", "kind"),
    [
        ("`quant_method`", "Manifest", SCHEMA, tuple(SCHEMA["properties"])),
        ("`weights`", "Manifest", ENTRY, Entry.__struct_fields__),
        ("`size`", "Rotation", SCHEMA["$defs"]["Side"], Side.__struct_fields__),
    ],
)
def test_keys_are_those_of_the_types(first: str, heading: str, schema: dict[str, Any], kind: tuple[str, ...]) -> None:
    rows = table("README.md", heading, first)
    known = {name: prop if prop.keys() - {"title"} else {} for name, prop in schema["properties"].items()}
    if first == "`quant_method`":  # written by hand in the schema, which does not say defaults
        assert tuple(ticked(row["key"])[0] for row in rows) == kind
        assert [row["default"] == "required" for row in rows] == [name in schema["required"] for name in kind]
        return
    known["terms"] = {"type": "array", "maxItems": 16, "default": []}
    if "rotation" in known:
        known["rotation"] = {"anyOf": [{"type": "object"}, {"type": "null"}], "default": None}
        known["stored_shape"] = {"anyOf": [{"type": "array"}, {"type": "null"}], "default": None}
    check_keys(rows, {"properties": known, "required": schema["required"]}, kind)


def test_labels_are_those_of_the_type() -> None:
    rows = table("README.md", "Manifest", "`bit-exact`")
    assert sorted(ticked(row["label"])[0] for row in rows) == sorted(ENTRY["properties"]["label"]["enum"])


def test_fates_of_files_are_those_of_the_code() -> None:
    rows = {row["fate"]: ticked(row["files"]) for row in table("README.md", "A model folder", "read")}
    assert rows["read"] == [files.CONFIG, files.INDEX, *files.SETTINGS]
    assert rows["copied byte for byte"] == list(files.COPIED)
    assert rows["left out, and reported"] == list(files.SECOND_COPIES)
    for name, fate in (
        ("tokenizer.json", "copied"),
        ("additional_chat_templates/tools.jinja", "copied"),
        ("sub/tokenizer.json", "left out"),
        ("quantize_config.json", "left out"),
        ("pytorch_model.bin", "left out"),
        ("notes.txt", "left out"),
        ("config.json", "read"),
    ):
        assert files._fate(name, False)[0] == fate, name


def test_dtypes_are_those_of_the_code() -> None:
    found: dict[str, tuple[str, int]] = {}
    for row in table("README.md", "A safetensors file", "`uint8` `uint16` `uint32` `uint64`"):
        sizes = [int(n) for n in row["bytes"].split()]
        ours = ticked(row["dtype here"])
        sizes = sizes * (len(ours) // len(sizes))
        found |= dict(zip(ours, zip(ticked(row["dtype in the header"]), sizes, strict=True), strict=True))
    for name, (tag, size) in found.items():
        assert (dtypes.SAFETENSORS[name], dtypes.NUMPY[name].itemsize) == (tag, size)
    used = {
        p.dtype
        for _, module, params, shape in terms_in_vectors()
        for p in module.layout(params, shape)
        if isinstance(p.dtype, str)
    }
    assert used <= found.keys()
    (others,) = re.findall(r"Dense tensors, but no part, may have others, too: (.*?)\.", README, re.DOTALL)
    bits = {tag: 8 * size for tag, size in found.values()}
    for tags, number in re.findall(r"((?:`\w+`\s)+)of\s(\d+)", others):
        bits |= dict.fromkeys(ticked(tags), int(number))
    assert bits == shards._BITS


def test_pickles_are_those_of_the_code() -> None:
    assert [kind for kind in ticked(rules()["F9"]) if kind.startswith("*")] == list(files.PICKLES)
    assert files.POINTER.decode() in ticked(rules()["F9"])


def test_limits_are_those_of_the_code() -> None:
    rows = {row[""]: row["at most"] for row in table("README.md", "Limits", "header of a file")}
    assert rows["header of a file"] == f"{shards.MAX_HEADER:,} bytes".replace(",", " ")
    assert rows["ranges in one pattern"] == str(names.MAX_RANGES)
    assert rows["levels of packed parts"] == str(codecs.MAX_NESTING)
    assert rows["terms"] == str(ENTRY["properties"]["terms"]["maxItems"])
    shape = ENTRY["properties"]["shape"]
    assert rows["axes of `shape`"] == f"{shape['maxItems']}, each at most 2^40" and shape["items"]["maximum"] == 2**40
    assert names.count("{0..999999999}") == 10**9
    with pytest.raises(checkpoint.DamagedError):
        names.count("{0..1000000000}")


def test_the_hex_dump_is_that_of_its_file() -> None:
    from scripts.vectors.files import dump

    (shown,) = (text for kind, text in FENCE.findall(README) if kind == "hexdump")
    path = SPEC / "vectors" / "files" / "example" / "input.safetensors"
    assert shown.splitlines() == dump(path)
    rows = re.findall(r"^[0-9a-f]{8}  ((?:[0-9a-f]{2} ?)+)", shown, re.MULTILINE)
    assert bytes.fromhex("".join(rows)) == path.read_bytes()


# ---- all pages


def test_every_fence_is_of_a_kind_that_is_checked() -> None:
    kinds = Counter(kind for text in TEXTS.values() for kind, _ in FENCE.findall(text))
    assert {kind.split()[0] if kind else "" for kind in kinds} <= {"json", "python", "hexdump", "text"}
    assert {" ".join(kind.split()[:2]) for kind in kinds if kind.startswith("json")} == {
        "json manifest",
        "json example",
    }


@pytest.mark.parametrize("page", TEXTS)
def test_python_examples_run(page: str) -> None:
    for kind, code in FENCE.findall(TEXTS[page]):
        if kind == "python":
            exec(compile(code, page, "exec"), {})


def test_the_manifest_example_is_one() -> None:
    (text,) = (text for kind, text in FENCE.findall(README) if kind == "json manifest")
    read = manifest.read(json.loads(text))
    assert len(read.names(limit=7)) == 7
    for entry in read.entries:
        assert weight.layout(entry)
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("codec", codecs.NAMES)
def test_the_example_of_a_page_is_a_vector(codec: str) -> None:
    ((kind, text),) = (f for f in FENCE.findall(section(f"codecs/{codec}.md", "Example")) if f[0].startswith("json"))
    shown, case = json.loads(text), next(case for case in CASES if case.name == kind.split()[2])
    assert case.name == f"{codec}/example" and [shown["entry"]] == list(case.facts.entries)
    (opened,) = checkpoint.open(case.input).values()
    assert {name: array.tobytes() for name, array in opened.parts.items()} == {
        name: bytes.fromhex(text) for name, text in shown["parts"].items()
    }
    if "values" in shown:
        assert np.array_equal(np.array(shown["values"], np.float32), case.expected("weight"))


def test_the_trellis_example_shows_true_states() -> None:
    case = next(case for case in CASES if case.name == "trellis/example")
    values = case.expected("weight").ravel()
    rows = next(tables(section("codecs/trellis.md", "Example")))
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 31]
    for row in rows:
        assert float(row["value"].rpartition("= ")[2]) == pytest.approx(values[int(row["step"])], rel=1e-7)


def test_the_hashes_are_those_that_the_encoder_takes() -> None:
    (rows,) = tables(section("codecs/trellis.md", "Encoder"))
    shown = {row["bits"]: row for row in rows}
    for bits in (2, 3, 4):
        params, row = codecs.get("trellis").preset(bits, False, {}), shown[str(bits)]
        assert params["L"] == int(row["`L`"]) and params["shift"] == int(row["`shift`"])
        assert params["taps"] == [int(n) for n in row["`taps`"].split(", ")]
        assert params["index"] == [int(n) for n in row["`index`"].split(", ")]
        assert params.get("additive", False) == (row["`additive`"] == "yes")
        assert params["table"] == ticked(row["`table`"])[0] and params["order"] == ticked(row["`order`"])[0]


def rules() -> dict[str, str]:
    """Id -> the text of the rule, up to the next rule or heading."""
    found: dict[str, str] = {}
    for text in TEXTS.values():
        bare = FENCE.sub("", text)
        for match in RULE.finditer(bare):
            end = re.compile(r"^(?:\*\*|#|$)", re.MULTILINE).search(bare, match.end())
            assert match[1] not in found, match[1]
            found[match[1]] = bare[match.start() : end.start() if end else None]
    return found


def test_every_rule_has_a_vector_and_every_vector_its_rules() -> None:
    cited = Counter(rule for case in CASES for rule in case.facts.rules)
    assert set(cited) == set(rules())
    for codec in codecs.NAMES:
        own = [case for case in CASES if case.codec == codec]
        assert all(case.facts.rules for case in own) and len(own) > 20


def test_must_and_may_stand_in_rules_alone() -> None:
    whole = "\n".join(FENCE.sub("", text) for text in TEXTS.values())
    words = re.compile(r"\b(MUST|MAY|SHALL|SHOULD|REQUIRED|OPTIONAL)\b")
    outside = whole.replace("The words MUST, MUST NOT and MAY are those of RFC 2119.", "")
    for text in rules().values():
        assert words.search(text), text
        outside = outside.replace(text, "")
    assert not words.search(outside)


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[page]):
        path, _, anchor = target.partition("#")
        file = ((SPEC / page).parent / path).resolve() if path else SPEC / page
        assert file.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


# ---- the schema


def test_the_schema_is_that_of_the_types() -> None:
    stored = json.loads((SPEC / "manifest.schema.json").read_text())
    assert stored == SCHEMA
    jsonschema.Draft202012Validator.check_schema(stored)


def settings_of(case: conformance.Case) -> Any:
    return json.loads(shards.Shard(case.input).metadata[checkpoint.KEY])


def test_the_schema_takes_every_valid_manifest() -> None:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for case in CASES:
        if case.facts.group != "invalid" and case.input.is_file():
            assert not list(validator.iter_errors(settings_of(case))), case.name


def test_the_schema_refuses_what_a_schema_can() -> None:
    """Unknown keys, codecs and versions, wrong types and ranges."""
    validator = jsonschema.Draft202012Validator(SCHEMA)
    can = [
        case
        for case in CASES
        if case.facts.group == "invalid"
        and {"M1", "M2", "M3", "M4"} & set(case.facts.rules)
        and not case.name.startswith(("values/invalid-packed", "manifest/invalid-float-for-integer"))
        and case.name != "int/invalid-zero-infinite"  # Infinity is not JSON
    ]
    assert len(can) > 15
    for case in can:
        assert list(validator.iter_errors(settings_of(case))), case.name
