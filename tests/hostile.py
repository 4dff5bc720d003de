"""Hostile folders, one function each. Run as a program: try every one under a memory limit and print what happened.

A function takes a sound folder (see ``sound``) and spoils it; its docstring is the error that must name the damage.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from making import entry, folder, packed

from qformat import checkpoint, files
from qformat.converters import report
from qformat.dtypes import SAFETENSORS, Array, name_of
from qformat.errors import QformatError
from qformat.shards import Shard, ShardWriter, Spec

MEMORY = 256 << 20  # bytes of address space beyond what the interpreter has when it starts
CASES: dict[str, Callable[[Path], object]] = {}
INT = {"codec": "int", "bits": 4, "zero": 8, "block": [1, 16]}
ORDER = "c0 c1 c2 c3 r0 r1 r2 r3"


def sound(path: Path) -> Path:
    """A small folder of every codec that is in order."""
    rng = np.random.default_rng(0)
    entries = {
        "l.0.weight": entry((8, 32), INT),
        "l.1.weight": entry((8, 32), {**INT, "groups": "int32", "zero": 0, "zeros": "uint8"}),
        "t.weight": entry((8, 32), {"codec": "table", "bits": 4, "table": "float16", "scales": "float32"}),
        "r.weight": entry(
            (16, 32),
            {"codec": "trellis", "L": 10, "bits": [2], "code": "mul1", "order": ORDER, "scales": "float16"},
            rotation={"in": {"size": 16, "scale": "float16"}, "out": {"size": 1, "perm": "int32"}},
        ),
    }
    weights = {name: packed(rng, one, name) for name, one in entries.items()}
    return folder(path, weights, {"norm.weight": np.ones(32, np.float32), "b": np.arange(3, dtype=np.int64)})


def hostile(spoil: Callable[[Path], object]) -> Callable[[Path], object]:
    CASES[spoil.__name__] = spoil
    return spoil


def shard(path: Path) -> tuple[dict[str, Any], bytes]:
    data = (path / files.SINGLE).read_bytes()
    stop = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:stop]), data[stop:]


def write(path: Path, header: object, data: bytes, length: int | None = None) -> None:
    """A shard with this header, as JSON or as it is, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = (len(text) if length is None else length).to_bytes(8, "little")
    (path / files.SINGLE).write_bytes(size + text + data)


def header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    found, data = shard(path)
    change(found)
    write(path, found, data)


def tensor(path: Path, name: str = "b", **fields: Any) -> None:
    header(path, lambda found: found[name].update(fields))


def tensors(path: Path, change: Callable[[dict[str, Array]], object]) -> None:
    """The shard anew, with right checksums, after ``change`` to its arrays."""
    old = Shard(path / files.SINGLE)
    arrays = {name: np.array(old.array(name)) for name in old.tensors}
    change(arrays)
    specs = {name: Spec(_tag(array), array.shape) for name, array in arrays.items()}
    with ShardWriter(path / files.SINGLE, specs, {"format": "pt"}) as out:
        for name, array in arrays.items():
            out.put(name, array)


def _tag(array: Array) -> str:
    return SAFETENSORS[name_of(array.dtype)]


def config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads((path / files.CONFIG).read_text())
    change(found[checkpoint.KEY])
    (path / files.CONFIG).write_text(json.dumps(found))


def of(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in settings["entries"] if one["weights"] == [name])


def field(path: Path, weight: str, **fields: Any) -> None:
    config(path, lambda found: of(found, weight).update(fields))


def term(path: Path, weight: str, **fields: Any) -> None:
    config(path, lambda found: of(found, weight)["terms"][0].update(fields))


def index(path: Path, names: Any) -> None:
    (path / files.INDEX).write_text(json.dumps({"weight_map": names}))


# Shards


@hostile
def truncated(path: Path) -> None:
    """DamagedError: model.safetensors: expected a file of .* truncated"""
    (path / files.SINGLE).write_bytes((path / files.SINGLE).read_bytes()[:-1])


@hostile
def truncated_in_the_header(path: Path) -> None:
    """DamagedError: model.safetensors: expected a header within the file's 100 bytes"""
    (path / files.SINGLE).write_bytes((path / files.SINGLE).read_bytes()[:100])


@hostile
def empty(path: Path) -> None:
    """DamagedError: model.safetensors: expected a header within the file's 0 bytes"""
    (path / files.SINGLE).write_bytes(b"")


@hostile
def seven_bytes(path: Path) -> None:
    """DamagedError: model.safetensors: expected a header within the file's 7 bytes"""
    (path / files.SINGLE).write_bytes(b"\1" * 7)


@hostile
def bytes_to_spare(path: Path) -> None:
    """DamagedError: model.safetensors: expected a file of .* bytes to spare"""
    (path / files.SINGLE).write_bytes((path / files.SINGLE).read_bytes() + b"\0")


@hostile
def header_of_terabytes(path: Path) -> None:
    """DamagedError: model.safetensors: expected a header within .* found 7000000000000 bytes"""
    write(path, {}, b"", length=7_000_000_000_000)


@hostile
def header_of_all_there_is(path: Path) -> None:
    """DamagedError: found 18446744073709551615 bytes"""
    write(path, {}, b"", length=2**64 - 1)


@hostile
def header_beyond_the_limit(path: Path) -> None:
    """DamagedError: expected a header of at most 100000000 bytes, found 150000000 bytes"""
    write(path, b"", b"", length=150_000_000)
    os.truncate(path / files.SINGLE, 200_000_000)  # takes no disk


@hostile
def header_that_is_no_json(path: Path) -> None:
    """DamagedError: model.safetensors: expected JSON"""
    write(path, b"{'a': 1}", b"")


@hostile
def header_that_is_no_text(path: Path) -> None:
    """DamagedError: model.safetensors: expected JSON"""
    write(path, b"\xff\xfe\xfd", b"")


@hostile
def header_that_is_a_list(path: Path) -> None:
    """DamagedError: model.safetensors: expected a JSON object as header, found list"""
    write(path, [], b"")


@hostile
def header_nested_deep(path: Path) -> None:
    """DamagedError: model.safetensors: expected JSON"""
    write(path, b"[" * 1_000_000, b"")


@hostile
def header_nested_as_deep_as_python_can(path: Path) -> None:
    """DamagedError: model.safetensors: expected JSON of at most 64 levels"""
    write(path, b'{"a":' * 500 + b"1" + b"}" * 500, b"")


@hostile
def half_a_character(path: Path) -> None:
    """DamagedError: model.safetensors: expected JSON"""
    write(path, b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"")


@hostile
def a_number_of_many_digits(path: Path) -> None:
    """DamagedError: model.safetensors: expected JSON"""
    write(path, b'{"a":{"dtype":"U8","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,0]}}', b"")


@hostile
def a_name_of_many_digits(path: Path) -> None:
    """DamagedError: l.0.weight: expected part codes, found none"""
    header(path, lambda found: found.update({"9" * 10_000: found.pop("l.0.weight_codes"), "__metadata__": {}}))


@hostile
def the_same_tensor_twice(path: Path) -> None:
    """DamagedError: model.safetensors: expected every JSON key once, found 'b' twice"""
    found, data = shard(path)
    text = json.dumps(found)
    write(path, (text[:-1] + ', "b": ' + json.dumps(found["b"]) + "}").encode(), data)


@hostile
def the_same_bytes_twice(path: Path) -> None:
    """DamagedError: model.safetensors: c: expected data at byte .* overlaps b"""
    header(path, lambda found: found.update(c=found["b"]))


@hostile
def a_hole(path: Path) -> None:
    """DamagedError: model.safetensors: .*: expected data at byte .* leaves a hole after"""
    header(path, lambda found: found.pop("norm.weight"))


@hostile
def data_beyond_the_file(path: Path) -> None:
    """DamagedError: model.safetensors: .*: expected data at byte .* leaves a hole after"""
    tensor(path, data_offsets=[2**50, 2**50 + 24])


@hostile
def data_that_ends_before_it_starts(path: Path) -> None:
    """DamagedError: model.safetensors: b: expected 24 bytes for I64 \\[3\\], found -24"""
    found, _ = shard(path)
    tensor(path, data_offsets=found["b"]["data_offsets"][::-1])


@hostile
def a_negative_size(path: Path) -> None:
    """DamagedError: model.safetensors: b: expected shape and data_offsets of non-negative integers"""
    tensor(path, shape=[-3])


@hostile
def a_true_size(path: Path) -> None:
    """DamagedError: model.safetensors: b: expected shape and data_offsets of non-negative integers"""
    tensor(path, shape=[3, True])


@hostile
def a_size_that_is_a_float(path: Path) -> None:
    """DamagedError: model.safetensors: b: expected shape and data_offsets of non-negative integers"""
    tensor(path, shape=[3.0])


@hostile
def a_size_beyond_64_bits(path: Path) -> None:
    """DamagedError: model.safetensors: b: expected .* non-negative integers"""
    tensor(path, shape=[2**64 + 3])


@hostile
def a_product_beyond_64_bits(path: Path) -> None:
    """DamagedError: model.safetensors: b: expected a shape of fewer than 2\\*\\*56 elements"""
    tensor(path, shape=[2**32, 2**32, 3])


@hostile
def nothing_times_everything(path: Path) -> None:
    """DamagedError: model.safetensors: z: expected a shape of fewer than 2\\*\\*56 elements"""
    header(path, lambda found: found.update(z={"dtype": "U8", "shape": [0, 2**61], "data_offsets": [0, 0]}))


@hostile
def a_tensor_of_exabytes(path: Path) -> None:
    """DamagedError: model.safetensors: b: expected 80000000000000000 bytes for I64"""
    tensor(path, shape=[10**16])


@hostile
def too_many_axes(path: Path) -> None:
    """DamagedError: model.safetensors: b: expected shape and"""
    tensor(path, shape=[3] + [1] * 100_000)


@hostile
def an_unknown_dtype(path: Path) -> None:
    """UnsupportedError: model.safetensors: b: expected a known dtype, found 'Q4'"""
    tensor(path, dtype="Q4")


@hostile
def a_dtype_that_is_a_list(path: Path) -> None:
    """UnsupportedError: model.safetensors: b: expected a known dtype"""
    tensor(path, dtype=["I64"])


@hostile
def a_tensor_without_a_shape(path: Path) -> None:
    """DamagedError: model.safetensors: b: expected dtype, shape and data_offsets"""
    header(path, lambda found: found["b"].pop("shape"))


@hostile
def a_tensor_with_more(path: Path) -> None:
    """DamagedError: model.safetensors: b: expected dtype, shape and data_offsets"""
    tensor(path, more=1)


@hostile
def metadata_of_numbers(path: Path) -> None:
    """DamagedError: model.safetensors: expected __metadata__ from strings to strings"""
    header(path, lambda found: found["__metadata__"].update(format=1))


@hostile
def metadata_that_is_a_list(path: Path) -> None:
    """DamagedError: model.safetensors: expected __metadata__ from strings to strings"""
    header(path, lambda found: found.update(__metadata__=[]))


@hostile
def checksums_that_are_no_json(path: Path) -> None:
    """DamagedError: model.safetensors: expected JSON"""
    header(path, lambda found: found["__metadata__"].update({"qformat.checksums": "{"}))


@hostile
def checksums_that_are_a_list(path: Path) -> None:
    """DamagedError: model.safetensors: expected checksums by tensor name, found list"""
    header(path, lambda found: found["__metadata__"].update({"qformat.checksums": "[]"}))


@hostile
def a_checksum_less(path: Path) -> None:
    """DamagedError: model.safetensors: b: expected a checksum of every tensor, found none"""
    sums(path, lambda found: found.pop("b"))


@hostile
def a_checksum_more(path: Path) -> None:
    """DamagedError: model.safetensors: c: expected a checksum of every tensor, found one of no tensor"""
    sums(path, lambda found: found.update(c="0" * 32))


@hostile
def a_checksum_of_lists(path: Path) -> None:
    """DamagedError: model.safetensors: b: expected checksum \\[\\[5\\]\\], found"""
    sums(path, lambda found: found.update(b=[[5]]))


def sums(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    found, data = shard(path)
    stored = json.loads(found["__metadata__"]["qformat.checksums"])
    change(stored)
    found["__metadata__"]["qformat.checksums"] = json.dumps(stored)
    write(path, found, data)


@hostile
def a_flipped_bit(path: Path) -> None:
    """DamagedError: model.safetensors: .*: expected checksum [0-9a-f]{32}, found [0-9a-f]{32}"""
    data = bytearray((path / files.SINGLE).read_bytes())
    data[-30] ^= 16
    (path / files.SINGLE).write_bytes(data)


# Parts and their numbers


@hostile
def a_part_less(path: Path) -> None:
    """DamagedError: l.0.weight: expected part scales, found none"""
    tensors(path, lambda found: found.pop("l.0.weight_scales"))


@hostile
def a_part_more(path: Path) -> None:
    """DamagedError: l.0.weight: expected no part that the layout lacks, found l.0.weight_zeros"""
    tensors(path, lambda found: found.update({"l.0.weight_zeros": np.zeros(3, np.uint8)}))


@hostile
def a_part_of_another_dtype(path: Path) -> None:
    """DamagedError: l.0.weight: expected part scales float16 \\[8, 2\\], found float32 \\[8, 2\\]"""
    tensors(path, lambda found: found.update({"l.0.weight_scales": np.ones((8, 2), np.float32)}))


@hostile
def a_part_of_another_shape(path: Path) -> None:
    """DamagedError: l.0.weight: expected part codes uint8 \\[8, 16\\], found uint8 \\[16, 8\\]"""
    tensors(path, lambda found: found.update({"l.0.weight_codes": np.zeros((16, 8), np.uint8)}))


@hostile
def a_part_that_numpy_cannot_hold(path: Path) -> None:
    """UnsupportedError: b2: expected a dtype that can be computed with, found F4"""
    tensors(path, lambda found: found.update({"b2": np.zeros(4, np.uint8)}))
    header(path, lambda found: found["b2"].update(dtype="F4", shape=[8]))
    opened = checkpoint.open(path)
    opened.array("b2")


@hostile
def a_scale_that_is_no_number(path: Path) -> None:
    """DamagedError: l.0.weight: expected finite scales, found 1 that are not"""
    tensors(path, lambda found: found["l.0.weight_scales"].__setitem__((3, 1), np.nan))


@hostile
def an_infinite_scale(path: Path) -> None:
    """DamagedError: r.weight: expected finite scales, found 16 that are not"""
    tensors(path, lambda found: found["r.weight_scales"].fill(np.inf))


@hostile
def an_infinite_table(path: Path) -> None:
    """DamagedError: t.weight: expected finite table, found 16 that are not"""
    tensors(path, lambda found: found["t.weight_table"].fill(np.inf))


@hostile
def values_beyond_float32(path: Path) -> None:
    """DamagedError: t.weight: expected finite values, found an infinity or NaN"""
    tensors(path, lambda found: (found["t.weight_scales"].fill(3e38), found["t.weight_table"].fill(9)))


@hostile
def groups_out_of_range(path: Path) -> None:
    """DamagedError: l.1.weight: expected groups from 0 to 1, found 2147483647"""
    tensors(path, lambda found: found["l.1.weight_groups"].__setitem__(7, 2**31 - 1))


@hostile
def negative_groups(path: Path) -> None:
    """DamagedError: l.1.weight: expected groups from 0 to 1, found -1"""
    tensors(path, lambda found: found["l.1.weight_groups"].__setitem__(7, -1))


@hostile
def a_permutation_that_is_none(path: Path) -> None:
    """DamagedError: r.weight: expected out_perm with every index from 0 to 15 once"""
    tensors(path, lambda found: found["r.weight_out_perm"].__setitem__(0, 10**9))


@hostile
def a_rotation_scale_that_is_no_number(path: Path) -> None:
    """DamagedError: r.weight: expected a finite in_scale"""
    tensors(path, lambda found: found["r.weight_in_scale"].fill(np.nan))


# The manifest


@hostile
def an_unknown_codec(path: Path) -> None:
    """UnsupportedError: config.json: l.0.weight: expected one of the codecs .* found 'int5'"""
    term(path, "l.0.weight", codec="int5")


@hostile
def a_codec_in_another_folder(path: Path) -> None:
    """UnsupportedError: config.json: l.0.weight: expected one of the codecs"""
    term(path, "l.0.weight", codec="..manifest")


@hostile
def an_unknown_version(path: Path) -> None:
    """UnsupportedError: config.json: expected format version 0.1, found '0.9'"""
    config(path, lambda found: found.update(version="0.9"))


@hostile
def an_unknown_field(path: Path) -> None:
    """DamagedError: config.json: l.0.weight: expected known keys, found `colour`"""
    field(path, "l.0.weight", colour="red")


@hostile
def an_unknown_param(path: Path) -> None:
    """DamagedError: config.json: l.0.weight: expected known keys, found `colour`"""
    term(path, "l.0.weight", colour="red")


@hostile
def a_key_twice(path: Path) -> None:
    """DamagedError: config.json: expected every JSON key once, found 'bits' twice"""
    text = (path / files.CONFIG).read_text()
    (path / files.CONFIG).write_text(text.replace('"bits": 4', '"bits": 4, "bits": 4', 1))


@hostile
def braces_of_billions(path: Path) -> None:
    """DamagedError: config.json: expected at most .* weights, found 1000000000000000000 more"""
    field(path, "l.0.weight", weights=["{0..999999999}.{0..999999999}.weight"])


@hostile
def braces_without_end(path: Path) -> None:
    """DamagedError: config.json: expected at most 8 ranges in a weight name, found 200000"""
    field(path, "l.0.weight", weights=["{0..9}" * 200_000])


@hostile
def thousands_of_entries(path: Path) -> None:
    """DamagedError: config.json: l.0.weight: expected every weight in one entry, found in two"""
    config(path, lambda found: found["entries"].extend([found["entries"][0]] * 2_000))


@hostile
def entries_nested_deep(path: Path) -> None:
    """DamagedError: config.json: expected JSON"""
    (path / files.CONFIG).write_text('{"quantization_config": ' + '{"a": ' * 200_000)


@hostile
def terms_in_terms(path: Path) -> None:
    """DamagedError: config.json: l.0.weight: expected at most 2 levels of packed parts"""
    scales: Any = "float16"
    for _ in range(10):
        scales = {**INT, "scales": scales}
    term(path, "l.0.weight", scales=scales)


@hostile
def a_shape_beyond_64_bits(path: Path) -> None:
    """DamagedError: l.0.weight: expected part codes uint8 \\[1099511627776, .*\\], found uint8 \\[8, 16\\]"""
    field(path, "l.0.weight", shape=[2**40] * 8)


@hostile
def a_stack_beyond_64_bits(path: Path) -> None:
    """DamagedError: l.0.weight: expected part codes"""
    field(path, "l.0.weight", shape=[2**40] * 6, stack=4)


@hostile
def a_stored_shape_of_exabytes(path: Path) -> None:
    """DamagedError: r.weight: expected part codes uint8 \\[68719476736, 68719476736, 64\\], found"""
    field(path, "r.weight", stored_shape=[2**40, 2**40])


@hostile
def a_shape_of_many_axes(path: Path) -> None:
    """DamagedError: config.json: l.0.weight: expected `array` of length <= 8"""
    field(path, "l.0.weight", shape=[1] * 100_000)


@hostile
def bits_that_are_true(path: Path) -> None:
    """DamagedError: config.json: l.0.weight: expected `int` at `\\$.bits`, found `bool`"""
    term(path, "l.0.weight", bits=True)


@hostile
def bits_that_are_a_string(path: Path) -> None:
    """DamagedError: config.json: l.0.weight: expected `int` at `\\$.bits`, found `str`"""
    term(path, "l.0.weight", bits="4")


@hostile
def bits_of_many_digits(path: Path) -> None:
    """DamagedError: config.json: l.0.weight: expected `int` <= 8 at `\\$.bits`, found 1000"""
    term(path, "l.0.weight", bits=10**4000)


@hostile
def a_block_beyond_64_bits(path: Path) -> None:
    """DamagedError: l.0.weight: expected part scales float16 \\[1, 1\\], found float16 \\[8, 2\\]"""
    term(path, "l.0.weight", block=[2**100, 2**100])


@hostile
def a_view_beyond_64_bits(path: Path) -> None:
    """DamagedError: l.0.weight: expected view of 256 elements"""
    term(path, "l.0.weight", view=[2**100, 1])


@hostile
def a_zero_that_is_no_number(path: Path) -> None:
    """DamagedError: config.json: l.0.weight: expected `float` .* at `\\$.zero`, found nan"""
    term(path, "l.0.weight", zero=float("nan"))


@hostile
def an_infinite_zero(path: Path) -> None:
    """DamagedError: config.json: l.0.weight: expected `float` .* at `\\$.zero`, found inf"""
    term(path, "l.0.weight", zero=float("inf"))


@hostile
def taps_beyond_the_state(path: Path) -> None:
    """DamagedError: config.json: r.weight: expected"""
    term(path, "r.weight", code="hash", taps=[10**9], index=[2, 2], table="hash-16")


@hostile
def a_tile_beyond_the_matrix(path: Path) -> None:
    """DamagedError: r.weight: expected rows and columns in whole 64 x 64 tiles, found 16 x 32"""
    term(path, "r.weight", tile=[64, 64], order=" ".join(f"r{i} c{i}" for i in range(6)))


@hostile
def an_order_without_end(path: Path) -> None:
    """DamagedError: config.json: r.weight: expected an order of the bits"""
    term(path, "r.weight", order="r0 " * 200_000)


@hostile
def a_table_in_another_folder(path: Path) -> None:
    """UnsupportedError: config.json: t.weight: expected one of the tables .* found ../../config"""
    term(path, "t.weight", table="../../config")


@hostile
def a_rotation_beyond_the_matrix(path: Path) -> None:
    """DamagedError: r.weight: expected a rotation size that divides 32, found 1099511627776"""
    field(path, "r.weight", rotation={"in": {"size": 2**40}})


@hostile
def a_matrix_of_exabytes(path: Path) -> None:
    """DamagedError: r.weight: expected a rotation size that divides 32"""
    field(path, "r.weight", rotation={"in": {"size": 2**62, "matrix": "float64"}})


@hostile
def a_weight_that_is_not_there(path: Path) -> None:
    """DamagedError: x.weight: expected part codes, found none"""
    field(path, "l.0.weight", weights=["x.weight"])


@hostile
def a_weight_in_two_entries(path: Path) -> None:
    """DamagedError: config.json: l.1.weight: expected every weight in one entry, found in two"""
    field(path, "l.0.weight", weights=["l.{0..1}.weight"])


@hostile
def an_alias_of_nothing(path: Path) -> None:
    """DamagedError: config.json: a: expected an alias of a packed weight, stored once, found 'x'"""
    config(path, lambda found: found.update(aliases={"a": "x"}))


@hostile
def counts_that_do_not_add_up(path: Path) -> None:
    """DamagedError: expected 5 source tensors accounted for, found 4"""
    config(path, lambda found: found.update(provenance={"source": {"tensors": 5, "consumed": 2, "passed": 1,
                                                                   "left_out": ["x"]}}))  # fmt: skip


@hostile
def counts_that_are_no_numbers(path: Path) -> None:
    """DamagedError: config.json: expected `int` at `\\$.tensors`, found `str`"""
    config(path, lambda found: found.update(provenance={"source": {"tensors": "5", "consumed": 2, "passed": 1,
                                                                   "left_out": []}}))  # fmt: skip


@hostile
def settings_that_are_a_list(path: Path) -> None:
    """DamagedError: config.json: expected quantization settings as an object, found list"""
    found = json.loads((path / files.CONFIG).read_text())
    (path / files.CONFIG).write_text(json.dumps({**found, checkpoint.KEY: [1]}))


# The folder


@hostile
def an_index_that_leads_out(path: Path) -> None:
    """DamagedError: index.json: expected the name of a file in this folder, found '../model.safetensors'"""
    index(path, {"b": "../model.safetensors"})


@hostile
def an_index_to_the_root(path: Path) -> None:
    """DamagedError: index.json: expected the name of a file in this folder, found '/etc/passwd'"""
    index(path, {"b": "/etc/passwd"})


@hostile
def an_index_to_a_folder(path: Path) -> None:
    """DamagedError: sub: expected a weight file, found none"""
    (path / "sub").mkdir()
    index(path, {"b": "sub"})


@hostile
def an_index_to_the_config(path: Path) -> None:
    """DamagedError: config.json: expected a header within"""
    index(path, {"b": "config.json"})


@hostile
def an_index_of_another_tensor(path: Path) -> None:
    """DamagedError: index.json: x: expected the tensor in model.safetensors, as the index says, found none"""
    index(path, dict.fromkeys([*Shard(path / files.SINGLE).tensors, "x"], files.SINGLE))


@hostile
def a_shard_that_would_be_waited_for(path: Path) -> None:
    """DamagedError: pipe.safetensors: expected a weight file, found none"""
    (path / files.SINGLE).unlink()
    os.mkfifo(path / "pipe.safetensors")


@hostile
def a_link_to_nowhere(path: Path) -> None:
    """DamagedError: model.safetensors: expected a weight file, found none|expected weights: .*, found none"""
    (path / files.SINGLE).unlink()
    (path / files.SINGLE).symlink_to(path / "nowhere")


@hostile
def a_pointer(path: Path) -> None:
    """DamagedError: model.safetensors: expected a file, found a Git LFS pointer to one"""
    (path / files.SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@hostile
def two_candidates(path: Path) -> None:
    """DamagedError: expected model.safetensors.index.json beside several weight files, found a.safetensors, b.safet"""
    (path / files.SINGLE).rename(path / "a.safetensors")
    (path / "b.safetensors").write_bytes((path / "a.safetensors").read_bytes())


@hostile
def a_pickle(path: Path) -> None:
    """UnsupportedError: expected weights in safetensors, found pytorch_model.bin, a pickle"""
    (path / files.SINGLE).unlink()
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


def happened(spoil: Callable[[Path], object], of: Path) -> dict[str, Any]:
    """Spoil a copy of a folder and verify it: the error, and the seconds and bytes of memory that it took."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(shutil.copytree(of, Path(name) / "m"))
        kind, error = "none", None
        started, before = time.monotonic(), 0
        try:
            spoil(path)
            tracemalloc.reset_peak()
            started, before = time.monotonic(), tracemalloc.get_traced_memory()[0]
            if problems := report.verify(path)["problems"]:
                kind, error = "DamagedError", problems[0]
        except QformatError as problem:
            kind, error = type(problem).__name__, problem.as_json()
        took = {"seconds": time.monotonic() - started, "bytes": tracemalloc.get_traced_memory()[1] - before}
        return {"kind": kind, "error": error, **took}


def main() -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        path = sound(Path(name) / "m")
        report.verify(path)  # what is imported and cached is not the file's
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        seconds = {case: happened(spoil, path)["seconds"] for case, spoil in CASES.items()}
        tracemalloc.start()  # which slows everything down
        return {case: {**happened(spoil, path), "seconds": seconds[case]} for case, spoil in CASES.items()}


if __name__ == "__main__":
    json.dump(main(), sys.stdout)
