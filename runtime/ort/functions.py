"""The model-local functions that stand for packed weights: ``qformat::Linear_N(x, parts...)`` is a product with the
transposed weight, ``qformat::Embedding_N(x, parts...)`` takes the rows x of it.

A node carries what its weight is in two attributes, ``weight`` (its name) and ``entry`` (its manifest entry as JSON),
so that a kernel needs nothing else. ONNX Runtime prefers a kernel of the same domain and name to the function; a
library may register one kernel as ``Linear_0``, ``Linear_1``, ... N numbers the entries of a model: ``overload`` would
tell one ``Linear`` from another, but ``onnx.reference`` does not look at it and runs the wrong body.
"""

from __future__ import annotations

import importlib
import json
import math
from typing import Literal

import numpy as np
import onnx
from onnx import helper

from qformat import codecs, weight
from qformat.errors import DamagedError, UnsupportedError
from qformat.manifest import Entry, Term
from qformat.records import write_record

from . import rotate
from .body import OPSET, Body

FILE = "model.onnx"
DOMAIN = "qformat"
VERSION = 1  # of the domain: what the operators mean
Kind = Literal["Linear", "Embedding"]


def text(entry: Entry) -> str:
    """The entry as JSON, without what does not bear on values: weights that are packed alike have equal texts."""
    record = write_record(entry)
    kept = {key: record[key] for key in sorted(record.keys() - {"weights", "concat", "label", "dtype"})}
    return json.dumps(kept, separators=(",", ":"))


def function(kind: Kind, name: str, entry: Entry) -> onnx.FunctionProto:
    """The function ``qformat::<name>``. Inputs are ``x`` and the parts in the order of the layout; float8 parts come as
    their bytes. Arithmetic is float32; a product is rounded to the type of ``x`` at the end, rows are float32.

    Raises :class:`UnsupportedError` for a codec without a form in ONNX, and for anything but a matrix ``[out, in]``.
    """
    if len(entry.shape) != 2 or entry.transposed:
        raise UnsupportedError("a matrix [out, in], for ONNX", f"{list(entry.shape)}")
    body = Body()
    stored, outside = _matrices(body, entry)
    y = (_linear if kind == "Linear" else _embedding)(body, entry, stored, outside)
    inputs = ["x", *(part.name for part in weight.layout(entry))]
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, name, inputs, [y], body.nodes, opset, attributes=["entry", "weight"])


def decode_term(body: Body, term: Term, shape: tuple[int, int], prefix: str = "") -> str:
    """One term, its parts inputs that are called ``prefix`` and the part: float32 [out, in], equal to the codec's
    ``decode`` bit for bit.
    """
    codec, params = codecs.read_params({key: value for key, value in term.items() if key != "outside"})
    parts = {}
    for part in codec.layout(params, shape):
        parts[part.name] = prefix + part.name
        if not isinstance(part.dtype, str):
            flat = math.prod(part.shape[:-1]), part.shape[-1]
            inner = decode_term(body, dict(part.dtype), flat, f"{prefix}{part.name}_")
            parts[part.name] = body.reshape(inner, *part.shape)
    try:
        module = importlib.import_module(f".{codec.NAME}", __package__)
    except ModuleNotFoundError:
        raise UnsupportedError("a codec with a form in ONNX", codec.NAME) from None
    return str(module.decode(body, params, shape, parts))


def _matrices(body: Body, entry: Entry) -> tuple[str, list[str]]:
    """Ŵ, the sum of the terms inside the rotation, and the terms outside of it; without a rotation all are inside."""
    shape = weight.matrix_shape(entry)
    inside, outside = [], []
    for i, term in enumerate(entry.terms):
        value = decode_term(body, term, shape, f"{i}_" if len(entry.terms) > 1 else "")
        (outside if term.get("outside", False) else inside).append(value)
    if not inside:
        raise DamagedError("a term that is not outside the rotation")
    if entry.rotation is None:
        inside, outside = inside + outside, []
    stored = inside[0]
    for value in inside[1:]:
        stored = body.rounded(body.op("Add", stored, value), entry.sum_dtype)
    return stored, outside


def _linear(body: Body, entry: Entry, stored: str, outside: list[str]) -> str:
    (rows, cols), (out, into) = weight.matrix_shape(entry), entry.shape
    x = body.cast("x", "float32")
    if cols != into:
        x = body.op("Pad", x, np.array([0, cols - into]), np.float32(0), np.array([-1]))
    turn = entry.rotation
    turned = rotate.apply(body, "in", turn and turn.in_, x, cols)
    y = rotate.undo(body, "out", turn and turn.out, _product(body, turned, stored), rows)
    for value in outside:
        y = body.op("Add", y, _product(body, x, value))
    return body.op("CastLike", body.cut(y, out) if rows != out else y, "x")


def _product(body: Body, x: str, matrix: str) -> str:
    return body.op("MatMul", x, body.op("Transpose", matrix))


def _embedding(body: Body, entry: Entry, stored: str, outside: list[str]) -> str:
    (rows, cols), (_, into) = weight.matrix_shape(entry), entry.shape
    turn = entry.rotation
    if turn and turn.out:
        stored = body.op("Transpose", rotate.undo(body, "out", turn.out, body.op("Transpose", stored), rows))
    y = rotate.undo(body, "in", turn and turn.in_, body.op("Gather", stored, "x"), cols)
    for value in outside:
        y = body.op("Add", y, body.op("Gather", value, "x"))
    return body.cut(y, into) if cols != into else y
