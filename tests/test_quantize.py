"""Quantizing: the same bytes each time, small errors, odd shapes and sources, what is refused."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import dense_folder

import qformat
from qformat import checkpoint, codecs, rotation
from qformat.converters import write
from qformat.converters.importers import read
from qformat.converters.quantize.job import quantize
from qformat.converters.quantize.select import select
from qformat.converters.quantize.weight import entry_of, in_size, pack, signs
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError, UnsupportedError, UsageError
from qformat.files import INDEX
from qformat.kernels import native
from qformat.shards import Shard
from qformat.weight import PackedWeight

ROOT = Path(__file__).resolve().parents[1]
FAST = {"codec": "trellis", "bits": 2, "settings": {"L": 8, "code": "mul1"}}  # also without the native library


def gaussian(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def term(codec: str, bits: float, rotated: bool = False, **settings: Any) -> dict[str, Any]:
    return {"codec": codec, **codecs.get(codec).preset(bits, rotated, settings)}


def packed(weight: Array, *terms: dict[str, Any], rotate: Any = "none") -> PackedWeight:
    one = pack(entry_of("w", weight.shape, "float32", terms, rotate), weight)
    one.check()
    return one


def error(weight: Array, *terms: dict[str, Any], rotate: Any = "none") -> float:
    """Relative squared error of a weight that is packed and decoded."""
    one = packed(weight, *terms, rotate=rotate)
    exact = weight.astype(np.float32)
    return float(((one.decode() - exact) ** 2).sum() / (exact**2).sum())


def outliers() -> Array:
    """A matrix as trained ones are: rows of different size, a few columns and single weights far out."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((256, 256)) * np.exp(rng.standard_normal((256, 1)) / 2)
    weight[:, rng.integers(0, 256, 3)] *= 8
    weight[rng.integers(0, 256, 200), rng.integers(0, 256, 200)] *= 10
    return weight.astype(np.float32)


def test_a_rotated_grid_beats_nf4_and_int4() -> None:
    """Though it takes fewer bits: one scale for all, or scales of 8 bits, where theirs have 16."""
    vector = {"codec": "table", "bits": 8, "p": 2, "table": "higgs-p2-n256", "block": [-1, -1], "scales": "float16"}
    for weight, gain in ((gaussian(256, 256), 0.98), (outliers(), 0.3)):
        others = error(weight, term("table", 4, table="nf4")), error(weight, term("int", 4))
        assert error(weight, term("table", 4, True), rotate="hadamard") < gain * min(others)
        assert error(weight, vector, rotate="hadamard") < 0.0085
    assert error(weight, vector, rotate="hadamard") < gain * min(others)


def test_rotation_makes_outliers_harmless() -> None:
    weight = outliers()
    for of in (term("table", 3, block=[1, -1]), term("int", 3, block=[1, -1])):
        assert error(weight, of, rotate="hadamard") < 0.7 * error(weight, of)


@pytest.mark.skipif(not native.available(), reason="no native library: the search would take minutes")
def test_the_trellis_beats_every_scalar_of_two_bits() -> None:
    for weight in (gaussian(256, 256), outliers()):
        trellis = error(weight, term("trellis", 2, True), rotate="hadamard")
        assert trellis < 0.078
        for other in (term("table", 2), term("int", 2), term("int", 2, zeros="uint8")):
            assert trellis < 0.9 * error(weight, other)


@pytest.mark.parametrize("rotate", ["hadamard", "none"])
def test_each_term_of_a_sum_packs_what_is_left_over(rotate: str) -> None:
    weight = gaussian(128, 256)
    for bits, limit in ((2, 0.0925), (3, 0.0308), (4, 0.0098)):
        assert 0.9 * limit < error(weight, *codecs.preset("e8p", bits, rotate != "none", {}), rotate=rotate) < limit
    grids = term("int", 2, zeros="uint8"), term("table", 2)
    assert error(weight, *grids, rotate=rotate) < 0.25 * error(weight, grids[0], rotate=rotate)
    sums = packed(weight, *grids)
    first = packed(weight, grids[0])
    second = packed(weight - first.decode(), grids[1])
    for i, alone in enumerate((first, second)):
        for name, part in alone.parts.items():
            np.testing.assert_array_equal(sums.parts[f"{i}_{name}"], part)


def test_a_weight_is_padded_to_the_units_of_every_term() -> None:
    terms = term("int", 4), term("e8p", 2), term("trellis", 2, L=8, code="mul1")
    assert entry_of("w", (20, 20), "float32", terms, "none").stored_shape == (32, 32)
    assert entry_of("w", (20, 20), "float32", terms[:2], "none").stored_shape == (20, 24)


JOBS: list[dict[str, Any]] = [
    {"codec": "int", "bits": 4},
    {"codec": "table", "bits": 2, "rotate": "hadamard"},
    {"codec": "table", "bits": 4, "settings": {"table": "float16", "scales": None, "bits": 3, "p": 1}},
    FAST,
    {**FAST, "bits": 2.25},
    {"codec": "e8p", "bits": 3},
    {"codec": "e8p", "bits": 4, "rotate": "none"},
]


@pytest.mark.parametrize("job", JOBS, ids=[f"{job['codec']} {job['bits']}" for job in JOBS])
def test_the_same_bytes_on_two_runs(job: dict[str, Any], tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "s", {f"l.{i}.weight": gaussian(64, 48, seed=i) for i in range(5)})
    for name in ("a", "b"):
        quantize(source, tmp_path / name, **job)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_shards_and_threads_change_no_number(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "s", {f"l.{i}.weight": gaussian(64, 64, seed=i) for i in range(9)})
    quantize(source, tmp_path / "one", codec="int", bits=4)
    opened = checkpoint.open(tmp_path / "one")
    plan, _, _ = read(opened)
    for threads in (1, 3):
        target = tmp_path / f"many{threads}"
        write.write(opened, plan, target, write.account(opened, plan), packed=True, shard_bytes=5000, threads=threads)
        many = checkpoint.open(target)
        assert len(many.shards) == 5
        assert {path.name for path in target.glob("*.safetensors")} == {
            f"model-{i:05}-of-00005.safetensors" for i in range(1, 6)
        }
        for name in opened.tensors:
            assert many.raw(name).tobytes() == opened.raw(name).tobytes()
        for shard in many.shards:
            shard.check()
    for file in (tmp_path / "many1").iterdir():
        assert file.read_bytes() == (tmp_path / "many3" / file.name).read_bytes()


SHAPES = [(1, 64), (1, 1), (64, 1), (60, 100), (3, 5), (16, 16), (17, 33), (128, 8), (2, 4304)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("job", [*JOBS, {**FAST, "rotate": "none"}], ids=range(len(JOBS) + 1))
def test_any_shape_is_packed(shape: tuple[int, int], job: dict[str, Any], tmp_path: Path) -> None:
    weight = gaussian(*shape)
    source = dense_folder(tmp_path / "s", {"l.weight": weight, "norm": np.ones(3, np.float32)})
    found = quantize(source, tmp_path / "q", include=["l.weight"], **job)
    assert found["weights"][0]["shape"] == list(shape)
    one = checkpoint.open(tmp_path / "q")["l.weight"]
    one.check()
    stored = one.entry.stored_shape
    codec, params = codecs.read_params(found["terms"][0])
    units = codec.units(params)
    padded = tuple(-(-size // unit) * unit for size, unit in zip(shape, units, strict=True))
    assert (stored or shape) == padded
    assert one.decode(rotated=True).shape == padded
    worst = {4: 0.05, 3: 0.3, 2: 0.7, 2.25: 0.7}[job["bits"]] + 0.2 * (weight.size < 100)
    assert ((one.decode() - weight) ** 2).sum() < worst * (weight**2).sum()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_sources_of_every_float(dtype: str, tmp_path: Path) -> None:
    weight = gaussian(32, 64).astype(NUMPY[dtype])
    source = dense_folder(tmp_path / "s", {"l.weight": weight})
    quantize(source, tmp_path / "q", codec="int", bits=8)
    one = checkpoint.open(tmp_path / "q")["l.weight"]
    assert one.entry.dtype == ("float32" if dtype == "float64" else dtype)
    same = pack(one.entry, weight.astype(np.float32))
    for name, part in one.parts.items():
        np.testing.assert_array_equal(part, same.parts[name])


@pytest.mark.parametrize("job", JOBS, ids=range(len(JOBS)))
@pytest.mark.filterwarnings("error")
def test_rows_and_columns_of_zeros(job: dict[str, Any], tmp_path: Path) -> None:
    weight = gaussian(32, 64)
    weight[3] = 0
    weight[:, 7] = 0
    source = dense_folder(tmp_path / "s", {"l.weight": weight, "z.weight": np.zeros((32, 64), np.float32)})
    quantize(source, tmp_path / "q", **job)
    opened = checkpoint.open(tmp_path / "q")
    for name in opened:
        opened[name].check()
    assert not opened["z.weight"].decode().any() or "float16" == job.get("settings", {}).get("table")
    if job["codec"] == "trellis":
        assert not opened["l.weight"].decode()[3].any()  # the scale of its row is zero


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_source_that_is_not_finite_is_refused(bad: float, dtype: str, tmp_path: Path) -> None:
    weight = gaussian(32, 64)
    weight[5, 6] = bad
    source = dense_folder(tmp_path / "s", {"a.weight": gaussian(32, 64), "b.weight": weight.astype(NUMPY[dtype])})
    for job in (JOBS[0], JOBS[1], FAST):
        with pytest.raises(DamagedError, match="s/model.safetensors: b.weight: expected finite values, found 1 that"):
            quantize(source, tmp_path / "q", **job)
        assert not (tmp_path / "q").exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("job", [JOBS[0], JOBS[1], FAST], ids=["int", "table", "trellis"])
def test_scales_beyond_their_dtype_are_refused(job: dict[str, Any], tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "s", {"a.weight": gaussian(32, 64) * np.float32(1e8)})
    with pytest.raises(DamagedError, match="a.weight: expected (finite scales|a finite out_scale), found"):
        quantize(source, tmp_path / "q", **job)
    if job["codec"] == "int":
        quantize(source, tmp_path / "q", codec="int", bits=4, settings={"scales": "float32"})


def test_float64_beyond_float32_is_refused(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "s", {"a.weight": gaussian(32, 64).astype(np.float64) * 1e300})
    with pytest.raises(DamagedError, match="a.weight: expected finite values"):
        quantize(source, tmp_path / "q", codec="int", bits=4)


def test_fused_experts_are_packed_as_their_matrices(tmp_path: Path) -> None:
    tensors = {
        "l.0.mlp.experts.gate_up_proj": gaussian(4, 32, 48),
        "l.0.mlp.experts.gate_up_proj_bias": gaussian(4, 48),
    }
    for kind, shape in (("gpt_oss", (48, 32)), ("qwen3_moe", (32, 48))):
        source = dense_folder(tmp_path / kind, tensors, model_type=kind)
        found = quantize(source, tmp_path / f"{kind}-q", codec="int", bits=4, rotate="hadamard")
        assert found["coverage"] == {"tensors": 2, "consumed": 1, "passed": 1, "left_out": []}
        one = checkpoint.open(tmp_path / f"{kind}-q")["l.0.mlp.experts.gate_up_proj"]
        assert one.entry.transposed == (kind == "gpt_oss") and one.decode(rotated=True).shape == (4, *shape)
        weight = tensors["l.0.mlp.experts.gate_up_proj"]
        assert ((one.decode() - weight) ** 2).mean() < 0.02
        for i in range(4):
            alone = pack(one.slice(0, i, i + 1).entry, weight[i : i + 1])
            for name, part in alone.parts.items():
                np.testing.assert_array_equal(part[0], one.parts[name][i])


NAMES = {
    "model.layers.0.self_attn.q_proj.weight": True,
    "model.layers.0.mlp.gate_proj.weight": True,
    "model.layers.0.mlp.experts.7.down_proj.weight": True,
    "model.layers.0.block_sparse_moe.experts.0.w1.weight": True,
    "model.layers.0.mlp.shared_expert.gate_proj.weight": True,
    "model.layers.5.mtp.fc.weight": True,
    "model.visual.blocks.0.attn.qkv.weight": True,
    "model.layers.0.mlp.gate.weight": False,
    "model.layers.0.mlp.router.weight": False,
    "model.layers.0.mlp.shared_expert_gate.weight": False,
    "model.layers.0.input_layernorm.weight": False,
    "model.embed_tokens.weight": False,
    "lm_head.weight": False,
    "transformer.wte.weight": False,
    "shared.weight": False,
    "model.layers.0.self_attn.q_proj.bias": False,
}


def test_which_weights_are_packed(tmp_path: Path) -> None:
    """Linear layers and experts; not embeddings, head, routers, norms, biases, vectors, integers."""
    tensors = {name: np.ones((4, 8), np.float32) for name in NAMES}
    others = {
        "vector.weight": np.ones(8, np.float32),
        "integers.weight": np.ones((4, 8), np.int32),
        "score.weight": np.ones((1, 8), np.float32),
        "conv.weight": np.ones((4, 8, 3), np.float32),
        "empty.weight": np.ones((4, 0), np.float32),
    }
    opened = checkpoint.open(dense_folder(tmp_path / "s", {**tensors, **others}))
    assert set(select(opened)) == {name for name, linear in NAMES.items() if linear}
    assert set(select(opened, include=["*embed*", "score.*"])) - set(select(opened)) == {
        "model.embed_tokens.weight",
        "score.weight",
    }
    assert "lm_head.weight" not in select(opened, include=["*"], exclude=["lm_head*"])
    assert all(
        name.endswith("q_proj.weight") for name in select(opened, exclude=["*[!q]_proj*", "*experts*", "*fc*", "*qkv*"])
    )
    with pytest.raises(UsageError, match="--include with the name of a matrix of floats, found 'vector\\*'"):
        select(opened, include=["vector*"])


def test_a_packed_model_is_not_quantized_again(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "s", {"l.weight": gaussian(32, 64)})
    qformat.quantize(source, tmp_path / "q", codec="int", bits=4)  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="expected a dense model, found qformat") as caught:
        quantize(tmp_path / "q", tmp_path / "r", codec="int", bits=2)
    assert "--to dense" in caught.value.hint


@pytest.mark.parametrize(
    ("cols", "size"),
    [(4096, 512), (256, 64), (704, 64), (112, 16), (11008, 64), (14336, 256), (60, 4), (7, 1), (8, 8)],
)
def test_the_size_of_the_input_rotation(cols: int, size: int) -> None:
    assert in_size(cols) == size and cols % size == 0
    if cols % 8 == 0 and (cols // 8) % size == 0:
        assert cols // 8 >= size  # a matrix can be split eight ways


def test_weights_of_one_input_share_its_rotation() -> None:
    of = term("trellis", 2, True, L=8, code="mul1")
    parts = []
    for rows, seed in ((64, 1), (32, 2)):
        one = packed(gaussian(rows, 128, seed=seed), of, rotate="hadamard")
        parts.append(one.parts["in_scale"])
        assert one.entry.rotation is not None and dict(one.entry.rotation.sides())["in"].scale == "int8"
    np.testing.assert_array_equal(*parts)
    assert set(np.unique(signs("in", 4096))) == {-1, 1} and abs(int(signs("in", 4096).sum())) < 250
    assert (signs("in", 64) != signs("out", 64)).any()


def test_a_rotated_row_has_variance_one() -> None:
    of = term("int", 8)
    one = packed(outliers()[:64, :128], of, rotate="hadamard")
    assert one.entry.rotation is not None
    turned = rotation.apply(one.entry.rotation, outliers()[:64, :128], one.parts)
    np.testing.assert_allclose((turned**2).mean(), 1, rtol=0.01)


def test_settings_reach_every_param(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "s", {"l.weight": gaussian(32, 64)})
    found = quantize(source, tmp_path / "q", codec="int", bits=4, settings={"block": [1, 16], "offsets": "float16"})
    assert found["terms"][0]["block"] == [1, 16] and found["weights"][0]["stored_bits"] == 6
    entry = checkpoint.open(tmp_path / "q")["l.weight"].entry
    assert list(entry.terms) == found["terms"]
    with pytest.raises(UnsupportedError, match="packed parts"):
        quantize(source, tmp_path / "r", codec="int", bits=4, settings={"scales": {"codec": "int", "bits": 8}})


def test_progress_counts_the_bytes_of_the_source(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "s", {f"l.{i}.weight": gaussian(32, 64) for i in range(3)} | {"n": np.ones(5)})
    seen: list[tuple[int, int, str]] = []
    quantize(source, tmp_path / "q", codec="int", bits=4, progress=lambda *told: seen.append(told))
    total = sum(tensor.nbytes for tensor in Shard(source / "model.safetensors").tensors.values())
    assert [name for _, _, name in seen] == ["l.0.weight", "l.1.weight", "l.2.weight", "n"]
    assert seen[-1][:2] == (total, total) and [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_an_interrupt_leaves_what_is_finished(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "s", {f"l.{i}.weight": gaussian(32, 64) for i in range(3)})

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "q", codec="int", bits=4, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".q.partial", "s"]


def test_side_files_travel_and_left_overs_do_not(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "s", {"a.weight": gaussian(32, 64), "b.weight": gaussian(32, 64)})
    opened = checkpoint.open(source)
    plan, _, _ = read(opened)
    write.write(opened, plan, tmp_path / "t", write.account(opened, plan), packed=False, shard_bytes=9000)
    travel = ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"]
    travel += ["chat_template.jinja", "modeling_x.py", "additional_chat_templates/tool.jinja", "LICENSE"]
    stay = ["hf_quant_config.json", "quantize_config.json", "quanto_qmap.json", "consolidated.safetensors"]
    for name in travel:
        (tmp_path / "t" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "t" / name).write_bytes(name.encode() + b"\0\r\n")
    for name in stay:  # what an earlier quantization of the folder left
        (tmp_path / "t" / name).write_text('{"bits": 4, "a.weight": {"weights": "qint4"}}')
    found = quantize(tmp_path / "t", tmp_path / "q", codec="int", bits=4)
    assert (tmp_path / "t" / INDEX).exists() and len(found["weights"]) == 2
    arrived = {path.relative_to(tmp_path / "q").as_posix() for path in (tmp_path / "q").rglob("*") if path.is_file()}
    assert arrived == {*travel, "config.json", "model.safetensors"}
    for name in travel:
        assert (tmp_path / "q" / name).read_bytes() == name.encode() + b"\0\r\n"
    assert {file["name"] for file in found["files"] if file["fate"] == "left out"} == set(stay)


def test_memory_is_that_of_a_few_weights(tmp_path: Path) -> None:
    """Four times the weights take no more of it."""
    peaks = []
    for count in (8, 32):
        weights = {f"l.{i}.weight": gaussian(128, 512, seed=i) for i in range(count)}
        source = dense_folder(tmp_path / f"s{count}", weights)
        del weights
        tracemalloc.start()
        quantize(source, tmp_path / f"q{count}", codec="int", bits=4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
