"""Vectors of files: a lone safetensors file and folders, as they may be written and as they may be broken."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qformat.dtypes import SAFETENSORS, Array, name_of
from qformat.shards import CHECKSUMS, Shard

from .case import NAME, Draft, document, entry, fill, write_file

ITEM = entry({"codec": "int", "bits": 4, "zero": 8}, (2, 4))
PARTS = {f"{NAME}_{part}": array for part, array in fill("files", ITEM).items()}
NORM = {"norm": np.array([1, -0.5], np.float16)}
ALL = {**PARTS, **NORM}
Header = dict[str, Any]
# dtypes that dense tensors alone may have: bytes of an element, where it fills them, and bits where it does not
OTHERS = {"BOOL": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8, "F4": 1, "F6_E2M3": 1, "F6_E3M2": 1}
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


def drafts() -> Iterator[Draft]:
    yield Draft(
        "files/example",
        "the file of the hex dump: a weight of 2 x 4 and a dense tensor, as a writer must write it",
        ("F2", "F10", "P1"),
        lambda folder: write_file(folder / "input.safetensors", example_tensors(), [ITEM]),
        entries=(ITEM,),
    )
    yield from _lone()
    yield from _headers()
    yield from _folders()


def example_tensors() -> dict[str, Array]:
    """A weight whose numbers can be read off the hex dump, and a dense tensor."""
    parts = {"codes": np.array([[0x98, 0x7A], [0x88, 0x0F]], np.uint8), "scales": np.array([[0.5], [2]], np.float16)}
    return {**{f"{NAME}_{part}": array for part, array in parts.items()}, **NORM}


def with_tensors(
    name: str,
    what: str,
    rules: str,
    tensors: Mapping[str, Array],
    items: list[dict[str, Any]] | str,
    *,
    error: str | None = None,
    group: str | None = None,
    change: Callable[[Header], None] = lambda header: None,
    cut: Callable[[bytes], bytes] = lambda data: data,
) -> Draft:
    """A file by hand, in the plainest form: no alignment, no checksums, tensors in the order given."""
    text = items if isinstance(items, str) else json.dumps(document(items))

    def write(folder: Path) -> None:
        (folder / "input.safetensors").write_bytes(cut(plain(tensors, text, change)))

    entries = () if isinstance(items, str) else tuple(items)
    return Draft(name, what, tuple(rules.split()), write, group or ("invalid" if error else "valid"), error, entries)


def plain(tensors: Mapping[str, Array], manifest: str | None, change: Callable[[Header], None]) -> bytes:
    header: Header = {"__metadata__": {"quantization_config": manifest}} if manifest else {}
    data = b""
    for name, array in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": SAFETENSORS[name_of(array.dtype)], "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _lone() -> Iterator[Draft]:
    yield with_tensors("files/plain", "re-saved by another tool: no checksums, no alignment", "F5 F6", ALL, [ITEM])
    backwards = dict(reversed(ALL.items()))
    yield with_tensors("files/order", "tensors in another order", "F5", backwards, [ITEM])

    def shuffle(header: Header) -> None:
        items = list(header.items())
        header.clear()
        header.update(reversed(items))

    yield with_tensors(
        "files/header-order", "a header in another order than the data", "F5", ALL, [ITEM], change=shuffle
    )

    def sums(stored: Mapping[str, str]) -> Callable[[Header], None]:
        return lambda header: header["__metadata__"].update({CHECKSUMS: json.dumps(stored)})

    wrong = {name: "0" * 32 for name in ALL}
    yield with_tensors(
        "files/checksum-wrong",
        "checksums of other bytes, which a reader may leave unchecked",
        "F6",
        ALL,
        [ITEM],
        change=sums(wrong),
        error="damaged",
        group="optional",
    )
    few = {"norm": "0" * 32}
    yield with_tensors(
        "files/invalid-checksums-few", "a tensor without checksum", "F6", ALL, [ITEM], change=sums(few), error="damaged"
    )
    dense = {tag: np.zeros(3 * size, np.uint8) for tag, size in OTHERS.items()}

    def retype(header: Header) -> None:
        for tag, size in OTHERS.items():
            header[tag].update(dtype=tag, shape=[24 * size // BITS.get(tag, 8 * size)])

    what = "dense tensors of the dtypes that no part has"
    yield with_tensors("files/dtypes-dense", what, "F3", {**PARTS, **dense}, [ITEM], change=retype)


def _headers() -> Iterator[Draft]:
    def bad(name: str, what: str, rules: str, error: str = "damaged", **how: Any) -> Draft:
        return with_tensors(f"files/invalid-{name}", what, rules, ALL, [ITEM], error=error, **how)

    def tensor(**keys: Any) -> Callable[[Header], None]:
        return lambda header: header["norm"].update(keys)

    last = sum(array.nbytes for array in ALL.values())
    yield bad("truncated", "a file without its last byte", "F3", cut=lambda data: data[:-1])
    yield bad("trailing", "a byte after the last tensor", "F3", cut=lambda data: data + b"\0")
    yield bad(
        "header-length",
        "a header that claims 2^63 bytes",
        "F3 L1",
        cut=lambda data: (1 << 63).to_bytes(8, "little") + data[8:],
    )
    yield bad("empty", "a file of no bytes", "F3", cut=lambda data: b"")
    yield bad("header-json", "a header that is no JSON", "F3", cut=lambda data: data.replace(b'"norm"', b"'norm'"))
    yield bad("header-list", "a header that is a list", "F3", cut=lambda data: (2).to_bytes(8, "little") + b"[]")
    twice = b'"norm": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}, "norm"'
    yield bad(
        "name-twice",
        "a tensor's name twice",
        "F4",
        cut=lambda data: _grown(data.replace(b'"norm"', twice), len(twice) - 6),
    )
    yield bad("overlap", "a tensor that overlaps another", "F3", change=tensor(data_offsets=[last - 5, last - 1]))
    yield bad(
        "overlap-empty",
        "an empty tensor within another",
        "F3",
        change=lambda header: header.update(none={"dtype": "F16", "shape": [0], "data_offsets": [last - 2, last - 2]}),
    )
    yield bad(
        "hole",
        "a byte that no tensor has",
        "F3",
        change=tensor(data_offsets=[last - 3, last + 1]),
        cut=lambda data: data + b"\0",
    )
    yield bad("offsets", "fewer bytes than dtype and shape need", "F3", change=tensor(shape=[3]))
    yield bad("shape-negative", "a negative shape", "F3", change=tensor(shape=[-2]))
    yield bad("shape-huge", "a shape whose product overflows 64 bits", "F3 L1", change=tensor(shape=[1 << 61, 16]))
    yield bad("dtype", "a dtype that safetensors does not have", "F3", "unsupported", change=tensor(dtype="F17"))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    yield bad("lfs-pointer", "a Git LFS pointer in place of the file", "F9", cut=lambda data: pointer)


def _grown(data: bytes, by: int) -> bytes:
    return (int.from_bytes(data[:8], "little") + by).to_bytes(8, "little") + data[8:]


def folder(name: str, what: str, rules: str, build: Callable[[Path], None], error: str | None = None) -> Draft:
    def write(case: Path) -> None:
        (case / "input").mkdir()
        build(case / "input")

    return Draft(f"files/{name}", what, tuple(rules.split()), write, "invalid" if error else "valid", error, (ITEM,))


def config(path: Path, backwards: bool = False, **keys: Any) -> None:
    settings = document([dict(reversed(ITEM.items())) if backwards else ITEM])
    (path / "config.json").write_text(json.dumps({"quantization_config": settings, **keys}) + "\n")


NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def shards(
    path: Path,
    index: Mapping[str, str] | None = None,
    second: Mapping[str, Array] | None = None,
    names: tuple[str, str] = NAMES,
) -> None:
    """The weight in one shard, the dense tensor in another, an index (changed by ``index``), a config."""
    write_file(path / names[0], PARTS, None)
    write_file(path / names[1], NORM if second is None else second, None)
    weight_map = {**dict.fromkeys(PARTS, names[0]), "norm": names[1], **(index or {})}
    text = json.dumps({"metadata": {"total_size": 12}, "weight_map": weight_map})
    (path / "model.safetensors.index.json").write_text(text + "\n")
    config(path)


def _folders() -> Iterator[Draft]:
    def single(path: Path, name: str = "model.safetensors", inside: bool = False, note: str = "") -> None:
        item = {**ITEM, "label": note} if note else ITEM
        write_file(path / name, ALL, [item] if inside else None)
        config(path, rope_theta=1e4)

    def two(path: Path) -> None:
        single(path, "a.safetensors")
        single(path, "b.safetensors")

    def inside(path: Path) -> None:
        write_file(path / "model.safetensors", ALL, [ITEM])

    def reordered(path: Path) -> None:
        inside(path)
        config(path, backwards=True)

    def numbered(path: Path) -> None:
        write_file(path / "model.safetensors", ALL, [{**ITEM, "transposed": False}])
        config(path)
        text = (path / "config.json").read_text().replace('"dtype"', '"transposed": 0, "dtype"')
        (path / "config.json").write_text(text)

    def below(path: Path) -> None:
        (path / "weights").mkdir()
        shards(path, names=("weights/one..safetensors", "weights/two..safetensors"))

    def unmapped(path: Path) -> None:
        shards(path)
        (path / "model.safetensors.index.json").write_text('{"weight_map": {}}\n')

    def bare(path: Path) -> None:
        single(path)
        text = (path / "config.json").read_text().replace("10000.0", "Infinity")
        (path / "config.json").write_text(text)

    def pickle(path: Path) -> None:
        config(path)
        (path / "pytorch_model.bin").write_bytes(b"\x80\x02.")

    def repeated(path: Path) -> None:
        single(path)
        text = (path / "config.json").read_text().replace('"rope_theta"', '"rope_theta": 1, "rope_theta"')
        (path / "config.json").write_text(text)

    first = NAMES[0]
    yield folder("folder", "config.json and model.safetensors", "F1 F2", single)
    yield folder(
        "folder-other-name",
        "the only *.safetensors, whatever its name",
        "F1",
        lambda p: single(p, "weights.safetensors"),
    )
    yield folder("folder-shards", "two shards and their index", "F1 F7", shards)
    yield folder(
        "folder-both-manifests",
        "the manifest in config.json and in the header, equal",
        "F2",
        lambda p: single(p, inside=True),
    )
    yield folder("folder-no-config", "no config.json: the manifest in the header counts", "F2", inside)
    yield folder("folder-key-order", "two manifests that differ in the order of their keys", "F2", reordered)
    yield folder("folder-below", "shards in a folder within, two dots in their names", "F7", below)
    yield folder(
        "invalid-no-manifest",
        "no manifest at all",
        "F2",
        lambda p: write_file(p / "a.safetensors", ALL, None),
        "damaged",
    )
    yield folder("invalid-manifests-0-false", "a manifest with 0 where the other has false", "F2", numbered, "damaged")
    yield folder("invalid-index-empty", "an index that names nothing", "F1", unmapped, "damaged")
    yield folder("folder-infinity", "a bare Infinity in config.json, as Python reads it", "F2", bare)
    yield folder(
        "invalid-manifests-differ",
        "another manifest in the header",
        "F2",
        lambda p: single(p, inside=True, note="rounded"),
        "damaged",
    )
    yield folder("invalid-config-key-twice", "a key of config.json twice", "F4", repeated, "damaged")
    yield folder("invalid-two-candidates", "two weight files and no index", "F1", two, "damaged")
    yield folder("invalid-pickle", "weights in a pickle", "F9", pickle, "unsupported")
    yield folder("invalid-no-weights", "no weights", "F1", config, "damaged")
    outside = {"norm": "../../folder-shards/input/model-00002-of-00002.safetensors"}  # it is there
    yield folder(
        "invalid-index-outside", "an index that points out of the folder", "F7", lambda p: shards(p, outside), "damaged"
    )
    yield folder(
        "invalid-index-absolute",
        "an index that names an absolute path",
        "F7",
        lambda p: shards(p, {"norm": "/norm.safetensors"}),
        "damaged",
    )
    yield folder(
        "invalid-index-file",
        "an index that names a file that is not there",
        "F7",
        lambda p: shards(p, {"norm": "none.safetensors"}),
        "damaged",
    )
    yield folder(
        "invalid-index-tensor",
        "an index that names a tensor that is not there",
        "F7",
        lambda p: shards(p, {"bias": first}),
        "damaged",
    )
    yield folder(
        "invalid-index-shard",
        "an index that names the wrong shard",
        "F7",
        lambda p: shards(p, {"norm": first}),
        "damaged",
    )
    more = {**NORM, "bias": np.zeros(2, np.float16)}
    yield folder(
        "invalid-index-lacks",
        "a tensor that the index does not name",
        "F7",
        lambda p: shards(p, second=more),
        "damaged",
    )
    twice = {**NORM, f"{NAME}_scales": PARTS[f"{NAME}_scales"]}
    yield folder("invalid-tensor-twice", "a tensor in two shards", "F8", lambda p: shards(p, second=twice), "damaged")


def dump(path: Path) -> list[str]:
    """The hex dump of a file, sixteen bytes a line, a line of explanation before each piece of it."""
    data, shard = path.read_bytes(), Shard(path)
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip(b" ")
    pieces = [
        (0, 8, f"length of the header: {length} bytes"),
        (8, 8 + len(text), "header"),
        (8 + len(text), 8 + length, "spaces: the data starts at a multiple of 64"),
    ]
    for name, tensor in sorted(shard.tensors.items(), key=lambda item: item[1].start):
        pieces.append((tensor.start, tensor.stop, f"{name}: {tensor.dtype} {list(tensor.shape)}"))
    lines = []
    for start, stop, what in pieces:
        if start < stop:
            lines.append(f"          {what}")
        for at in range(start, stop, 16):
            row = data[at : min(at + 16, stop)]
            shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
            lines.append(f"{at:08x}  {row.hex(' '):<47}  {shown}".rstrip())
    return lines
