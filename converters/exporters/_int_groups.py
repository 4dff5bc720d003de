"""Weights of the codec ``int`` as GPTQ and AWQ know them: groups of columns that share a scale and an integer zero."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from qformat import bits as fields
from qformat.codecs.int import Params
from qformat.dtypes import Array
from qformat.errors import UnsupportedError, UsageError
from qformat.manifest import read_term

from ..plan import Item, Plan

# modules that these formats' loaders look up rows in, and do not take packed
EMBEDDING = re.compile(r"(^|[._])(embed\w*|wte|wpe|tok_embeddings|word_embeddings|position_embeddings)$")
HEAD = "lm_head"


@dataclass(frozen=True)
class Layer:
    """A matrix ``[rows, cols]`` and its item; ``zero`` of every group where it is one number, else None."""

    item: Item
    module: str
    bits: int
    rows: int
    cols: int
    group_size: int  # -1: one group
    dtype: str
    zero: int | None
    scattered: bool

    @property
    def group(self) -> int:
        return columns(self.group_size, self.cols)

    @property
    def groups(self) -> int:
        return -(-self.cols // self.group)

    def arrays(self, highest: int) -> tuple[Array, Array, Array, Array]:
        """Codes [in, out], zeros and scales [groups, out], groups [in].

        Raises :class:`UnsupportedError` for a zero above ``highest``.
        """
        parts = self.item.make()
        codes = np.ascontiguousarray(fields.unpack(parts["codes"], self.bits, self.cols).T)
        zeros = parts["zeros"].T if "zeros" in parts else np.full((self.groups, self.rows), self.zero)
        if zeros.min() < 0 or zeros.max() > highest:
            found = zeros.min() if zeros.min() < 0 else zeros.max()
            raise self.unsupported(f"zeros from 0 to {highest}", str(found))
        group = parts["groups"] if self.scattered else np.arange(self.cols) // self.group
        return codes, zeros, np.ascontiguousarray(parts["scales"].T), group.astype(np.int32)

    def unsupported(self, expected: str, found: str) -> UnsupportedError:
        return UnsupportedError(expected, found, weight=self.item.name)


def columns(group_size: int, cols: int) -> int:
    """Of a group."""
    return cols if group_size == -1 else min(group_size, cols)


def read(plan: Plan, dtype: str | None, target: str, widths: Collection[int], dtypes: Collection[str]) -> list[Layer]:
    """Every packed weight as a layer of ``target``, which has these ``widths`` and ``dtypes`` of scales.

    Raises :class:`UnsupportedError` with the reason for a weight that cannot be one with the same values.
    """
    if dtype is not None:
        raise UsageError("--dtype only with --to dense")
    layers = [_layer(item, target, widths, dtypes) for item in plan.items if item.entry is not None]
    if not layers:
        raise UsageError("packed weights", "none", hint="`qformat quantize --codec int` packs a dense model")
    return layers


def _layer(item: Item, target: str, widths: Collection[int], dtypes: Collection[str]) -> Layer:
    entry = item.entry
    assert entry is not None

    def need(holds: bool, expected: str, found: str) -> None:
        if not holds:
            raise UnsupportedError(f"{expected} for {target}", found, weight=item.name)

    codecs = [str(term["codec"]) for term in entry.terms]
    need(entry.rotation is None, "no rotation", "one")
    need(codecs == ["int"], "one term of codec int", " + ".join(codecs))
    plain = entry.stack == 0 and len(entry.shape) == 2 and not entry.transposed and entry.stored_shape is None
    need(plain, "a matrix [out, in] that is stored as it is", f"shape {list(entry.shape)}, or another one stored")
    module, _, last = item.name.rpartition(".")
    need(last == "weight" and not EMBEDDING.search(module), "the weight of a linear layer", "another")
    _, params, _ = read_term(entry.terms[0])
    assert isinstance(params, Params)
    need(params.bits in widths, f"{' or '.join(map(str, widths))} bits", str(params.bits))
    need(params.view is None and params.block[0] == 1, "a scale for each block of one row", _blocks(params))
    need(params.scales in dtypes, f"scales of {' or '.join(dtypes)}", _named(params.scales))
    need(params.offsets is None, "integer zeros", "offsets")
    integer = params.zeros in (None, "uint8", "int16") and params.zero == int(params.zero)
    need(integer, "integer zeros", f"zero {params.zero:g}" if params.zeros is None else f"zeros {_named(params.zeros)}")
    need(params.rounding == "none", "values that are not rounded", f"rounding {params.rounding}")
    rows, cols = entry.shape
    zero = int(params.zero) if params.zeros is None else None
    scales = str(params.scales)
    return Layer(item, module, params.bits, rows, cols, params.block[1], scales, zero, params.groups is not None)


def _blocks(params: Params) -> str:
    return f"block {list(params.block)}" + (f", view {list(params.view)}" if params.view else "")


def _named(dtype: object) -> str:
    return "that are packed" if isinstance(dtype, Mapping) else str(dtype)


def dense_modules(items: Iterable[Item]) -> list[str]:
    """Modules with a dense matrix that loaders would otherwise take for packed ones; the head is one of them."""
    names = [item.name for item in items if item.dense is not None and len(item.dense.shape) == 2]
    modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    return [module for module in modules if not EMBEDDING.search(module)]


def notes(plan: Plan, target: str) -> tuple[str, ...]:
    """The plan's own, and what the target has no place for."""
    settings = {"activations": plan.activations, "keys and values": plan.kv_cache}
    lost = [what for what, kept in settings.items() if kept is not None]
    return (*plan.notes, *(f"{target} has no place for how {what} are quantized" for what in lost))
