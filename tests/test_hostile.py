"""Whatever a file holds: a named error, soon, in little memory; never another exception, never a changed number."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from making import additive_terms, e8p_terms, float_terms, int_terms, random_parts, table_terms, trellis_terms

from qformat import checkpoint, codecs, files, manifest
from qformat.dtypes import Array
from qformat.errors import QformatError
from qformat.records import read_json
from qformat.shards import Shard
from qformat.verify import verify

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 5  # a file needs some hundredths; the machine may be busy
BYTES = 64 << 20
pytestmark = pytest.mark.filterwarnings("error")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are those of Linux")


@pytest.fixture(scope="module")
def happened() -> dict[str, dict[str, Any]]:
    """What each hostile folder did to a process that may not use much memory."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, ROOT / "tests/hostile.py"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@linux
@pytest.mark.parametrize("case", hostile.CASES)
def test_a_named_error(case: str, happened: dict[str, dict[str, Any]]) -> None:
    kind, _, message = (hostile.CASES[case].__doc__ or "").strip().partition(": ")
    found = happened[case]
    assert found["kind"] == kind
    text = str(QformatError(**found["error"]))
    assert re.search(message, text), text
    assert found["error"]["file"] and found["error"]["expected"] and found["error"]["found"]
    assert found["seconds"] < SECONDS and found["bytes"] < BYTES


@linux
def test_the_sound_folder_is_sound(tmp_path: Path) -> None:
    """Without this every case above could be refused for a reason of its own."""
    path = hostile.sound(tmp_path / "m")
    assert verify(checkpoint.open(path)) == []
    hostile.tensors(path, lambda arrays: None)
    hostile.config(path, lambda settings: None)
    hostile.sums(path, lambda found: None)
    hostile.index(path, dict.fromkeys(Shard(path / files.SINGLE).tensors, files.SINGLE))
    assert verify(checkpoint.open(path)) == []


CODES = [  # case, command, exit code
    ("an_unknown_codec", "inspect", 4),
    ("an_unknown_codec", "verify", 4),
    ("an_unknown_version", "convert", 4),
    ("an_unknown_field", "inspect", 3),
    ("a_key_twice", "convert", 3),
    ("a_flipped_bit", "verify", 3),
    ("a_scale_that_is_no_number", "verify", 3),
    ("header_of_terabytes", "convert", 3),
    ("braces_of_billions", "inspect", 3),
    ("a_pickle", "verify", 4),
]


@pytest.mark.parametrize(("case", "command", "code"), CODES)
def test_the_exit_code(case: str, command: str, code: int, tmp_path: Path) -> None:
    path = hostile.sound(tmp_path / "m")
    hostile.CASES[case](path)
    words = [
        sys.executable,
        "-m",
        "qformat",
        command,
        str(path),
        *([str(tmp_path / "d")] if command == "convert" else []),
    ]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"error: {path}") and "expected" in lines[0] and "found" in lines[0]
    assert "Traceback" not in done.stderr and not (tmp_path / "d").exists()
    assert sorted(os.listdir(tmp_path)) == ["m"]


def everything(path: Path) -> dict[str, Array]:
    """Every number of a folder; :class:`QformatError` where ``verify`` finds fault with it."""
    opened = checkpoint.open(path)
    for problem in verify(opened) if opened.manifest is not None else ():
        raise problem
    for shard in opened.shards:
        shard.check()
    found = {name: opened[name].decode() for name in opened}
    return found | {name: np.array(opened.array(name)) for name in opened.tensors}


Sound = tuple[Path, bytes, str, dict[str, Array]]  # the folder, its shard, its config, what it holds


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    path = hostile.sound(tmp_path_factory.mktemp("sound") / "m")
    return path, (path / files.SINGLE).read_bytes(), (path / files.CONFIG).read_text(), everything(path)


@settings(max_examples=200)
@given(st.data())
def test_no_flipped_bit_of_a_shard_changes_a_number(sound: Sound, data: st.DataObject) -> None:
    path, good, config, want = sound
    (path / files.CONFIG).write_text(config)
    place = data.draw(st.integers(0, 8 * len(good) - 1))
    bad = bytearray(good)
    bad[place // 8] ^= 1 << place % 8
    (path / files.SINGLE).write_bytes(bad)
    try:
        found = everything(path)
    except QformatError as error:
        in_data = place // 8 >= 8 + int.from_bytes(good[:8], "little")
        assert not in_data or "checksum" in str(error)
        return
    assert found.keys() == want.keys()
    for name, array in want.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes(), (name, place)


def test_every_byte_of_the_data_is_covered_by_a_checksum(sound: Sound) -> None:
    path, good, config, _ = sound
    (path / files.CONFIG).write_text(config)
    (path / files.SINGLE).write_bytes(good)
    shard = Shard(path / files.SINGLE)
    for name, tensor in shard.tensors.items():
        for place in {tensor.start, tensor.stop - 1}:
            bad = bytearray(good)
            bad[place] ^= 1
            (path / files.SINGLE).write_bytes(bad)
            problems = [str(problem) for problem in verify(checkpoint.open(path))]
            assert any(f": {name}: expected checksum" in problem for problem in problems)


@given(st.binary(max_size=200))
def test_random_bytes_are_no_shard(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("m") / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(QformatError):
        checkpoint.open(path)
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    try:
        assert not checkpoint.open(path).tensors
    except QformatError:
        pass


@settings(max_examples=100)
@given(st.data())
def test_a_shard_with_random_bytes_in_it(sound: Sound, data: st.DataObject) -> None:
    path, good, config, want = sound
    (path / files.CONFIG).write_text(config)
    start = data.draw(st.integers(0, len(good) - 1))
    stop = data.draw(st.integers(start, min(len(good), start + 40)))
    (path / files.SINGLE).write_bytes(good[:start] + data.draw(st.binary(max_size=40)) + good[stop:])
    try:
        found = everything(path)
    except QformatError:
        return
    assert all(found[name].tobytes() == want[name].tobytes() for name in want.keys() & found.keys())


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.sampled_from([0, 1, 2, 4, 8, 16, -1, 2**31, 2**40, 2**63]),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["int", "table", "trellis", "float16", "int32", "nf4", "{0..9}", "l.0.weight", "../x", "\0"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(["codec", "bits", "size", "a"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for key, one in inner for place in places(one, (*here, key)))]


def replaced(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    inner = replaced(value[place[0]], place[1:], new)
    if isinstance(value, dict):
        return {**value, place[0]: inner}
    return [inner if i == place[0] else one for i, one in enumerate(value)]


@settings(max_examples=150)
@given(st.data())
def test_a_manifest_with_anything_in_it(sound: Sound, data: st.DataObject) -> None:
    path, good, config, _ = sound
    (path / files.SINGLE).write_bytes(good)
    found = json.loads(config)
    for _ in range(data.draw(st.integers(1, 2))):
        found = replaced(found, data.draw(st.sampled_from(places(found))), data.draw(json_values))
    (path / files.CONFIG).write_text(json.dumps(found))
    try:
        everything(path)
    except QformatError as error:
        assert error.exit_code in (3, 4)
        assert str(error) and "\n" not in str(error)


@settings(max_examples=150)
@given(st.data())
def test_a_config_with_random_bytes_in_it(sound: Sound, data: st.DataObject) -> None:
    path, good, config, _ = sound
    (path / files.SINGLE).write_bytes(good)
    text = config.encode()
    start = data.draw(st.integers(0, len(text) - 1))
    new = data.draw(st.one_of(st.binary(max_size=3), st.sampled_from([b'"', b"{", b"]", b"9" * 400, b"1e999", b"NaN"])))
    (path / files.CONFIG).write_bytes(text[:start] + new + text[start + data.draw(st.integers(0, 3)) :])
    try:
        everything(path)
    except QformatError as error:
        assert error.exit_code in (3, 4)


@given(st.one_of(st.text(max_size=60), st.binary(max_size=60)))
def test_any_text_is_json_or_refused(text: str | bytes) -> None:
    try:
        found = read_json(text)
    except QformatError:
        return
    json.dumps(found, ensure_ascii=False).encode()  # what is read can be written


SHAPE = 16, 32
terms = st.one_of(
    additive_terms(SHAPE),
    e8p_terms(SHAPE),
    float_terms(SHAPE),
    int_terms(SHAPE),
    table_terms(SHAPE),
    trellis_terms(),
)


@settings(max_examples=200)
@given(terms, st.data())
def test_any_params_are_refused_or_decode(term: dict[str, Any], data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(0, 3))):
        more = ["bits", "block", "scales", "view", "zeros", "table", "taps", "tile", "books"]
        key = data.draw(st.sampled_from([*term, *more]))
        term = {**term, key: data.draw(json_values)}
    try:
        codec, params = codecs.read_params(term)
        parts = codec.layout(params, SHAPE)
    except QformatError:
        return
    assert all(isinstance(size, int) and size > 0 for part in parts for size in part.shape)
    assume(all(isinstance(part.dtype, str) for part in parts))
    assume(sum(part.nbytes for part in parts) < 1 << 20)
    arrays = random_parts(np.random.default_rng(0), params, SHAPE)
    try:
        codec.check(params, SHAPE, arrays)
    except QformatError:
        return
    with np.errstate(over="ignore", invalid="ignore"):
        values = codec.decode(params, SHAPE, arrays)
    assert values.shape == SHAPE and values.dtype == np.float32


@given(json_values)
def test_anything_is_a_manifest_or_refused(value: Any) -> None:
    with pytest.raises(QformatError):
        manifest.read(value)
