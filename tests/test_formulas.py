"""What the authors of a scheme compute from a source, strip by strip, is what our decoders give for its import."""

from __future__ import annotations

import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

import foreign
import ml_dtypes
import numpy as np
import pytest

from qformat import checkpoint, tables
from qformat.checkpoint import Checkpoint
from qformat.converters.importers import read
from qformat.converters.plan import Item
from qformat.dtypes import NUMPY, Array

SCHEMES = re.compile("(gptq|awq|exl3|aqlm|quip|qtip|yaqa|higgs|bnb|fp8|fbgemm-fp8|modelopt-fp8|ct-fp8|mxfp4)-")
LAYERS = foreign.DATA / "layers"
CASES = sorted(case.name for case in LAYERS.iterdir() if SCHEMES.match(case.name))


def opened(folder: Path) -> tuple[Checkpoint, Any, list[Item]]:
    """A source, the formula of its scheme, its packed weights."""
    source = checkpoint.open(folder)
    plan, scheme, _ = read(source)
    formula = importlib.import_module(f"qformat.converters.formulas.{scheme}")
    return source, formula, [item for item in plan.items if item.entry is not None]


def strips(formula: Any, source: Checkpoint, item: Item, total: int, size: int) -> Array:
    found = [formula.rows(source, item, start, min(start + size, total)) for start in range(0, total, size)]
    return np.concatenate(found)


def agree(folder: Path) -> None:
    source, formula, items = opened(folder)
    assert items
    for item in items:
        assert item.entry is not None
        ours = item.packed().decode(rotated=True)
        ours = ours.reshape(-1, ours.shape[-1])
        for size in (128, 384, len(ours)):
            theirs = strips(formula, source, item, len(ours), size)
            assert theirs.dtype == np.float32
            dtype = NUMPY[item.entry.dtype]
            np.testing.assert_array_equal(theirs.astype(dtype), ours.astype(dtype), f"{item.name}, strips of {size}")


@pytest.mark.parametrize("case", CASES)
def test_a_layer(case: str) -> None:
    agree(LAYERS / case)


@pytest.mark.parametrize(
    "case, codes, others",
    [
        ("gptq-v1-b4-g32-actorder", "qweight", ["scales", "qzeros"]),
        ("gptq-p-b6-g64-asym-planar", "qweight", ["scales", "qzeros"]),
        ("gptq-marlin-b4-g128", "B", ["s"]),
        ("awq-gemm-g128", "qweight", ["scales", "qzeros"]),
        ("awq-gemv-g64", "qweight", ["scales"]),
        ("awq-gemv-fast-g128", "qweight", ["scales", "qzeros"]),
        ("exl3-3bpw-mcg", "trellis", []),
        ("aqlm-2x8-g8", "codes", ["codebooks", "scales"]),
        ("quip-e8p12", "Qidxs", []),
        ("quip-e8p12rvq3b", "Qidxs", []),
        ("quip-d4", "Qidxs", []),
        ("qtip-3inst-k4", "trellis", []),
        ("qtip-hyb-k3", "trellis", ["tlut"]),
        ("higgs-3bit-p1", "weight", ["scales", "tables2"]),
        ("bnb-nf4-bf16", "weight", ["absmax", "quant_map"]),
        ("bnb-nf4-nested-fp16", "weight", ["absmax", "nested_absmax", "nested_quant_map"]),
        ("bnb-int8", "weight", ["SCB"]),
        ("fp8-block128", "weight", ["weight_scale_inv"]),
        ("mxfp4-gpt-oss", "gate_up_proj_blocks", ["gate_up_proj_scales"]),
    ],
)
def test_a_changed_source(case: str, codes: str, others: list[str], tmp_path: Path) -> None:
    """One bit of a code, or the last bits of all scales or of a table, are seen."""
    source, formula, (*_, item) = opened(LAYERS / case)
    total = math.prod(item.packed().decode(rotated=True).shape[:-1])
    plain = strips(formula, source, item, total, 128)
    file = LAYERS / case / "model.safetensors"
    (tmp_path / "config.json").symlink_to(LAYERS / case / "config.json")
    for part in (codes, *others):
        (name,) = (name for name in item.consumes if name.endswith(f".{part}"))
        tensor, data = source.tensors[name], np.fromfile(file, np.uint8)
        whole = data[tensor.start : tensor.stop]
        (whole[len(whole) // 2 :][:1] if part == codes else whole[:: source.array(name).itemsize])[:] ^= 1
        data.tofile(tmp_path / "model.safetensors")
        changed = strips(formula, checkpoint.open(tmp_path), item, total, 128)
        assert (changed != plain).any(), part


MODULE = "model.layers.0.mlp.up_proj"
RNG = np.random.default_rng(0)


def normal(*shape: int, dtype: Any = np.float16) -> Array:
    return RNG.standard_normal(shape).astype(np.float32).astype(dtype)


def integers(*shape: int, dtype: Any) -> Array:
    limits = np.iinfo(dtype)
    return RNG.integers(limits.min, limits.max, shape, dtype, endpoint=True)


@pytest.mark.parametrize("turned", [False, True])
def test_aqlm(turned: bool, tmp_path: Path) -> None:
    """Groups of rows that a strip cuts; codes that a run on a CPU has transposed."""
    codes = RNG.integers(-32, 32, (100, 3, 2)).astype(np.int8)
    parts = {"codes": codes.swapaxes(0, 1) if turned else codes, "codebooks": normal(2, 64, 3, 4)}
    parts["scales"] = normal(100, 1, 1, 1)
    tensors = {f"{MODULE}.{name}": np.ascontiguousarray(array) for name, array in parts.items()}
    agree(foreign.write(tmp_path, tensors, {"quantization_config": {"quant_method": "aqlm"}}))


def quip_params(**changes: Any) -> dict[str, Any]:
    own = {"codebook": "E8P12RVQ4B", "codebook_version": 1, "codesz": 8, "lora_rank": 0, "rescale_WH": False}
    return {**own, **changes}


def test_quip_with_another_scale_of_the_residual(tmp_path: Path) -> None:
    parts = {"Qidxs": integers(144, 8, dtype=np.int64), "codebook_id": np.array(17), "Wscale": np.ones((), np.float16)}
    parts |= {"SU": normal(128), "SV": normal(144)}
    tensors = {f"{MODULE}.{name}": array for name, array in parts.items()}
    agree(foreign.write(tmp_path, tensors, {"quip_params": quip_params(resid_scale_override=3.1)}))


@pytest.mark.parametrize(
    "mode, V, K, bits, tile",
    [
        ("1mad", 1, 1, 0, (16, 16)),
        ("2mad", 1, 2, 0, (16, 16)),
        ("quantlut", 1, 5, 4, (16, 16)),
        ("quantlut", 2, 2, 9, (8, 16)),
        ("quantlut_sym", 2, 2, 9, (16, 16)),
        ("quantlut_sym", 2, 5, 9, (16, 16)),
        ("lut", 2, 3, 16, (4, 32)),
        ("3inst", 1, 4, 0, (256, 2)),  # tiles that a strip cuts
    ],
)
def test_qtip(mode: str, V: int, K: int, bits: int, tile: tuple[int, int], tmp_path: Path) -> None:
    size = tile[0] * tile[1]
    parts = {"trellis": integers(512 * 64 // size, size * K // 16, dtype=np.int16), "SU": normal(64)}
    parts |= {"SV": normal(512, dtype=np.float32), "rcp": np.array(0), "tp_rank": np.array(8)}
    parts |= {"tlut": normal(1 << bits, V)} if "lut" in mode else {}
    own = {"codebook": "bitshift", "codebook_version": 0, "L": 16, "K": K, "V": V, "tlut_bits": bits}
    own |= {"decode_mode": mode, "td_x": tile[0], "td_y": tile[1]}
    tensors = {f"{MODULE}.{name}": array for name, array in parts.items()}
    agree(foreign.write(tmp_path, tensors, {"quip_params": own}))


@pytest.mark.parametrize(
    "bits, template, dtype", [(2, 13, "bfloat16"), (2, 23, "float16"), (3, 8, "bfloat16"), (4, 50, "float16")]
)
def test_higgs(bits: int, template: int, dtype: str, tmp_path: Path) -> None:
    """Rows of several chunks; each size of a tile."""
    entries, tuned = 1 << bits, {"template_id": template}
    parts = {"weight": integers(1024 * bits // 16, 128, dtype=np.int16), "scales": normal(1024, 2, dtype=NUMPY[dtype])}
    parts |= {"tables": np.arange(entries).astype(NUMPY[dtype])}
    parts |= {"tables2": normal(entries, entries, 2, dtype=NUMPY[dtype]).view(np.float16)}
    own = {"quant_method": "higgs", "bits": bits, "p": 2, "group_size": 64, "hadamard_size": 64}
    tensors = {f"{MODULE}.{name}": array for name, array in parts.items()}
    agree(foreign.write(tmp_path, tensors, {"quantization_config": {**own, "tune_metadata": {MODULE: tuned}}}))


@pytest.mark.parametrize("kind, shape, block, nested", [("nf4", (131, 7), 32, 3), ("fp4", (260, 96), 64, 16)])
def test_bitsandbytes(kind: str, shape: tuple[int, int], block: int, nested: int, tmp_path: Path) -> None:
    """Blocks that run across rows and strips, an odd number of codes."""
    count, state = shape[0] * shape[1], {"quant_type": kind, "blocksize": block, "dtype": "float32"}
    state |= {"shape": list(shape), "nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.143}
    blocks = -(-count // block)
    parts = {"absmax": integers(blocks, dtype=np.uint8), "quant_map": tables.named(kind)[:, 0]}
    parts |= {"nested_absmax": normal(-(-blocks // nested), dtype=np.float32)}
    parts |= {"nested_quant_map": normal(256, dtype=np.float32)}
    parts |= {f"quant_state.bitsandbytes__{kind}": np.frombuffer(json.dumps(state).encode(), np.uint8)}
    tensors = {f"{MODULE}.weight.{name}": array for name, array in parts.items()}
    tensors |= {f"{MODULE}.weight": integers(-(-count // 2), 1, dtype=np.uint8)}
    agree(foreign.write(tmp_path, tensors, {"quantization_config": {"quant_method": "bitsandbytes"}}))


def exponents(*shape: int) -> Array:
    return RNG.integers(100, 130, shape).astype(np.uint8)


@pytest.mark.parametrize(
    "weight, scale, settings, config",
    [
        ((2, 150, 40), normal(2, 1, 1, dtype=np.float32), {}, {}),
        ((2, 150, 40), normal(2, 150, dtype=np.float32), {}, {}),
        ((2, 150, 40), normal(2, 3, 2, dtype=np.float32), {"weight_block_size": [64, 32]}, {}),
        ((150, 300), normal(2, 1, 3, 1, dtype=np.float32), {}, {}),
        ((150, 96), exponents(150, 3), {}, {}),
        ((150, 96), exponents(2, 1).view(ml_dtypes.float8_e8m0fnu), {"weight_block_size": [128, 128]}, {}),
        ((2, 40, 150), normal(2, 1, 150, dtype=np.float32), {}, {"model_type": "llama4_text"}),
        ((2, 40, 150), normal(2, 150, 1, dtype=np.float32), {}, {"model_type": "llama4_text"}),
        ((2, 96, 150), exponents(2, 3, 150), {}, {"model_type": "llama4_text"}),
        (
            (2, 40, 150),
            normal(2, 2, 3, dtype=np.float32),
            {"weight_block_size": [64, 32]},
            {"model_type": "llama4_text"},
        ),
        ((150, 96, "fp4"), exponents(150, 3), {"weight_block_size": [128, 128]}, {}),
    ],
)
def test_fp8(weight: Any, scale: Array, settings: dict[str, Any], config: dict[str, Any], tmp_path: Path) -> None:
    if weight[-1] == "fp4":
        stored = integers(weight[0], weight[1] // 2, dtype=np.int8)
    else:
        stored = normal(*weight, dtype=ml_dtypes.float8_e4m3fn)
    fused = stored.ndim == 3
    name = "model.layers.0.mlp.experts.gate_up_proj" if fused else f"{MODULE}.weight"
    tensors = {name: stored, f"{name}_scale" if fused else f"{MODULE}.weight_scale": scale}
    agree(foreign.write(tmp_path, tensors, {"quantization_config": {"quant_method": "fp8", **settings}, **config}))


def test_mxfp4_of_the_original_files(tmp_path: Path) -> None:
    name = "block.0.mlp.mlp1_weight"
    tensors = {f"{name}.blocks": integers(3, 70, 2, 16, dtype=np.uint8), f"{name}.scales": exponents(3, 70, 2)}
    agree(foreign.write(tmp_path, tensors, {}))
