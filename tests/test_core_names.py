"""Patterns of names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qformat import names
from qformat.errors import DamagedError

piece = st.one_of(
    st.integers(0, 12).map(str), st.sampled_from(["layers", "mlp.experts", ".", "w", "-", "ö", "007", "9" * 20])
)
name = st.lists(piece, min_size=1, max_size=7).map("".join)


@given(st.lists(name, max_size=40, unique=True))
def test_expand_undoes_compress(found: list[str]) -> None:
    patterns = names.compress(found)
    expanded = names.expand(patterns, len(found))
    assert sorted(expanded) == sorted(found)  # each of them, each once
    assert len(patterns) <= len(found)


def test_experts_of_layers_are_one_pattern() -> None:
    found = [f"model.layers.{i}.mlp.experts.{j}.up_proj.weight" for i in range(48) for j in range(128)]
    assert names.compress(found) == ["model.layers.{0..47}.mlp.experts.{0..127}.up_proj.weight"]


def test_a_missing_expert_is_not_among_the_names() -> None:
    found = [f"l.{i}.e.{j}" for i in range(4) for j in range(4) if (i, j) != (2, 3)]
    assert sorted(names.expand(names.compress(found), 99)) == sorted(found)


def test_ranges_are_a_product_in_order() -> None:
    assert names.expand(["a{1..2}.b{9..10}"], 4) == ["a1.b9", "a1.b10", "a2.b9", "a2.b10"]
    assert names.count("a{1..2}.b{9..10}") == 4


@pytest.mark.parametrize(
    "pattern", ["{", "}", "a{1..2", "{2..1}", "{01..2}", "{a..b}", "{1..}", "{-1..2}", "{1...2}", "{1,2}", "{1..2}}"]
)
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(DamagedError, match=r"a weight name, with \{a\.\.b\}"):
        names.expand([pattern], 100)


@pytest.mark.parametrize("pattern", ["{0..999999999}", "{0..999999999}.{0..999999999}.{0..999999999}"])
def test_no_name_is_made_beyond_the_limit(pattern: str) -> None:
    with pytest.raises(DamagedError, match="at most 10 weights"):
        names.expand(["a", pattern], 10)


def test_the_number_of_ranges_is_bounded() -> None:
    assert names.expand(["{0..0}" * names.MAX_RANGES], 1) == ["0" * names.MAX_RANGES]
    with pytest.raises(DamagedError, match=f"at most {names.MAX_RANGES} ranges"):
        names.expand(["{0..9}" * 200_000], 10)


def test_many_numbers_in_a_name_stay_as_they_are() -> None:
    found = ".".join(map(str, range(3000)))
    assert names.expand(names.compress([found]), 1) == [found]


def test_natural_order() -> None:
    found = ["l.10.w", "l.2.w", "l.2.b", "k", "l", "9" * 5000]
    assert sorted(found, key=names.natural) == ["9" * 5000, "k", "l", "l.2.b", "l.2.w", "l.10.w"]
    assert sorted(["²", "a1", "a١"], key=names.natural)  # digits of other scripts are letters here


def test_braces_in_a_name_cannot_be_written() -> None:
    with pytest.raises(DamagedError, match="without braces"):
        names.compress(["a{0..1}"])
