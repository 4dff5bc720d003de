"""Folders: which files are read and copied, which tensors belong to which weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from making import dense_folder, entry, folder, packed

from qformat import checkpoint, files
from qformat.errors import DamagedError, QformatError, UnsupportedError, UsageError
from qformat.verify import verify

INT: dict[str, Any] = {"codec": "int", "bits": 4, "zero": 8, "block": [1, 16]}
ONE = np.ones((2, 2), np.float32)


@pytest.fixture
def packed_folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    weights = {f"l.{i}.weight": packed(rng, entry((4, 32), INT), f"l.{i}.weight") for i in range(3)}
    return folder(tmp_path / "m", weights, {"norm.weight": ONE[0], "l.0.bias": ONE[1]})


def change(path: Path, **fields: Any) -> None:
    """Other keys in the manifest of a folder."""
    config = json.loads((path / "config.json").read_text())
    config[checkpoint.KEY].update(fields)
    (path / "config.json").write_text(json.dumps(config))


def test_a_folder_is_a_mapping_of_weights(packed_folder: Path) -> None:
    opened = checkpoint.open(packed_folder)
    assert list(opened) == ["l.0.weight", "l.1.weight", "l.2.weight"] and len(opened) == 3
    assert opened.weights["l.1.weight"].shape == (4, 32)
    assert sorted(opened.dense) == ["l.0.bias", "norm.weight"]
    assert opened.packed_tensors["l.2.weight_codes"] == "l.2.weight"
    assert opened.config == {"model_type": "test"} and opened.manifest is not None
    assert "l.9.weight" not in opened
    assert opened.nbytes == (packed_folder / "model.safetensors").stat().st_size
    assert verify(opened) == []


def test_parts_are_views_of_the_file(packed_folder: Path) -> None:
    parts = checkpoint.open(packed_folder)["l.0.weight"].parts
    for array in parts.values():
        assert not array.flags.owndata and not array.flags.writeable


def test_nothing_but_headers_is_read_on_opening(packed_folder: Path) -> None:
    path = packed_folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the last tensor
    path.write_bytes(data)
    problems = verify(checkpoint.open(packed_folder))
    assert len(problems) == 1 and "checksum" in str(problems[0])


def test_a_lone_file_carries_the_manifest_in_its_header(packed_folder: Path) -> None:
    settings = json.loads((packed_folder / "config.json").read_text())[checkpoint.KEY]
    arrays = {name: np.array(array) for name, array in _arrays(packed_folder).items()}
    lone = packed_folder / "lone.safetensors"
    safetensors.numpy.save_file(arrays, lone, {checkpoint.KEY: json.dumps(settings)})
    opened = checkpoint.open(lone)
    want = checkpoint.open(packed_folder)
    for name in want:
        np.testing.assert_array_equal(opened[name].decode(), want[name].decode())
    assert verify(opened) == [] and opened.files() == []


def _arrays(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_the_manifest_of_the_header_equals_that_of_the_config(packed_folder: Path) -> None:
    settings = json.loads((packed_folder / "config.json").read_text())[checkpoint.KEY]
    path, arrays = packed_folder / "model.safetensors", _arrays(packed_folder)
    safetensors.numpy.save_file(arrays, path, {checkpoint.KEY: json.dumps(settings, indent=3)})
    checkpoint.open(packed_folder)
    safetensors.numpy.save_file(arrays, path, {checkpoint.KEY: json.dumps({**settings, "version": "0.2"})})
    with pytest.raises(DamagedError, match="quantization_config of config.json, found another one in __metadata__"):
        checkpoint.open(packed_folder)


def test_an_alias_is_the_weight_that_it_names(packed_folder: Path) -> None:
    change(packed_folder, aliases={"head.weight": "l.0.weight"})
    opened = checkpoint.open(packed_folder)
    np.testing.assert_array_equal(opened["head.weight"].decode(), opened["l.0.weight"].decode())
    assert list(opened) == ["l.0.weight", "l.1.weight", "l.2.weight"]


@pytest.mark.parametrize("alias", [("a", "nothing"), ("norm.weight", "l.0.weight"), ("l.1.weight", "l.0.weight")])
def test_an_alias_that_is_none(packed_folder: Path, alias: tuple[str, str]) -> None:
    change(packed_folder, aliases=dict([alias]))
    with pytest.raises(DamagedError, match=f"config.json: {alias[0]}: expected an alias of a packed weight"):
        checkpoint.open(packed_folder)


def sharded(path: Path, shards: dict[str, dict[str, Any]], weight_map: dict[str, Any] | None = None) -> Path:
    path.mkdir()
    for file, arrays in shards.items():
        safetensors.numpy.save_file(arrays, path / file)
    found = {name: file for file, arrays in shards.items() for name in arrays}
    (path / files.INDEX).write_text(json.dumps({"weight_map": found if weight_map is None else weight_map}))
    return path


def test_shards_are_found_by_the_index(tmp_path: Path) -> None:
    shards = {"x-1.safetensors": {"a": ONE}, "x-2.safetensors": {"b": ONE, "c": ONE}}
    path = sharded(tmp_path / "m", shards)
    safetensors.numpy.save_file({"a": 2 * ONE}, path / "model.safetensors")  # beside an index: not read
    opened = checkpoint.open(path)
    assert sorted(opened.tensors) == ["a", "b", "c"] and opened.file_of("c").name == "x-2.safetensors"
    assert {file.name: file.fate for file in opened.files()}["model.safetensors"] == "left out"


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "x.safetensors"}, "x.safetensors: b: expected every tensor in the index"),
        ({"a": "x.safetensors", "b": "x.safetensors", "c": "x.safetensors"}, "index.json: c: .*as the index says"),
        ({"a": "x.safetensors", "b": "y.safetensors"}, "y.safetensors: expected a weight file, found none"),
        ({"a": "x.safetensors", "b": "../x.safetensors"}, "file in this folder, found '../x.safetensors'"),
        ({"a": "x.safetensors", "b": "/etc/passwd"}, "file in this folder, found '/etc/passwd'"),
        ({"a": "x.safetensors", "b": "s/../../x"}, "file in this folder"),
        ({"a": "x.safetensors", "b": "..\\\\x"}, "file in this folder"),
        ({"a": "x.safetensors", "b": "C:x"}, "file in this folder"),
        ({"a": "x.safetensors", "b": ""}, "file in this folder, found ''"),
        ({"a": "x.safetensors", "b": "."}, "file in this folder, found '.'"),
        ({"a": "x.safetensors", "b": "x\0"}, "file in this folder"),
        ({"a": "x.safetensors", "b": "n" * 5000}, "expected a weight file, found none"),
        ({"a": "x.safetensors", "b": 5}, "index.json: b: expected the name of a file, found 5"),
        ([], "weight_map from tensor names to file names, found \\[\\]"),
        ({}, "weight_map from tensor names to file names, found {}"),
    ],
)
def test_an_index_that_is_wrong(tmp_path: Path, weight_map: Any, message: str) -> None:
    path = sharded(tmp_path / "m", {"x.safetensors": {"a": ONE, "b": ONE}}, weight_map)
    with pytest.raises(DamagedError, match=message):
        checkpoint.open(path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m", {"x.safetensors": {"a": ONE}, "y.safetensors": {"a": ONE, "b": ONE}})
    (path / files.INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
    with pytest.raises(DamagedError, match="y.safetensors: a: expected every tensor once, found also in x.safetensors"):
        checkpoint.open(path)


def test_links_on_disk_are_followed(tmp_path: Path) -> None:
    blobs = dense_folder(tmp_path / "blobs", {"a": ONE})
    link = tmp_path / "snapshot"
    link.mkdir()
    for name in ("config.json", "model.safetensors"):
        (link / name).symlink_to(blobs / name)
    assert list(checkpoint.open(link).tensors) == ["a"]


def test_the_only_safetensors_file_is_read(tmp_path: Path) -> None:
    path = dense_folder(tmp_path / "m", {"a": ONE})
    (path / "model.safetensors").rename(path / "other.safetensors")
    safetensors.numpy.save_file({"b": ONE}, path / "consolidated.safetensors")
    assert list(checkpoint.open(path).tensors) == ["a"]


def refusals(path: Path) -> list[tuple[str, type[QformatError], str]]:
    """Folders under ``path``, and how each is refused."""
    two = dense_folder(path / "two", {"a": ONE})
    (two / "model.safetensors").rename(two / "a.safetensors")
    safetensors.numpy.save_file({"b": ONE}, two / "b.safetensors")
    (path / "nothing").mkdir()
    (path / "pickle").mkdir()
    (path / "pickle" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    lfs = dense_folder(path / "lfs", {"a": ONE})
    (lfs / "model.safetensors").write_bytes(POINTER)
    config = dense_folder(path / "config", {"a": ONE})
    (config / "config.json").write_bytes(POINTER)
    empty = dense_folder(path / "empty", {"a": ONE})
    (empty / "model.safetensors").write_bytes(b"")
    listed = dense_folder(path / "listed", {"a": ONE})
    (listed / "config.json").write_text("[1]")
    return [
        ("two", DamagedError, "index.json beside several weight files, found a.safetensors, b.safetensors"),
        ("nothing", DamagedError, "weights: .*found none"),
        ("pickle", UnsupportedError, "safetensors, found pytorch_model.bin, a pickle"),
        ("lfs", DamagedError, "model.safetensors: expected a file, found a Git LFS pointer"),
        ("config", DamagedError, "config.json: expected a file, found a Git LFS pointer"),
        ("empty", DamagedError, "model.safetensors: expected a header"),
        ("listed", DamagedError, "config.json: expected a JSON object, found list"),
        ("absent", UsageError, "absent: expected a folder or file, found none"),
        ("n" * 5000, UsageError, "a folder or file, found none"),
    ]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"


def test_folders_that_are_refused(tmp_path: Path) -> None:
    for name, kind, message in refusals(tmp_path):
        with pytest.raises(QformatError, match=message) as caught:
            checkpoint.open(tmp_path / name)
        assert type(caught.value) is kind


FATES = {
    "read": ["config.json", "model.safetensors"],
    "copied": [
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt"),
        *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
        *("additional_chat_templates/tool.jinja", "generation_config.json", "preprocessor_config.json"),
        *("processor_config.json", "video_preprocessor_config.json", "modeling_x.py", "LICENSE", "LICENCE.txt"),
        *("NOTICE", "USE_POLICY.md"),
    ],
    "left out": [
        *("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json"),
        *("quanto_qmap.json", "consolidated.safetensors", "original/consolidated.00.pth", "metal/model.bin"),
        *("pytorch_model.bin", "model.gguf", "other.safetensors", "model.safetensors.index.json.bak", "README.md"),
        *("tool/tokenizer.json",),
    ],
}


def test_every_file_has_its_fate(tmp_path: Path) -> None:
    path = dense_folder(tmp_path / "m", {"a": ONE})
    for names in FATES.values():
        for name in names:
            (path / name).parent.mkdir(exist_ok=True)
            if not (path / name).exists():
                (path / name).write_text(name)
    (path / ".hidden").write_text("not looked at")
    found = checkpoint.open(path).files()
    assert {file.name: file.fate for file in found} == {name: fate for fate, names in FATES.items() for name in names}
    assert all(file.why for file in found)


def test_a_pointer_that_would_be_copied_is_refused(tmp_path: Path) -> None:
    path = dense_folder(tmp_path / "m", {"a": ONE})
    (path / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(DamagedError, match="tokenizer.json: expected a file, found a Git LFS pointer"):
        checkpoint.open(path).files()


def test_a_config_with_infinity_is_read(tmp_path: Path) -> None:
    path = dense_folder(tmp_path / "m", {"a": ONE})
    (path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert checkpoint.open(path).config == {"time_step_limit": [0.0, float("inf")]}


def test_a_weight_whose_parts_do_not_fit_is_never_handed_out(packed_folder: Path) -> None:
    hostile.tensors(packed_folder, lambda found: found.update({"l.1.weight_codes": np.zeros((4, 15), np.uint8)}))
    opened = checkpoint.open(packed_folder)
    assert opened["l.0.weight"].decode().shape == (4, 32)
    with pytest.raises(DamagedError, match=r"l.1.weight: expected part codes uint8 \[4, 16\], found uint8 \[4, 15\]"):
        opened["l.1.weight"]
