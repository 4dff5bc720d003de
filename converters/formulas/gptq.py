"""GPTQ, as its tools have it: AutoGPTQ (``QuantLinear``: scale times code minus zero, the zero stored minus one),
gptqmodel (whole words minus one, version 2, planes of bits), Marlin (zero 8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from qformat.checkpoint import Checkpoint
from qformat.dtypes import Array
from qformat.weight import matrix_shape

from ..importers import _common as common
from ..importers import _gptq_settings as settings
from ..importers._gptq_settings import Rules
from ..plan import Item
from . import _words as words


def rows(source: Checkpoint, item: Item, start: int, stop: int) -> Array:
    """Rows [start, stop) of the matrix: float32 [stop - start, cols]."""
    assert item.entry is not None
    part = {name.rpartition(".")[2]: source.array(name) for name in item.consumes}
    if "B" in part:
        return words.marlin(part["B"], part["s"], start, stop)
    rules = settings.read(source, list(common.settings(source)))
    here, scales, cols = rules.of(item.name.removesuffix(".weight")), part["scales"], matrix_shape(item.entry)[1]
    bits = here.bits or 32 * part["qzeros"].shape[1] // scales.shape[1]
    size = here.group_size or -(-cols // len(scales))
    group = part.get("g_idx", np.arange(cols) // (cols if size == -1 else size))
    codes = _fields(bits, here)(np.ascontiguousarray(part["qweight"][:, start:stop]), np.arange(cols), bits)
    zeros = _zeros(source, part["qzeros"], bits, here, np.arange(start, stop), scales.shape[1])
    values = scales[:, start:stop].astype(np.float32)[group] * (codes.astype(np.int32) - zeros.T[group])
    return np.ascontiguousarray(values.T, np.float32)


def _fields(bits: int, rules: Rules) -> Callable[[Array, Array, int], Array]:
    return words.planar if bits in (5, 6, 7) or rules.format == "gptq_p" else words.stream


def _zeros(source: Checkpoint, qzeros: Array, bits: int, rules: Rules, index: Array, total: int) -> Array:
    """The zeros of rows ``index``: int32 [rows, groups]."""
    take = _fields(bits, rules)
    if _version(qzeros, bits, rules, total) == 2:
        return take(qzeros.T, index, bits).astype(np.int32)
    whole_words = bits in (2, 4, 8) and (rules.by_gptqmodel or (_full(qzeros, bits) and _any_borrowed(source)))
    if whole_words:
        one = sum(1 << at for at in range(0, 32, bits))
        added = (qzeros.view(np.uint32).astype(np.uint64) + one).astype(np.uint32)
        return take(added.T, index, bits).astype(np.int32)
    zeros = take(qzeros.T, index, bits).astype(np.int32) + 1
    return zeros & ((1 << bits) - 1) if rules.by_gptqmodel else zeros


def _version(qzeros: Array, bits: int, rules: Rules, total: int) -> int:
    """1 where zeros are stored minus one, else 2; symmetric layers show it, where nothing states it."""
    if rules.format is not None:
        return settings.VERSIONS[rules.format]
    stored, half = _fields(bits, rules)(qzeros.T, np.arange(total), bits), 1 << (bits - 1)
    for version, middle in ((1, half - 1), (2, half)):
        if rules.sym is not False and (stored == middle).all():
            return version
    return 2 if bits in (5, 6, 7) else 1


def _full(qzeros: Array, bits: int) -> bool:
    """Whether a field is full: one below a zero of 0."""
    return any((field == (1 << bits) - 1).any() for field in _split(qzeros, bits))


def _split(qzeros: Array, bits: int) -> Iterator[Array]:
    """The fields of words, lowest first."""
    for at in range(0, 32, bits):
        yield qzeros.view(np.uint32) >> np.uint32(at) & np.uint32((1 << bits) - 1)


def _any_borrowed(source: Checkpoint) -> bool:
    """Whether some full field of the file has a smaller one above it in its word. AutoGPTQ spoils all fields above a
    full one: one was subtracted from whole words.
    """
    for name, tensor in source.tensors.items():
        module, _, part = name.rpartition(".")
        if part != "qzeros":
            continue
        bits = 32 * tensor.shape[1] // source.tensors[f"{module}.scales"].shape[1]
        if bits not in (2, 4, 8):
            continue
        seen = np.zeros(tensor.shape, bool)
        for field in _split(source.array(name), bits):
            full = field == (1 << bits) - 1
            if (seen & ~full).any():
                return True
            seen |= full
    return False
