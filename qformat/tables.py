"""Named tables and Hadamard matrices: the one place where magic numbers exist. They are data of the specification, in
``spec/tables/NAME.json`` and ``spec/hadamard.json``.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

import qformat

from .dtypes import NUMPY, Array
from .errors import UnsupportedError


def resource(relative: str) -> Path:
    """A file that travels with the package: beside it in a checkout, inside it when installed."""
    for base in qformat.__path__:
        if (found := Path(base) / relative).exists():
            return found
    raise FileNotFoundError(relative)


@functools.cache
def names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in resource("spec/tables").glob("*.json")))


@functools.cache
def named(name: str) -> Array:
    """The table ``name``: [entries, values of an entry], in its own dtype; read-only."""
    if name not in names():
        raise UnsupportedError(f"one of the tables {', '.join(names())}", name)
    data = json.loads(resource(f"spec/tables/{name}.json").read_text())
    table = np.array(data["entries"], NUMPY[data["dtype"]])
    table.flags.writeable = False
    return table


@functools.cache
def hadamard(order: int) -> Array:
    """The Hadamard matrix of ``order`` 1, 12, 20, ...: ones and minus ones, int8 [order, order], not symmetric;
    read-only.
    """
    matrix = np.ones((1, 1), np.int8)
    if order != 1:
        if str(order) not in (known := _hadamards()):
            raise UnsupportedError(f"a Hadamard matrix of order 1, {', '.join(known)}", str(order))
        rows = [np.frombuffer(bytes.fromhex(row.zfill(len(row) + len(row) % 2)), np.uint8) for row in known[str(order)]]
        matrix = 1 - 2 * np.unpackbits(np.stack(rows), axis=1)[:, -order:].astype(np.int8)
    matrix.flags.writeable = False
    return matrix


@functools.cache
def _hadamards() -> dict[str, list[str]]:
    """Order -> the rows of the matrix in hexadecimal."""
    return dict(json.loads(resource("spec/hadamard.json").read_text())["matrices"])
