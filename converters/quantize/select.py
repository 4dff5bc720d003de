"""Which tensors of a dense model are weights to be packed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from qformat.checkpoint import Checkpoint
from qformat.dtypes import FLOATS
from qformat.errors import UsageError

# names of matrices that are no linear layers, or too small and too sensitive to be packed unless asked for
DENSE_NAMES = re.compile(
    r"(^|[._])(embed\w*|wte|wpe|lm_head|output_head|router|gate|shared_expert_gate|norm\w*|\w*norm|position\w*|rotary\w*|conv\w*)"
    r"(\.|$)|(^|\.)shared\.weight$"  # the last: T5's embedding
)
TRANSPOSED_EXPERTS = ("gpt_oss", "llama4", "llama4_text")  # model types that hold fused experts as [experts, in, out]


def candidates(source: Checkpoint) -> list[str]:
    """Every tensor that can be packed: floats with two axes, or three where experts are fused."""
    out = []
    for name, tensor in source.tensors.items():
        fused = len(tensor.shape) == 3 and "expert" in name
        if tensor.dtype in FLOATS and (len(tensor.shape) == 2 or fused) and 0 not in tensor.shape:
            out.append(name)
    return out


def select(source: Checkpoint, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """Linear and expert matrices, and what ``include`` matches; without what ``exclude`` matches (globs).

    Raises :class:`UsageError` for a glob of ``include`` that matches nothing.
    """
    found = candidates(source)
    for pattern in include:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise UsageError("--include with the name of a matrix of floats", repr(pattern), file=source.path)
    return [
        name
        for name in found
        if (_linear(name, source.tensors[name].shape) or _matches(name, include)) and not _matches(name, exclude)
    ]


def _linear(name: str, shape: tuple[int, ...]) -> bool:
    if min(shape) == 1:  # a head of one value, a convolution of one channel: little to win
        return False
    expert = "expert" in name and "gate." not in name.rpartition("experts")[2] and "shared_expert_gate" not in name
    is_weight = name.endswith(".weight") or "expert" in name
    return is_weight and not name.endswith("bias") and (expert or not DENSE_NAMES.search(name))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
