"""``push`` and ``pull``: packed models to the Hub and from it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import qformat
from qformat import checkpoint, files, sources
from qformat.errors import DamagedError, UsageError
from qformat.sources import HubName
from qformat.staging import staged

from .card import CARD, card


def push(
    source: str | Path,
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    pr: bool = False,
    dry_run: bool = False,
    base_model: str | None = None,
) -> dict[str, Any]:
    """Bring a packed model to ``repo`` on the Hub, in one commit, with a model card.

    ``revision`` is a branch, made where there is none; ``pr`` opens a pull request instead. Files that are there
    already are not sent again, so that an interrupted push continues and a repeated one does nothing; shards of an
    earlier model are removed. ``dry_run`` changes nothing. ``base_model``: by default where the model was converted
    from. Returns the report that ``qformat push --json`` prints.
    """
    opened = checkpoint.open(source)
    if opened.manifest is None or not opened.path.is_dir():
        raise UsageError("a folder that qformat packed", "another", file=source)
    for shard in opened.shards:
        shard.check()
    name = sources.parse(repo)
    name = name._replace(revision=revision or name.revision)
    with sources.asking(name):
        text, notes = card(opened, name.repo, base_model)
        contents: dict[str, Path | bytes] = {
            file.name: opened.path / file.name for file in opened.files() if file.fate != "left out"
        }
        contents[CARD] = text.encode()
        sizes = {
            file: len(one) if isinstance(one, bytes) else one.stat().st_size for file, one in sorted(contents.items())
        }
        done = {"url": None, "commit": None, "changed": False, "deleted": []}
        if not dry_run:
            done = _commit(name, contents, private, pr)
    return {
        "repo": name.repo,
        "revision": name.revision or "main",
        "dry_run": dry_run,
        **done,
        "files": [{"name": file, "bytes": size} for file, size in sizes.items()],
        "bytes": sum(sizes.values()),
        "card": text,
        "notes": notes,
    }


def _commit(name: HubName, contents: Mapping[str, Path | bytes], private: bool, pr: bool) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    if not pr:
        api.create_repo(name.repo, private=private or None, exist_ok=True)
        if private and not api.model_info(name.repo).private:
            raise UsageError("a private repository", "a public one of that name", file=name.repo)
        if name.revision:
            api.create_branch(name.repo, branch=name.revision, exist_ok=True)
    before = api.model_info(name.repo, revision=name.revision)
    there = [one.rfilename for one in before.siblings or ()]
    old = [file for file in there if file == files.INDEX or fnmatch(file, "model*.safetensors")]
    stale = [file for file in old if file not in contents]
    changes = [CommitOperationAdd(file, one) for file, one in contents.items()]
    message = f"qformat {qformat.__version__}"
    try:
        commit = api.create_commit(
            name.repo,
            [*changes, *map(CommitOperationDelete, stale)],
            commit_message=message,
            revision=name.revision,
            create_pr=pr,
        )
    except OSError:  # of the network, some of them ValueErrors, too
        raise
    except ValueError as error:  # the Hub looks at the card first
        raise UsageError("a card that the Hub takes", str(error), file=CARD) from None
    return {
        "url": commit.pr_url or commit.commit_url,
        "commit": commit.oid,
        "changed": commit.oid != before.sha,
        "deleted": stale,
    }


def pull(repo: str, target: str | Path, *, everything: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Bring a model from the Hub, ``org/name[@revision]``, to the folder ``target``, and check it.

    It comes by way of the Hub's cache, where an interrupted pull continues; shards are hard links to that. What is no
    part of the model (second copies of the weights, folders of other things) stays unless ``everything`` is wanted.
    Returns the report that ``qformat pull --json`` prints; raises :class:`DamagedError` for a file that differs from
    its checksums, which is then fetched anew the next time.
    """
    name, target = sources.parse(repo), Path(target)
    with staged(target, overwrite) as (folder, _):
        fetched = sources.fetch(name, everything)
        try:
            opened = checkpoint.open(fetched.folder)
            for shard in opened.shards:
                shard.check()
        except DamagedError as error:
            _forget(fetched.folder, Path(error.file))
            error.hint = error.hint or "the same command fetches it again"
            raise
        for file in fetched.names:
            _place(fetched.folder / file, folder / file, link=fetched.folder / file in opened.weight_files)
    return {
        "repo": name.repo,
        "commit": fetched.folder.name,
        "path": str(target),
        "bytes": opened.nbytes,
        "files": fetched.names,
        "left_out": fetched.left_out,
        "shards": len(opened.shards),
        "checked": sum(shard.checksums() is not None for shard in opened.shards),
    }


def _place(source: Path, target: Path, link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(source.resolve(), target)
            return
    shutil.copyfile(source, target)


def _forget(snapshot: Path, file: Path) -> None:
    """Remove a file from the cache, and what it points to."""
    if snapshot in file.parents:
        file.resolve().unlink(missing_ok=True)
        file.unlink(missing_ok=True)
