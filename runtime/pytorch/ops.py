"""The torch operators ``qformat::linear``, ``qformat::embedding`` and ``qformat::dequantize``.

A weight comes as its parts, in the order of its layout, and as one text (:func:`.prepared.spec`). Activations of any
floating dtype are computed with in float32 and rounded once, at the end. Derivatives go to the activations only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from qformat.errors import UnsupportedError

from .prepared import (
    Prepared,
    entry_of,
    features,
    names_of,
    one_of,
    pieces_of,
    prepared,
    rows_of,
    shape_of,
    state_of,
    whole_of,
)

LIBRARY = torch.library.Library("qformat", "FRAGMENT")  # the operators live as long as this does
ACTIVATIONS = ("float",)  # how activations may enter a product


def check_activations(word: str) -> None:
    """Raise :class:`UnsupportedError` for a word of ``--activations`` that this runtime lacks."""
    if word not in ACTIVATIONS:
        raise UnsupportedError(f"activations as one of {', '.join(ACTIVATIONS)}", repr(word))


def linear(x: Tensor, parts: Sequence[Tensor], spec: str) -> Tensor:
    """[..., in] times the transposed matrix: [..., out] in the dtype of x."""
    if (rows := rows_of(spec)) is not None:
        return _rows_of_product(x, parts, whole_of(spec), rows)
    return _product(Prepared.linear, x, parts, spec, *features(spec))


def linear_transposed(y: Tensor, parts: Sequence[Tensor], spec: str) -> Tensor:
    """[..., out] times the matrix: [..., in] in the dtype of y. The derivative of :func:`linear`."""
    if (rows := rows_of(spec)) is not None:
        spec = whole_of(spec)
        y = functional.pad(y, (rows[0], features(spec)[0] - rows[1]))
    return _product(Prepared.linear_transposed, y, parts, spec, *reversed(features(spec)))


def _product(call: Any, x: Tensor, parts: Sequence[Tensor], spec: str, out: int, into: int) -> Tensor:
    _check_columns(x, into)
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], out)
    y: Tensor = call(prepared(parts, spec), x.detach().reshape(-1, into).float().contiguous())
    return y.to(x.dtype).reshape(*x.shape[:-1], out).contiguous()


# input -> what a product with it was made of, and those of its rows that were not yet asked for
_products: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _rows_of_product(x: Tensor, parts: Sequence[Tensor], whole: str, rows: tuple[int, int]) -> Tensor:
    """Columns ``rows`` of the product with a whole of which several weights are rows.

    They are asked for one after the other with the same input: the whole product is made for the first of them, and
    each takes its own out once, so that nothing is found that was made of what has changed since.
    """
    made_of = whole, state_of([x, *parts])
    found = _products.get(x)
    mine: Tensor | None = found[1].pop(rows, None) if found is not None and found[0] == made_of else None
    if mine is None:
        y = linear(x, parts, whole)
        every = {each: y[..., slice(*each)].clone(memory_format=torch.contiguous_format) for each in pieces_of(whole)}
        mine = every.pop(rows)
        if not x.is_inference():  # which do not tell that they were written to
            _products[x] = made_of, every
    return mine


def embedding(rows: Tensor, parts: Sequence[Tensor], spec: str) -> Tensor:
    """The given rows of the matrix, integers [...]: float32 [..., in]."""
    out, into = features(spec)
    flat = rows.reshape(-1).long()
    if flat.numel() == 0:
        return torch.empty(*rows.shape, into, device=rows.device)
    check_rows(flat, out)
    if (cut := rows_of(spec)) is not None:
        flat, spec = flat + cut[0], whole_of(spec)
    return prepared(parts, spec).take(flat).reshape(*rows.shape, into).contiguous()


def check_rows(rows: Tensor, count: int) -> None:
    """Raise :class:`IndexError` for a row that is none of ``count``; on other devices than the CPU to look at the
    numbers would be to wait for them.
    """
    if rows.device.type == "cpu" and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise IndexError(f"rows from 0 to {count - 1} expected, {int(rows.min())} to {int(rows.max())} found")


def dequantize(parts: Sequence[Tensor], spec: str) -> Tensor:
    """The whole weight as the model holds it, float32."""
    if (rows := rows_of(spec)) is not None:
        return dequantize(parts, whole_of(spec))[slice(*rows)].clone()
    entry = entry_of(spec)
    if not entry.stack:
        return prepared(parts, spec).decode()
    lead, one = entry.shape[: entry.stack], one_of(spec)
    names = names_of(one)
    each = (dict(zip(names, (part[at] for part in parts), strict=True)) for at in itertools.product(*map(range, lead)))
    return torch.stack([Prepared(one, matrix).decode() for matrix in each]).reshape(entry.shape)


def _check_columns(x: Tensor, wanted: int) -> None:
    if x.shape[-1] != wanted:
        raise ValueError(f"{wanted} columns expected, {x.shape[-1]} found")


def _linear_shape(x: Tensor, parts: Sequence[Tensor], spec: str) -> Tensor:
    out, into = features(spec)
    _check_columns(x, into)
    return x.new_empty(*x.shape[:-1], out)


def _linear_transposed_shape(y: Tensor, parts: Sequence[Tensor], spec: str) -> Tensor:
    out, into = features(spec)
    _check_columns(y, out)
    return y.new_empty(*y.shape[:-1], into)


def _embedding_shape(rows: Tensor, parts: Sequence[Tensor], spec: str) -> Tensor:
    return rows.new_empty(*rows.shape, features(spec)[1], dtype=torch.float32)


def _dequantize_shape(parts: Sequence[Tensor], spec: str) -> Tensor:
    return parts[0].new_empty(shape_of(spec), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor, Sequence[Tensor], str], output: Tensor) -> None:
    _, parts, ctx.spec = inputs
    ctx.save_for_backward(*parts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None], None]:
    parts = ctx.saved_tensors
    return torch.ops.qformat.linear_transposed(grad, parts, ctx.spec), [None] * len(parts), None


for _call, _shape, _first in (
    (linear, _linear_shape, "Tensor x, "),
    (linear_transposed, _linear_transposed_shape, "Tensor y, "),
    (embedding, _embedding_shape, "Tensor rows, "),
    (dequantize, _dequantize_shape, ""),
):
    LIBRARY.define(f"{_call.__name__}({_first}Tensor[] parts, str spec) -> Tensor")
    # for every device: the one table that tells devices apart is matrix.MATRICES
    LIBRARY.impl(_call.__name__, _call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qformat::{_call.__name__}", _shape, lib=LIBRARY)
torch.library.register_autograd("qformat::linear", _backward, setup_context=_save, lib=LIBRARY)

linear_op = torch.ops.qformat.linear.default
embedding_op = torch.ops.qformat.embedding.default
dequantize_op = torch.ops.qformat.dequantize.default
