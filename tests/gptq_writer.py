"""A small writer of GPTQ files, made straight from the description of the format and in no hurry."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import foreign
import numpy as np

from qformat.dtypes import Array

MODULE = "model.layers.0.self_attn.q_proj"
PLANES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def stream(codes: Iterable[int], bits: int) -> list[int]:
    """32-bit words that hold ``codes`` one after the other."""
    codes = list(codes)
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    return [number >> (32 * word) & 0xFFFFFFFF for word in range(-(-len(codes) * bits // 32))]


def planes(codes: Iterable[int], bits: int) -> list[int]:
    """32-bit words of bit planes: for each 32 codes their lowest bits, then the next."""
    codes, out = list(codes), []
    for start in range(0, len(codes), 32):
        shift = 0
        for width in PLANES[bits]:
            block = [code >> shift & ((1 << width) - 1) for code in codes[start : start + 32]]
            out += stream(block + [0] * (32 - len(block)), width)
            shift += width
    return out


def packed(columns: Iterable[Sequence[int]], bits: int, planar: bool) -> Array:
    """Each column packed downwards: int32 [words, columns]."""
    pack = planes if planar else stream
    return np.array([pack(map(int, column), bits) for column in columns], np.uint32).T.view(np.int32)


def minus_one(zeros: Array, bits: int, writer: str, planar: bool) -> Array:
    """Zeros [groups, out] as version 1 stores them."""
    if writer == "gptqmodel" and bits in (2, 4, 8):
        ones = sum(1 << at for at in range(0, 32, bits))
        return (packed(zeros, bits, planar).T.view(np.uint32) - np.uint32(ones)).view(np.int32)
    return packed((zeros - 1) % (1 << bits), bits, planar).T


@dataclass
class File:
    """One layer and what is said of it. ``g_idx`` None: not stored."""

    bits: int = 4
    rows: int = 32
    cols: int = 64
    group: int = 32
    version: str = "gptq"
    writer: str = ""
    codes: Array | None = field(default=None, repr=False)  # [in, out]
    zeros: Array | None = field(default=None, repr=False)  # [groups, out]
    scales: Array | None = field(default=None, repr=False)
    g_idx: Array | None = field(default=None, repr=False)
    module: str = MODULE
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        groups = 1 if self.group == -1 else -(-self.cols // self.group)
        if self.codes is None:
            self.codes = rng.integers(0, 1 << self.bits, (self.cols, self.rows))
        if self.zeros is None:
            self.zeros = np.full((groups, self.rows), 1 << (self.bits - 1))
        if self.scales is None:
            self.scales = (rng.standard_normal((groups, self.rows)) / 50 + 0.1).astype(np.float16)

    @property
    def planar(self) -> bool:
        return self.version == "gptq_p" or self.bits in (5, 6, 7)

    @property
    def tensors(self) -> dict[str, Array]:
        if self.version == "gptq":
            qzeros = minus_one(self.zeros, self.bits, self.writer, self.planar)
        else:
            qzeros = packed(self.zeros, self.bits, self.planar).T
        out = {"qweight": packed(self.codes.T, self.bits, self.planar), "qzeros": qzeros, "scales": self.scales}
        if self.g_idx is not None:
            out["g_idx"] = self.g_idx.astype(np.int32)
        return {f"{self.module}.{part}": np.ascontiguousarray(array) for part, array in out.items()}

    @property
    def settings(self) -> dict[str, Any]:
        settings = {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group,
            "checkpoint_format": self.version,
        }
        settings["sym"] = bool((self.zeros == 1 << (self.bits - 1)).all())
        if self.writer:
            settings["meta"] = {"quantizer": [f"{self.writer}:7.0"]}
        return settings | self.extra

    @property
    def values(self) -> Array:
        group = (
            self.g_idx
            if self.g_idx is not None
            else np.arange(self.cols) // (self.group if self.group > 0 else self.cols)
        )
        return (self.scales.astype(np.float32)[group] * (self.codes - self.zeros[group]).astype(np.float32)).T

    def write(self, folder: Path, **config: Any) -> Path:
        return foreign.write(
            folder, self.tensors, {"model_type": "llama", "quantization_config": self.settings, **config}
        )


def marlin(codes: Array, scales: Array) -> tuple[Array, Array]:
    """Codes [in, out] and scales [groups, out] as Marlin's B and s, built thread by thread."""
    rows, cols = codes.shape
    words = np.zeros((rows // 16, 2 * cols), np.uint32)
    for tile_row, run in itertools.product(range(rows // 16), range(cols // 64)):
        for thread, tile in itertools.product(
            range(32), range(4)
        ):  # 8 codes of a thread in each of four tiles of 16 x 16
            top, left = 2 * (thread % 4), 16 * tile + thread // 4
            held = [(top + down, left + across) for across in (0, 8) for down in (0, 1, 8, 9)]
            order = [held[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
            block = codes[16 * tile_row :, 64 * run :]
            words[tile_row, 128 * run + 4 * thread + tile] = stream((int(block[at]) for at in order), 4)[0]
    runs, out = (64, np.empty_like(scales)) if len(scales) > 1 else (32, np.empty_like(scales))
    for start in range(0, cols, runs):
        if runs == 64:
            order = [i + 8 * j for i in range(8) for j in range(8)]
        else:
            order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
        out[:, start : start + runs] = scales[:, start : start + runs][:, order]
    return words.view(np.int32), out
