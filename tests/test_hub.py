"""Models on the Hub: the real client against a server of this process. The client runs in another one, as it reads its
settings when it is imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hub_server
import numpy as np
import pytest
from hub_server import Hub
from making import dense_folder, entry, folder, packed

from qformat import checkpoint, files, sources
from qformat.cli import show
from qformat.converters.report import inspect
from qformat.shards import Shard, ShardWriter, Spec

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).resolve().parents[1]
LAYERS = ROOT / "tests/data/layers"
RNG = np.random.default_rng(0)
INT4 = {"codec": "int", "bits": 4, "block": [1, 64], "scales": "float16"}
CARD = b"---\nlicense: mit\nlanguage: en\npipeline_tag: text-generation\n---\n# Base\n"


class Done(NamedTuple):
    code: int
    json: dict[str, Any]
    err: str


COMMANDS = """
import contextlib, io, json, sys
from qformat import cli
for line in sys.stdin:
    sys.argv, code = ["qformat", *json.loads(line)], 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            cli.main()
        except SystemExit as leaving:
            code = leaving.code or 0
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


class Client:
    """The command line against one server, with a cache of its own: a process that runs one command after another."""

    def __init__(self, url: str, home: Path, offline: bool = False) -> None:
        hub = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": "x", "HF_HUB_DISABLE_XET": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMANDS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | hub | {"HF_HUB_OFFLINE": str(int(offline))},
        )

    def start(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([*map(str, words), "--json"]) + "\n")
        self.process.stdin.flush()

    def __call__(self, *words: object, code: int = 0) -> Done:
        self.start(*words)
        assert self.process.stdout is not None
        found, out, err = json.loads(self.process.stdout.readline())
        assert found == code, (words, out, err)
        assert bool(err) == bool(code), err
        return Done(found, json.loads(out), err)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:
            self.process.kill()


@pytest.fixture(scope="module")
def served() -> Iterator[Hub]:
    with hub_server.hub() as served:
        yield served


@pytest.fixture
def hub(served: Hub) -> Hub:
    served.__init__(served.url)  # type: ignore[misc]
    return served


@pytest.fixture(scope="module")
def client(served: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(served.url, tmp_path_factory.mktemp("home")) as started:
        yield started


def contents(path: Path) -> dict[str, bytes]:
    return {one.relative_to(path).as_posix(): one.read_bytes() for one in path.rglob("*") if one.is_file()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model of three shards, each of more than the client reads at once."""
    path = tmp_path_factory.mktemp("model")
    of = entry((1024, 320), INT4)
    whole = Shard(folder(path, {f"{i}.weight": packed(RNG, of, f"{i}.weight") for i in range(3)}) / files.SINGLE)
    weight_map = {}
    for number in range(3):
        name = f"model-{number + 1:05}-of-00003.safetensors"
        mine = {tensor: one for tensor, one in whole.tensors.items() if tensor.startswith(f"{number}.")}
        with ShardWriter(path / name, {tensor: Spec(one.tag, one.shape) for tensor, one in mine.items()}, {}) as out:
            for tensor in mine:
                out.put(tensor, whole.raw(tensor))
        weight_map |= dict.fromkeys(mine, name)
    (path / files.SINGLE).unlink()
    (path / files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (path / "tokenizer.json").write_text("{}")
    (path / "notes.txt").write_text("not a part of the model")
    return path


def test_push_and_pull(
    hub: Hub, client: Client, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = client("push", model, "org/packed", "--private").json
    assert first["changed"] and len(hub.uploads) == 3 and hub.repos["org/packed"].private
    there = hub.repos["org/packed"].files()
    assert there.keys() == contents(model).keys() - {"notes.txt"} | {"README.md"}
    assert there["README.md"].decode() == first["card"] and first["commit"] == hub.repos["org/packed"].branches["main"]

    hub.uploads.clear()
    again = client("push", model, "org/packed").json
    assert not again["changed"] and again["commit"] == first["commit"] and hub.uploads == []
    assert len(hub.repos["org/packed"].commits) == 2

    pulled = client("pull", "org/packed", tmp_path / "pulled").json
    assert contents(tmp_path / "pulled") == there
    assert pulled["checked"] == pulled["shards"] == 3 and pulled["commit"] == first["commit"]
    assert client("push", tmp_path / "pulled", "org/packed").json["changed"] is False
    show.pushed(first), show.pushed(again), show.pulled(pulled)
    shown = " ".join(capsys.readouterr().out.split())
    assert "already there" in shown and "checksums of 3 of 3 shards compared" in shown
    assert "--overwrite" in client("pull", "org/packed", tmp_path / "pulled", code=2).err


def test_an_interrupted_push_continues(hub: Hub, client: Client, model: Path, tmp_path: Path) -> None:
    for done in range(2):
        with Client(hub.url, tmp_path) as interrupted:

            def accepts(before: int = done, process: subprocess.Popen[str] = interrupted.process) -> bool:
                if len(hub.uploads) > before:
                    process.kill()
                return len(hub.uploads) == before

            hub.accepts = accepts
            interrupted.start("push", model, "org/packed")
            assert interrupted.process.wait(timeout=60) != 0
        assert len(hub.uploads) == done + 1 and hub.repos["org/packed"].files() == {}
    hub.accepts = lambda: True
    assert client("push", model, "org/packed").json["changed"]
    assert len(hub.uploads) == len(set(hub.uploads)) == 3
    there = hub.repos["org/packed"].files()
    assert {name: one for name, one in there.items() if name != "README.md"} == {
        name: one for name, one in contents(model).items() if name != "notes.txt"
    }


def test_a_corrupted_file_is_refused(hub: Hub, client: Client, model: Path, tmp_path: Path) -> None:
    repo = hub.add("org/packed", {name: one for name, one in contents(model).items() if name != "notes.txt"})
    name = "model-00002-of-00003.safetensors"
    good = repo.files()[name]
    tree = repo.commits[repo.branches["main"]]
    tree[name] = good[:-1] + bytes([good[-1] ^ 1])
    done = client("pull", "org/packed", tmp_path / "pulled", code=3)
    assert name in done.json["error"]["file"] and done.json["error"]["expected"].startswith("checksum")
    assert not (tmp_path / "pulled").exists() and list(tmp_path.glob(".pulled*")) == []
    tree[name] = good
    client("pull", "org/packed", tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == repo.files()

    (tmp_path / "pulled" / name).unlink()
    (tmp_path / "pulled" / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    hub.changes.clear()
    client("push", tmp_path / "pulled", "org/packed", code=3)
    assert hub.changes == []


def test_pull_leaves_what_is_no_part_of_the_model(hub: Hub, client: Client, model: Path, tmp_path: Path) -> None:
    second = {"original/consolidated.00.pth": b"x" * 1000, "pytorch_model.bin": b"x", "metal/model.bin": b"x"}
    hub.add("org/packed", {**contents(model), **second})
    done = client("pull", "org/packed", tmp_path / "pulled").json
    assert set(done["left_out"]) == set(second) and contents(tmp_path / "pulled") == contents(model)
    client("pull", "org/packed", tmp_path / "all", "--all")
    assert contents(tmp_path / "all") == contents(model) | second


def test_inspect_reads_headers_alone(hub: Hub, client: Client, model: Path, tmp_path: Path) -> None:
    hub.add("org/packed", contents(model))
    shards = list(model.glob("*.safetensors"))
    assert client("inspect", "org/packed").json == inspect(model)
    small = sum((model / name).stat().st_size for name in (files.CONFIG, files.INDEX))
    assert hub.sent == len(shards) * 100_000 + small < sum(path.stat().st_size for path in shards)


def test_inspect_of_another_scheme_reads_what_it_is_planned_by(hub: Hub, client: Client) -> None:
    layer = LAYERS / "gptq-v1-b4-g32-actorder"
    local = next(path.parent for path in layer.rglob("config.json"))
    hub.add("org/gptq", contents(local))
    assert client("inspect", "org/gptq").json == inspect(local)


def test_a_source_on_the_hub(hub: Hub, client: Client, tmp_path: Path) -> None:
    values = RNG.standard_normal((64, 128)).astype(np.float32)
    base = dense_folder(tmp_path / "base", {"model.up_proj.weight": values}, architectures=["X"])
    repo = hub.add("org/base", {**contents(base), "README.md": CARD})
    repo.branches["v1"] = repo.branches["main"]
    repo.commit("main", {"config.json": b"{}"})
    client("convert", "org/base@v1", tmp_path / "dense", "--to", "dense", "--quiet")
    assert checkpoint.open(tmp_path / "dense").array("model.up_proj.weight").tobytes() == values.tobytes()
    client("convert", "org/base@v2", tmp_path / "no", code=2)
    client("quantize", "org/base@v1", tmp_path / "packed", "--codec", "int", "--bits", "4", "--quiet")
    manifest = checkpoint.open(tmp_path / "packed").manifest
    assert manifest is not None and manifest.provenance["origin"] == f"org/base@{repo.branches['v1']}"

    repo.branches["main"] = repo.branches["v1"]
    hub.changes.clear()
    done = client("push", tmp_path / "packed", "org/packed", "--dry-run").json
    assert hub.changes == [] and "org/packed" not in hub.repos and done["notes"] == []
    front = done["card"].split("---\n")[1]
    for line in ("base_model: org/base", "base_model_relation: quantized", "license: mit", "language: en"):
        assert line in front.splitlines()
    assert 'qformat.load("org/packed")' in done["card"] and "stored bits" in done["card"]
    assert '"codec": "int"' in done["card"] and "pipeline_tag: text-generation" in front


def test_push_to_a_branch_or_as_a_pull_request(hub: Hub, client: Client, model: Path) -> None:
    old = {"model.safetensors": b"of an earlier model", "picture.png": b"x"}
    repo = hub.add("org/packed", old)
    done = client("push", model, "org/packed", "--revision", "v2").json
    assert repo.files() == old and done["revision"] == "v2" and done["deleted"] == ["model.safetensors"]
    assert "model.safetensors" not in repo.files("v2") and repo.files("v2").keys() > {"picture.png", "README.md"}
    done = client("push", model, "org/packed", "--pr").json
    assert repo.files() == old and done["url"].endswith("/discussions/1")
    assert repo.files("refs/pr/1") == repo.files("v2")
    client("push", model, "org/packed", "--private", code=2)
    assert repo.files() == old


def test_a_card_of_ones_own(hub: Hub, client: Client, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    card = tmp_path / "model" / "README.md"
    card.write_text("---\nlicense: mit\ntags:\n- mine\n---\nMy words.\n")
    done = client("push", tmp_path / "model", "org/packed", "--base-model", "org/none").json
    there = hub.repos["org/packed"].files()["README.md"].decode()
    front = there.split("---\n")[1].splitlines()
    assert there.endswith("---\nMy words.\n") and there == done["card"]
    assert {"license: mit", "- mine", "library_name: qformat", "base_model: org/none"} <= set(front)
    assert "org/none was not read" in done["notes"][0]
    card.write_text("---\nlicense: wrong\n---\n")
    assert "no such license" in client("push", tmp_path / "model", "org/packed", code=2).err
    card.write_text("---\nlicense: [mit\n---\n")
    client("push", tmp_path / "model", "org/packed", code=3)
    assert hub.repos["org/packed"].files()["README.md"].decode() == there


def test_errors(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.add("org/gated", {"config.json": b"{}"}, gated=True)
    done = client("inspect", "org/gated", code=5)
    assert "gated" in done.err and "hint: " in done.err
    assert "expected a folder, a file or a model on the Hub" in client("verify", "org/none", code=2).err
    with Client("http://127.0.0.1:9", tmp_path) as away:
        assert "expected an answer of the Hub" in away("convert", "org/gated", tmp_path / "no", code=5).err
    with Client(hub.url, tmp_path, offline=True) as offline:
        assert "the Hub's cache" in offline("inspect", "org/gated", code=2).err


def test_what_is_a_name_on_the_hub(tmp_path: Path) -> None:
    assert sources.parse("org/name") == ("org/name", None)
    assert sources.parse("org/name@refs/pr/1") == ("org/name", "refs/pr/1")
    for path in ("name", "./name", "../name", "a/b/c", "/a/b", ""):
        with pytest.raises(sources.UsageError):
            sources.parse(path)
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    assert sources.origin(snapshot) == "org/name@0123"
    assert sources.origin(tmp_path) == sources.origin(snapshot / "x") == sources.origin(Path("/")) == ""
