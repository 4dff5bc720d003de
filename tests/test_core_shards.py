"""safetensors files: what the writer writes, what the reader takes. Damaged ones are in test_hostile.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from making import seeds

from qformat import shards
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError, UnsupportedError
from qformat.shards import Shard, ShardWriter, Spec

PLAIN = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
name = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
shape = st.lists(st.integers(0, 9), max_size=4).map(tuple)
tensors = st.dictionaries(
    name.filter(lambda text: text != "__metadata__"), st.tuples(st.sampled_from(PLAIN), shape), max_size=8
)


def write(path: Path, arrays: dict[str, Array]) -> bytes:
    specs = {name: shards.spec(array.dtype.name, array.shape) for name, array in arrays.items()}
    with ShardWriter(path, specs, {"format": "pt"}) as out:
        for name in sorted(arrays):  # any order will do
            out.put(name, arrays[name])
    return path.read_bytes()


def random(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Array:
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(np.bool_)
    size = int(np.prod(shape)) * NUMPY[dtype].itemsize
    return rng.integers(0, 256, size, np.uint8).view(NUMPY[dtype]).reshape(shape)


@given(tensors, seeds)
def test_a_shard_reads_back_to_the_byte(
    tmp_path_factory: pytest.TempPathFactory, found: dict[str, tuple[str, tuple[int, ...]]], rng: np.random.Generator
) -> None:
    path = tmp_path_factory.mktemp("shard") / "model.safetensors"
    arrays = {name: random(rng, dtype, shape) for name, (dtype, shape) in found.items()}
    data = write(path, arrays)
    shard = Shard(path)
    shard.check()
    assert shard.metadata["format"] == "pt" and shard.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert shard.array(name).dtype == array.dtype and shard.array(name).shape == array.shape
        assert shard.array(name).tobytes() == shard.raw(name).tobytes() == array.tobytes()
        assert shard.checksums() is not None and shard.checksums()[name] == shards.checksum(array)  # type: ignore[index]
    _check_order(data, shard)
    shuffled = dict(sorted(arrays.items(), reverse=True))
    assert write(path.with_name("again"), shuffled) == data


def _check_order(data: bytes, shard: Shard) -> None:
    """First what keeps the alignment, then the rest; header and data in the same order; data from a multiple of 64."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % 64 == 0
    assert next(iter(header)) == "__metadata__"
    names = list(header)[1:]
    starts = [shard.tensors[name].start for name in names]
    assert starts == sorted(starts)
    whole = [shard.tensors[name].nbytes % 64 == 0 for name in names]
    assert whole == sorted(whole, reverse=True)
    for name, aligned in zip(names, whole, strict=True):
        assert not aligned or shard.tensors[name].start % 64 == 0


@given(tensors, seeds)
def test_the_safetensors_library_reads_it(
    tmp_path_factory: pytest.TempPathFactory, found: dict[str, tuple[str, tuple[int, ...]]], rng: np.random.Generator
) -> None:
    arrays = {name: random(rng, dtype, shape) for name, (dtype, shape) in found.items() if dtype != "bfloat16"}
    path = tmp_path_factory.mktemp("shard") / "model.safetensors"
    write(path, arrays)
    read = safetensors.numpy.load_file(path)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype and read[name].tobytes() == array.tobytes()


def test_it_reads_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.int8), "c": np.zeros(0, np.float32)}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
    shard = Shard(tmp_path / "x.safetensors")
    assert shard.checksums() is None
    shard.check()
    for name, array in arrays.items():
        np.testing.assert_array_equal(shard.array(name), array)


def test_arrays_are_views_that_cannot_be_written(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match="read-only"):
        Shard(tmp_path / "x").array("a")[0] = 1


@pytest.mark.parametrize(("tag", "nbytes"), [("F4", 3), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_dtypes_below_a_byte_pass_through(tmp_path: Path, tag: str, nbytes: int) -> None:
    assert Spec(tag, (2, nbytes * 8 // 2 // {"F4": 4}.get(tag, 6))).nbytes == nbytes
    shape = (2, nbytes * 8 // 2 // {"F4": 4}.get(tag, 6))
    with ShardWriter(tmp_path / "x", {"a": Spec(tag, shape)}, {}) as out:
        out.put("a", np.arange(nbytes, dtype=np.uint8))
    shard = Shard(tmp_path / "x")
    assert shard.raw("a").tolist() == list(range(nbytes)) and shard.tensors["a"].shape == shape
    with pytest.raises(UnsupportedError, match="a: expected a dtype that can be computed with, found F"):
        shard.array("a")


def test_a_flipped_bit_of_a_tensor_is_named(tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "x", {"a": np.zeros(64, np.uint8), "b": np.zeros(64, np.uint8)}))
    data[-1] ^= 4
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(DamagedError, match="x: b: expected checksum [0-9a-f]{32}, found [0-9a-f]{32}"):
        Shard(tmp_path / "x").check()


def test_an_unfinished_shard_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), ShardWriter(tmp_path / "x", {"a": shards.spec("uint8", (1,))}, {}):
        pass


def test_the_header_is_deterministic_and_small(tmp_path: Path) -> None:
    data = write(tmp_path / "x", {"b": np.zeros(1, np.uint8), "a": np.zeros(1, np.uint8)})
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip(b" ")
    sums = r"{\"a\":\"SUM\",\"b\":\"SUM\"}".replace("SUM", shards.checksum(np.zeros(1, np.uint8)))
    a, b = ('"%s":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}' % one for one in (("a", 0, 1), ("b", 1, 2)))  # noqa: UP031
    assert header.decode() == f'{{"__metadata__":{{"format":"pt","qformat.checksums":"{sums}"}},{a},{b}}}'
