"""Patterns of weight names: ``{a..b}`` stands for the integers a to b, several pairs for their product; nothing else
is one.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable

from .errors import DamagedError

_RANGE = re.compile(r"\{(0|[1-9][0-9]{0,8})\.\.(0|[1-9][0-9]{0,8})\}")
_NUMBER = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]{0,8})(?![0-9])")
MAX_RANGES = 8  # in one pattern


def natural(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """Sort key under which layer 2 comes before layer 10, and no two names are equal."""
    runs = re.split(r"([0-9]{1,18})", name)  # longer runs are cut: Python refuses to read very long numbers
    return [(0, int(run)) if run.isdecimal() and run.isascii() else (1, run) for run in runs if run], name


def _split(pattern: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Literal texts and the ranges between them."""
    pieces = _RANGE.split(pattern)
    texts, ranges = pieces[::3], [(int(a), int(b)) for a, b in zip(pieces[1::3], pieces[2::3], strict=True)]
    if len(ranges) > MAX_RANGES:
        raise DamagedError(f"at most {MAX_RANGES} ranges in a weight name", f"{len(ranges)} in {pattern!r}")
    if any("{" in text or "}" in text for text in texts) or any(a > b for a, b in ranges):
        raise DamagedError("a weight name, with {a..b} for integers from a to b", repr(pattern))
    return texts, ranges


def count(pattern: str) -> int:
    """How many names a pattern stands for, without making them."""
    return math.prod(b - a + 1 for a, b in _split(pattern)[1])


def expand(patterns: Iterable[str], limit: int) -> list[str]:
    """The names that the patterns stand for, in order; :class:`DamagedError` before more than ``limit`` are made."""
    out: list[str] = []
    for pattern in patterns:
        texts, ranges = _split(pattern)
        if len(out) + count(pattern) > limit:
            raise DamagedError(f"at most {limit} weights", f"{count(pattern)} more from {pattern!r}")
        for numbers in itertools.product(*(range(a, b + 1) for a, b in ranges)):
            out.append("".join(itertools.chain(*zip(texts, map(str, numbers), strict=False), texts[-1:])))
    return out


def compress(names: Iterable[str]) -> list[str]:
    """Few patterns that stand for exactly ``names``: for each template, contiguous runs of a number whose siblings
    agree.
    """
    templates: dict[tuple[str, ...], set[tuple[int, ...]]] = defaultdict(set)
    for name in names:
        if "{" in name or "}" in name:
            raise DamagedError("weight names without braces", repr(name))
        texts = tuple(_NUMBER.split(name, MAX_RANGES))
        templates[texts].add(tuple(int(n) for n in _NUMBER.findall(name)[:MAX_RANGES]))
    out = []
    for texts, numbers in templates.items():
        for ranges in _runs(numbers):
            marks = [str(a) if a == b else f"{{{a}..{b}}}" for a, b in ranges]
            out.append("".join(itertools.chain(*zip(texts, marks, strict=False), texts[-1:])))
    return sorted(out, key=natural)


def _runs(numbers: set[tuple[int, ...]]) -> list[tuple[tuple[int, int], ...]]:
    if numbers == {()}:
        return [()]
    rests: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    for first, *rest in numbers:
        rests[first].add(tuple(rest))
    out: list[tuple[tuple[int, int], ...]] = []
    start = previous = min(rests)
    for n in [*sorted(rests)[1:], None]:
        if n is None or n != previous + 1 or rests[n] != rests[start]:
            out += [((start, previous), *tail) for tail in _runs(rests[start])]
            start = n if n is not None else start
        previous = n if n is not None else previous
    return out
