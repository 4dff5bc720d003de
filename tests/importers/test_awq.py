"""AWQ files from a writer of our own, made straight from the description of the format, decode to what it meant."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
from gptq_writer import MODULE, marlin, stream

from qformat import checkpoint
from qformat.converters.importers import find
from qformat.dtypes import Array
from qformat.errors import DamagedError, QformatError, UnsupportedError

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class File:
    """One layer; codes and zeros are [in, out] and [groups, out] whatever the version."""

    version: str = "gemm"
    bits: int = 4
    rows: int = 32
    cols: int = 128
    group: int = 32
    symmetric: bool = False
    module: str = MODULE
    dtype: str = "float16"
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.rows * self.cols + self.bits)
        groups = 1 if self.group == -1 else -(-self.cols // self.group)
        self.codes = rng.integers(0, 1 << self.bits, (self.cols, self.rows))
        self.zeros = rng.integers(0, 1 << self.bits, (groups, self.rows))
        if self.symmetric:
            self.zeros[:] = 1 << (self.bits - 1)
        self.scales = (rng.standard_normal((groups, self.rows)) / 50 + 0.1).astype(np.float16)

    @property
    def offsets(self) -> Array:
        return (-self.scales.astype(np.float32) * self.zeros).astype(np.float16)

    @property
    def values(self) -> Array:
        """float64: rounded nowhere but where gemv_fast does."""
        group = np.arange(self.cols) // (self.group if self.group > 0 else self.cols)
        scales = self.scales.astype(np.float64)[group]
        if self.version == "gemv_fast":
            return (self.codes * scales + self.offsets[group]).astype(np.float16).T
        return (scales * (self.codes - self.zeros[group])).T

    @property
    def tensors(self) -> dict[str, Array]:
        out = getattr(self, f"_{self.version}")()
        return {f"{self.module}.{part}": np.ascontiguousarray(array) for part, array in out.items()}

    def _gemm(self) -> dict[str, Array]:
        def packed(matrix: Array) -> Array:
            order = [8 * (i // 8) + ORDER[i % 8] if self.bits == 4 else i for i in range(self.rows)]
            return np.array([stream(map(int, row[order]), self.bits) for row in matrix], np.uint32).view(np.int32)

        return {"qweight": packed(self.codes), "qzeros": packed(self.zeros), "scales": self.scales}

    def _padded(self) -> int:
        multiple = {32: 4, 64: 2}.get(self.cols if self.group == -1 else self.group, 1)
        return 8 * multiple * -(-len(self.zeros) // (8 * multiple))

    def _gemv(self) -> dict[str, Array]:
        def packed(matrix: Array) -> Array:
            return np.array([stream(map(int, row), 4) for row in matrix], np.uint32).view(np.int32)

        width = ((0, self._padded() - len(self.zeros)), (0, 0))
        zeros, scales = np.pad(self.zeros, width), np.pad(self.scales, width)
        return {"qweight": packed(self.codes.T), "qzeros": packed(zeros.T), "scales": scales.T}

    def _gemv_fast(self) -> dict[str, Array]:
        """Each code put where the description says that it comes from."""
        words = np.zeros((self.rows // 4, self.cols * 4), np.uint16)  # nibbles, unpacked
        within = np.arange(32).reshape(4, 4, 2).swapaxes(0, 1)  # stored place -> column of 32, outer shuffle ...
        within = within.reshape(4, 4, 2).swapaxes(1, 2).ravel()  # ... and inner
        for row in range(self.rows):
            for run in range(self.cols // 32):
                place = 256 * (run // 2) + 64 * (row % 4) + 32 * (run % 2)
                words[row // 4, place : place + 32] = self.codes[32 * run + within, row]
        nibbles = words.reshape(self.rows // 4, self.cols, 4) << (4 * np.arange(4, dtype=np.uint16))
        width = ((0, self._padded() - len(self.zeros)), (0, 0))
        return {
            "qweight": nibbles.sum(axis=-1).astype(np.uint16).view(np.int16),
            "qzeros": np.pad(self.offsets, width),
            "scales": np.pad(self.scales, width),
        }

    def _marlin(self) -> dict[str, Array]:
        qweight, scales = marlin(self.codes, self.scales)
        return {"qweight": qweight, "scales": scales}

    @property
    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"quant_method": "awq", "bits": self.bits, "group_size": self.group}
        return settings | {"version": self.version, "zero_point": not self.symmetric} | self.extra

    def write(self, folder: Path, **config: Any) -> Path:
        return foreign.write(
            folder, self.tensors, {"model_type": "llama", "quantization_config": self.settings, **config}
        )


GPTQMODEL = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}
FILES = [
    *(File(rows=rows, cols=cols, group=group) for rows, cols, group in ((8, 96, 32), (72, 64, 64), (64, 64, -1))),
    *(File(bits=bits, extra=GPTQMODEL) for bits in (2, 3, 5, 6, 7, 8)),
    File(symmetric=True),
    *(File("gemv", rows=rows, cols=cols, group=g) for rows, cols, g in ((32, 256, 32), (128, 128, 64), (40, 256, -1))),
    *(File("gemv_fast", cols=cols, group=group) for cols, group in ((128, 32), (192, 64), (64, -1))),
    *(File("marlin", rows=128, cols=cols, group=group, symmetric=True) for cols, group in ((64, 32), (128, -1))),
]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.version}-b{f.bits}-{f.rows}x{f.cols}-g{f.group}")
@pytest.mark.parametrize("stated", [True, False], ids=["stated", "by shapes"])
def test_every_version(tmp_path: Path, file: File, stated: bool) -> None:
    settings = file.settings if stated else {k: v for k, v in file.settings.items() if k != "version"}
    plan = foreign.plan_of(foreign.write(tmp_path, file.tensors, {"quantization_config": settings}))
    assert np.array_equal(foreign.decoded(plan)[f"{MODULE}.weight"], file.values)
    (entry,) = [item.entry for item in plan.items]
    assert entry.label == "bit-exact" and ("zero" in entry.terms[0]) == file.symmetric


def test_settings_elsewhere_and_in_older_words(tmp_path: Path) -> None:
    for version in ("gemm", "gemv", "gemv_fast"):
        file = File(version)
        settings = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": version.upper()}
        folder = foreign.write(tmp_path / version, file.tensors, {"model_type": "llama"}, quant_config=settings)
        assert find(checkpoint.open(folder))[0].NAME == "awq"
        assert np.array_equal(foreign.decoded(foreign.plan_of(folder))[f"{MODULE}.weight"], file.values)


def test_settings_per_layer(tmp_path: Path) -> None:
    """``dynamic``, which gptqmodel writes; a layer that is packed though it is named as skipped is reported."""
    plain, wide = File(extra=GPTQMODEL), File(bits=8, group=64, module="model.layers.1.mlp.up_proj")
    settings = plain.settings | {"dynamic": {r"+:.*\.1\..*": {"bits": 8, "group_size": 64}}}
    settings["modules_to_not_convert"] = ["lm_head", "q_proj"]
    folder = foreign.write(tmp_path, plain.tensors | wide.tensors, {"quantization_config": settings})
    plan = foreign.plan_of(folder)
    values = foreign.decoded(plan)
    assert all(np.array_equal(values[f"{file.module}.weight"], file.values) for file in (plain, wide))
    assert any("modules_to_not_convert" in note and MODULE in note for note in plan.notes)


def refused(folder: Path, *words: str, kind: type[QformatError] = DamagedError) -> None:
    with pytest.raises(kind) as caught:
        foreign.decoded(foreign.plan_of(folder))
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"bits": 8}, [f"{MODULE}.qweight", "bits 8", "4 bits"]),
        ({"group_size": 64}, [f"{MODULE}.scales", "group_size 64", "found 4"]),
        ({"version": "gemv"}, [f"{MODULE}.q", "version gemv"]),
        ({"version": "gemv_fast"}, [f"{MODULE}.qweight", "int16"]),
        ({"version": "marlin"}, [f"{MODULE}.qzeros", "marlin"]),
        ({"format": "gemv"}, ["'gemm'", "'gemv' in config.json"]),
        ({"zero_point": False}, [f"{MODULE}.qzeros", "8 throughout", "zero_point"]),
        ({"zero_point": 3}, ["zero_point", "3"]),
    ],
)
def test_settings_that_contradict(tmp_path: Path, extra: dict[str, Any], words: list[str]) -> None:
    refused(File(extra=extra).write(tmp_path), *words)


@pytest.mark.parametrize("extra", [{"version": "other"}, {"backend": "llm-awq"}, {"pack_dtype": "int64"}], ids=str)
def test_settings_that_are_not_supported(tmp_path: Path, extra: dict[str, Any]) -> None:
    refused(File(extra=extra).write(tmp_path), *map(str, extra), kind=UnsupportedError)


def test_other_widths_need_their_writer(tmp_path: Path) -> None:
    refused(File(bits=8).write(tmp_path), f"{MODULE}.weight", "8 bits", "gptqmodel", kind=UnsupportedError)


def broken(folder: Path, file: File, part: str, change: Any, *words: str) -> None:
    tensors = file.tensors
    tensors[f"{MODULE}.{part}"] = np.ascontiguousarray(change(tensors[f"{MODULE}.{part}"]))
    refused(foreign.write(folder, tensors, {"quantization_config": file.settings}), f"{MODULE}.{part}", *words)


def test_tensors_that_contradict(tmp_path: Path) -> None:
    fast, gemv = File("gemv_fast"), File("gemv")
    broken(tmp_path, File(), "scales", lambda scales: scales * np.float16("inf"), "finite", "[0, 0]")
    broken(tmp_path, File(), "qzeros", lambda zeros: zeros[:-1], "[4, 4]")
    broken(tmp_path, File(), "qweight", lambda codes: codes * 0, "0 throughout")
    broken(tmp_path, File(), "scales", lambda scales: scales * 0, "other than 0")
    broken(tmp_path, File(), "qweight", lambda codes: codes.astype(np.float32), "int32", "float32")
    broken(tmp_path, gemv, "scales", lambda scales: scales[:, :4], "version gemv")
    broken(tmp_path, gemv, "qzeros", lambda zeros: zeros[:-1], "version gemv")
    broken(tmp_path, fast, "qzeros", lambda zeros: zeros * np.float16("nan"), "finite")
    broken(tmp_path, fast, "qweight", lambda codes: codes * 0, "0 throughout")
    broken(tmp_path, fast, "qzeros", lambda zeros: zeros[:8], "version gemv_fast")
    for part in ("qweight", "qzeros", "scales"):
        tensors = File().tensors
        del tensors[f"{MODULE}.{part}"]
        refused(foreign.write(tmp_path, tensors, {"quantization_config": File().settings}), f"{MODULE}.{part}")
