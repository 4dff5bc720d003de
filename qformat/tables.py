"""Named tables: the one place where a magic table exists. They are data of the specification, in
``spec/tables/NAME.json``.
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
