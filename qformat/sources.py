"""``open``: a model on this disk, or on the Hub as ``org/name[@revision]``.

Whatever takes a source opens it here; only this module and ``converters/hub`` know of the Hub.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from . import checkpoint, files
from .checkpoint import Checkpoint
from .errors import QformatError, SurroundingsError, UsageError
from .shards import MAX_HEADER

NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+)(?:@(.+))?")
FIRST_BYTES = 100_000  # of a shard, read at once: most headers are shorter


class HubName(NamedTuple):
    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


class Fetched(NamedTuple):
    """A snapshot in the Hub's cache: its folder, the files that were wanted, those that were left on the Hub."""

    folder: Path
    names: list[str]
    left_out: list[str]


def open(source: str | Path) -> Checkpoint:
    """A model folder, a safetensors file, or a model on the Hub, for reading; see :func:`checkpoint.open`."""
    return checkpoint.open(local(source))


def local(source: str | Path) -> Path:
    """The path of a source: its own, or of the Hub's cache, into which what is missing there is fetched.

    Raises :class:`UsageError` where a name is neither, :class:`SurroundingsError` where the Hub cannot be reached.
    """
    name = _on_hub(source)
    return Path(source) if name is None else fetch(name).folder


@contextlib.contextmanager
def headers(source: str | Path) -> Iterator[Checkpoint]:
    """The same as :func:`open` for those who look at headers; of a model on the Hub no more is read than those, and
    the tensors that the import of another scheme is planned by.
    """
    name = _on_hub(source)
    if name is None:
        yield checkpoint.open(source)
        return
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield open(source)
        return
    with asking(name), _remote(name) as remote:
        remote.read_headers()
        opened = checkpoint.open(remote.folder)
        if opened.manifest is None:
            for shard in opened.shards:
                shard.fill = functools.partial(remote.fill, shard.path.relative_to(remote.folder).as_posix())
        yield opened


def parse(name: str) -> HubName:
    """``org/name[@revision]``, else :class:`UsageError`."""
    found = NAME.fullmatch(name)
    if not found:
        raise UsageError("the name of a model on the Hub, org/name[@revision]", repr(name))
    return HubName(found[1], found[2])


def _on_hub(source: str | Path) -> HubName | None:
    """A source as a name on the Hub; None for a path."""
    if os.path.exists(source) or not NAME.fullmatch(str(source)):
        return None
    if importlib.util.find_spec("huggingface_hub") is None:
        hint = "a model on the Hub needs: pip install 'qformat-weights[hub]'"
        raise UsageError("a folder or file", "none", file=source, hint=hint)
    return parse(str(source))


def origin(path: Path) -> str:
    """``org/name@commit`` of a folder in the Hub's cache, else nothing."""
    repo, middle, commit = ("", "", "", *path.absolute().parts)[-3:]
    kind, *name = repo.split("--")
    return f"{'/'.join(name)}@{commit}" if kind == "models" and len(name) == 2 and middle == "snapshots" else ""


def fetch(name: HubName, everything: bool = False) -> Fetched:
    """The files that make the model, in the Hub's cache; ``everything``: second copies of the weights and folders of
    other things, too.
    """
    with asking(name):
        from huggingface_hub import constants, snapshot_download

        if constants.HF_HUB_OFFLINE:
            folder = Path(snapshot_download(name.repo, revision=name.revision, local_files_only=True))
            return Fetched(folder, [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()], [])
        with _remote(name) as remote:
            names = list(remote.sizes) if everything else remote.wanted()
        folder = Path(
            snapshot_download(name.repo, revision=name.revision, allow_patterns=[glob.escape(one) for one in names])
        )
        return Fetched(folder, names, sorted(remote.sizes.keys() - set(names)))


class _Remote:
    """A repository as a folder of files of the same names and sizes, which hold nothing until they are filled."""

    def __init__(self, name: HubName, folder: Path) -> None:
        from huggingface_hub import HfApi

        info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
        listed = {one.rfilename: one.size or 0 for one in info.siblings or ()}
        self.repo, self.commit, self.folder = name.repo, info.sha, folder
        self.sizes = {file: listed[file] for file in sorted(listed) if not file.startswith(".")}
        self._filled: set[tuple[str, int, int]] = set()
        for file, size in self.sizes.items():
            path = files.within(folder, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.truncate(path, size)
        for file in (files.CONFIG, files.INDEX, *files.SETTINGS):
            self.fill(file, 0, self.sizes.get(file, 0))

    def weights(self) -> list[str]:
        return [path.relative_to(self.folder).as_posix() for path in files.weight_files(self.folder)]

    def wanted(self) -> list[str]:
        """The weights, and the files beside them that are no second copies of these."""
        weights = set(self.weights())
        beside = [name for name in self.sizes if "/" not in name or name.startswith("additional_chat_templates/")]
        second = {name for name in beside if any(fnmatch(name, kind) for kind in files.SECOND_COPIES)}
        return sorted(weights & self.sizes.keys() | set(beside) - second | {files.INDEX} & self.sizes.keys())

    def read_headers(self) -> None:
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(self._read_header, set(self.weights()) & self.sizes.keys()):
                pass

    def _read_header(self, file: str) -> None:
        size = self.sizes[file]
        self.fill(file, 0, min(size, FIRST_BYTES))
        with (self.folder / file).open("rb") as filled:
            length = int.from_bytes(filled.read(8), "little")
        if length <= MAX_HEADER:  # else the reader says so
            self.fill(file, FIRST_BYTES, min(size, 8 + length))

    def fill(self, file: str, start: int, stop: int) -> None:
        """Bring the bytes [start, stop) of a file."""
        if start >= stop or (file, start, stop) in self._filled:
            return
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        url = hf_hub_url(self.repo, file, revision=self.commit)
        with get_session().stream("GET", url, headers=build_hf_headers() | wanted) as response:
            hf_raise_for_status(response)
            if response.status_code != 206 and stop - start < self.sizes[file]:
                raise SurroundingsError("the part of the file that was asked for", "all of it", file=self.folder / file)
            with (self.folder / file).open("r+b") as out:
                out.seek(start)
                for chunk in response.iter_raw():
                    if out.tell() + len(chunk) > stop:
                        raise SurroundingsError(f"{stop - start} bytes", "more", file=self.folder / file)
                    out.write(chunk)
        self._filled.add((file, start, stop))


@contextlib.contextmanager
def _remote(name: HubName) -> Iterator[_Remote]:
    with tempfile.TemporaryDirectory(prefix="qformat-", ignore_cleanup_errors=True) as folder:
        try:
            yield _Remote(name, Path(folder))
        except QformatError as error:
            error.file = error.file.replace(folder, str(name))
            raise


@contextlib.contextmanager
def asking(name: HubName) -> Iterator[None]:
    """Errors of the Hub's client, and of the network below it, as ours."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        hint = "ask for it on the model's page, then log in with `hf auth login`"
        raise SurroundingsError("access to the model", "it is gated", file=name, hint=hint) from None
    except errors.RepositoryNotFoundError:
        hint = "a private model needs `hf auth login`"
        raise UsageError("a folder, a file or a model on the Hub", "none", file=name, hint=hint) from None
    except errors.RevisionNotFoundError:
        raise UsageError("a revision of the model", "none", file=name) from None
    except errors.HFValidationError as error:
        raise UsageError("the name of a model on the Hub, org/name[@revision]", str(error), file=name) from None
    except errors.OfflineModeIsEnabled:
        raise SurroundingsError("the Hub", "HF_HUB_OFFLINE, which forbids to ask it", file=name) from None
    except errors.LocalEntryNotFoundError:
        hint = "HF_HUB_OFFLINE is set: the Hub was not asked"
        raise UsageError("a folder, a file or a model in the Hub's cache", "none", file=name, hint=hint) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = "`hf auth login` with a token that may do this" if status in (401, 403) else ""
        raise SurroundingsError("the Hub to do as asked", f"status {status}", file=name, hint=hint) from None
    except errors.HTTPError as error:
        hint = "HF_HUB_OFFLINE=1 takes what is in the Hub's cache"
        raise SurroundingsError("an answer of the Hub", str(error) or repr(error), file=name, hint=hint) from None
    except OSError as error:
        where, why = error.filename or name, error.strerror or str(error)
        raise SurroundingsError("files that can be read and written", why, file=where) from None
