"""A head that config.json ties to the embedding, and that is stored all the same."""

from __future__ import annotations

from qformat.checkpoint import Checkpoint
from qformat.errors import DamagedError

from . import _common as common


def check(source: Checkpoint) -> None:
    """Raise :class:`DamagedError` where both are stored and differ: some loaders take the one, some the other."""
    heads = [name for name in source.tensors if name.split(".")[-2:] == ["lm_head", "weight"]]
    ends = [[kind, "weight"] for kind in common.EMBEDDINGS]
    embeddings = [name for name in source.tensors if name.split(".")[-2:] in ends]
    if common.tied(source) and heads and embeddings and (found := _difference(source, heads[0], embeddings[0])):
        raise DamagedError(
            f"the values of {embeddings[0]}, as {common.TIE} says",
            found,
            file=source.file_of(heads[0]),
            weight=heads[0],
            hint=f"to keep both set {common.TIE} to false, or remove one of them",
        )


def _difference(source: Checkpoint, head: str, embedding: str) -> str:
    one, other = source.tensors[head], source.tensors[embedding]
    if (one.tag, one.shape) != (other.tag, other.shape) or not one.shape:
        return f"{one.dtype} {list(one.shape)} beside {other.dtype} {list(other.shape)}"
    first, second = (source.raw(name).reshape(one.shape[0], -1) for name in (head, embedding))
    differ = int((first != second).any(axis=1).sum())
    return f"{differ} of {one.shape[0]} rows that differ" if differ else ""
