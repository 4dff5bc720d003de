"""Vectors that did not come from this project: pieces of layers that the authors of other formats wrote, laid out
anew, with the values that the authors' own code gives. They lie in ``foreign.json``, numbers as base64 of little-endian
bytes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qformat.dtypes import NUMPY, Array

from .case import Draft, packed


def drafts(kind: str) -> Iterator[Draft]:
    """Those of one codec."""
    for item in json.loads(Path(__file__).with_suffix(".json").read_text()):
        if item["name"].startswith(f"{kind}/"):
            parts = {name: _array(*part) for name, part in item["parts"].items()}
            values = _array("float32", item["shape"], item["values"])
            what = f"{item['what']} ({item['source']})"
            keys = {key: item[key] for key in ("sum_dtype",) if key in item}
            yield packed(
                item["name"], what, item["rules"], item["term"], item["shape"], parts=parts, values=values, **keys
            )


def _array(dtype: str, shape: list[int], text: str) -> Array:
    return np.frombuffer(base64.b64decode(text), NUMPY[dtype]).reshape(shape)
