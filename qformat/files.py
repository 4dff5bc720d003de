"""What becomes of each file of a model folder: read, copied, left out, or refused. One table, as in
``spec/README.md``.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from .errors import DamagedError, UnsupportedError
from .records import read_json

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SETTINGS = (  # a source's quantization settings; a loader that finds them in the target believes them
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "hf_quant_config.json",
    "quanto_qmap.json",
)
COPIED = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "*processor_config.json",
    "generation_config.json",
    "*.py",
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
)
SECOND_COPIES = (
    "consolidated*",
    "original/*",
    "metal/*",
    "*.bin",
    "*.gguf",
    "*.pt",
    "*.pth",
    "*.safetensors",
    "*.index.json",
)
POINTER = b"version https://git-lfs"  # how the file begins that stands for one which was not fetched
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")


class File(NamedTuple):
    name: str
    fate: Literal["read", "copied", "left out"]
    why: str


def within(folder: Path, name: str) -> Path:
    """``folder / name`` for a name that stands in a file; :class:`DamagedError` where it would lead out of the
    folder.
    """
    pure = PurePosixPath(name)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or "\0" in name:
        raise DamagedError("the name of a file in this folder", repr(name), file=folder / INDEX)
    return folder / pure


def weight_files(folder: Path) -> list[Path]:
    """The shards: by the index, else ``model.safetensors``, else the only ``*.safetensors``."""
    if (folder / INDEX).is_file():
        return [within(folder, name) for name in sorted(set(weight_map(folder).values()))]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if len(found) == 1:
        return found
    if found:
        raise DamagedError(
            f"{INDEX} beside several weight files", ", ".join(path.name for path in found[:4]), file=folder
        )
    pickles = sorted(path.name for path in folder.iterdir() if any(fnmatch(path.name, kind) for kind in PICKLES))
    if pickles:
        raise UnsupportedError(
            "weights in safetensors", f"{pickles[0]}, a pickle", file=folder, hint="pickles are never loaded"
        )
    raise DamagedError("weights: *.safetensors", "none", file=folder)


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name as the index has it."""
    path = folder / INDEX
    found = read_object(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise DamagedError("weight_map from tensor names to file names", repr(found), file=path)
    for tensor, file in found.items():
        if not isinstance(file, str):
            raise DamagedError("the name of a file", repr(file), file=path, weight=tensor)
    return found


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds."""
    text = path.read_bytes()
    if text.startswith(POINTER):
        raise pointer(path)
    try:
        found = read_json(text)
    except DamagedError as error:
        raise error.located(file=path) from None
    if not isinstance(found, dict):
        raise DamagedError("a JSON object", type(found).__name__, file=path)
    return found


def pointer(path: Path) -> DamagedError:
    return DamagedError("a file", "a Git LFS pointer to one", file=path, hint="fetch it with `git lfs pull`")


def survey(folder: Path, weights: list[Path]) -> list[File]:
    """Every file of the folder with what becomes of it; hidden files and folders are not looked at.

    Raises :class:`DamagedError` for a Git LFS pointer among those that are copied.
    """
    out = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or any(part.startswith(".") for part in PurePosixPath(name).parts):
            continue
        out.append(File(name, *_fate(name, path in weights)))
        if out[-1].fate == "copied" and path.is_file() and _begins(path) == POINTER:
            raise pointer(path)
    return out


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(POINTER))


def _fate(name: str, is_weight: bool) -> tuple[Literal["read", "copied", "left out"], str]:
    if is_weight or name in (CONFIG, INDEX):
        return "read", "weights" if is_weight else "settings of the model" if name == CONFIG else "index of the weights"
    if name in SETTINGS:
        return "left out", "quantization settings of the source"
    if any(fnmatch(name, kind) for kind in COPIED) and (
        "/" not in name or name.startswith("additional_chat_templates/")
    ):
        return "copied", "travels with the model"
    if any(fnmatch(name, kind) for kind in SECOND_COPIES):
        return "left out", "not the weights that were read"
    return "left out", "not a part of the model"
