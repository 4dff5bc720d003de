"""A job that is killed and run again ends with the bytes of one that was not, whenever it was killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import dense_folder

from qformat import staging, verify
from qformat.converters import write
from qformat.converters.convert import convert
from qformat.converters.quantize import job
from qformat.errors import DamagedError, SurroundingsError
from qformat.shards import ShardWriter
from qformat.sources import open as open_source

KILLS = 20
PARTIAL = ".t.partial"
MAIN = """
import time
from functools import partial
from qformat import cli
from qformat.converters import write
from qformat.converters.quantize import job

def slowly(entry, values, pack=job.pack):
    time.sleep(0.03)
    return pack(entry, values)

job.pack, job.write = slowly, partial(write.write, shard_bytes=3000, threads=2)
cli.main()
"""  # the command line with small shards, and time between weights in which to be killed


def state(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def model(path: Path, weights: int) -> Path:
    rng = np.random.default_rng(weights)
    names = [f"model.layers.{i}.mlp.{kind}_proj.weight" for i in range(weights // 2) for kind in ("up", "down")]
    tensors = {name: rng.standard_normal((32, 64)).astype(np.float32) for name in names}
    return dense_folder(path, tensors | {"model.norm.weight": np.ones(7, np.float32)})


def start(source: Path, target: Path) -> subprocess.Popen[bytes]:
    words = ("quantize", str(source), str(target), "--codec", "int", "--json", "--quiet")
    return subprocess.Popen([sys.executable, "-c", MAIN, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def quantize(source: Path, target: Path, shard_bytes: int = 3000, **options: Any) -> dict[str, Any]:
    with small_shards(shard_bytes):
        return job.quantize(source, target, **{"codec": "int", "bits": 4, **options})


@contextlib.contextmanager
def small_shards(shard_bytes: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(write.write.__kwdefaults__, "shard_bytes", shard_bytes)
        yield


def at_work(process: subprocess.Popen[bytes], target: Path, finished: int = 0) -> bool:
    """Wait until the process has begun to write, and has finished so many weights; False where it ends before."""
    journal = target.with_name(PARTIAL) / "journal"
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if journal.read_bytes().count(b"\n") > finished:
                return True
        time.sleep(0.005)
    return False


def test_killed_at_random_moments(tmp_path: Path) -> None:
    source, target = model(tmp_path / "s", 24), tmp_path / "t"
    process = start(source, target)
    assert at_work(process, target)
    began = time.monotonic()
    assert process.wait() == 0
    duration = time.monotonic() - began
    wanted = state(target)
    assert len([name for name in wanted if name.endswith(".safetensors")]) > 5
    rng = np.random.default_rng()
    kills = resumed = 0
    while kills < KILLS or process.returncode != 0:
        shutil.rmtree(target, ignore_errors=True)
        process = start(source, target)
        at_work(process, target)
        try:
            out, err = process.communicate(timeout=rng.uniform(0, duration) if kills < KILLS else None)
            assert process.returncode == 0, err
            resumed += json.loads(out)["resumed"]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        assert not target.exists() or state(target) == wanted
    assert resumed > 0 and not (tmp_path / PARTIAL).exists()


def at_moment(number: int, work: Callable[[], object]) -> bool:
    """Do ``work`` in a process that is killed at the moment of that number; False where it ends before that.

    Moments are those before and after everything that leaves a trace on the disk.
    """
    if (child := os.fork()) == 0:
        left = iter(range(number))

        def moment() -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        def watched(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*given: Any, **named: Any) -> Any:
                moment()
                found = function(*given, **named)
                moment()
                return found

            return call

        for where, name in ((ShardWriter, "put"), (staging.Journal, "note"), (staging.Journal, "start")):
            setattr(where, name, watched(getattr(where, name)))
        for name in ("rename", "mkdir", "write_text"):
            setattr(Path, name, watched(getattr(Path, name)))
        os._exit(0 if not work() else 1)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_at_every_moment(tmp_path: Path) -> None:
    """Each moment once, of a job that replaces an older target: that, or the new one, is there or comes back."""
    source = model(tmp_path / "s", 4)
    quantize(source, tmp_path / "wanted")
    wanted, old = state(tmp_path / "wanted"), {"old": b"1"}
    number = 0

    def work() -> None:
        quantize(source, tmp_path / "t", overwrite=True)

    while True:
        (tmp_path / "t").mkdir()
        (tmp_path / "t" / "old").write_bytes(b"1")
        killed = at_moment(number, work)
        between = not (tmp_path / "t").exists()
        assert between or state(tmp_path / "t") in (old, wanted)
        assert not between or state(tmp_path / PARTIAL / "old") == old
        work()
        assert state(tmp_path / "t") == wanted
        assert sorted(os.listdir(tmp_path)) == ["s", "t", "wanted"]
        shutil.rmtree(tmp_path / "t")
        number += 1
        if not killed:
            break
    assert number > 30


def interrupted(source: Path, target: Path, after: int, error: BaseException, **options: Any) -> None:
    """Until ``after`` weights are finished."""
    count = iter(range(1, after))

    def stop(*_: object) -> None:
        if next(count, None) is None:
            raise error

    with pytest.raises(BaseException) as raised:
        quantize(source, target, progress=stop, **options)
    assert isinstance(raised.value, KeyboardInterrupt | SurroundingsError | MemoryError | DamagedError | RuntimeError)


def test_what_is_finished_is_not_made_again(tmp_path: Path) -> None:
    source = model(tmp_path / "s", 8)
    (source / "gone.json").symlink_to("nowhere")
    interrupted(source, tmp_path / "t", 5, KeyboardInterrupt())
    assert sorted(os.listdir(tmp_path / PARTIAL)) == ["journal", "model"]
    seen: list[tuple[int, int, str]] = []
    report = quantize(source, tmp_path / "t", progress=lambda *told: seen.append(told))
    assert report["resumed"] == 5 and len(seen) == 4 and seen[-1][0] == seen[-1][1]
    assert quantize(source, tmp_path / "u")["resumed"] == 0 and state(tmp_path / "t") == state(tmp_path / "u")
    assert sorted(os.listdir(tmp_path)) == ["s", "t", "u"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(28, "No space left on device")])
def test_what_the_same_job_can_outlive_is_kept(tmp_path: Path, error: BaseException) -> None:
    source = model(tmp_path / "s", 4)
    interrupted(source, tmp_path / "t", 2, error)
    assert (tmp_path / PARTIAL).exists() and quantize(source, tmp_path / "t")["resumed"] == 2


def test_the_hint_says_where_it_is(tmp_path: Path) -> None:
    source = model(tmp_path / "s", 4)
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        with pytest.raises((KeyboardInterrupt, SurroundingsError)) as raised:
            quantize(source, tmp_path / "t", progress=lambda *_, error=error: (_ for _ in ()).throw(error))
        told = str(raised.value) if isinstance(error, KeyboardInterrupt) else raised.value.hint  # type: ignore[union-attr]
        assert told == f"run the same command again to go on; to give up delete {tmp_path / PARTIAL}"


@pytest.mark.parametrize("error", [DamagedError("a weight", "none"), RuntimeError("a bug")])
def test_what_would_fail_again_is_not_kept(tmp_path: Path, error: BaseException) -> None:
    interrupted(model(tmp_path / "s", 4), tmp_path / "t", 2, error)
    assert os.listdir(tmp_path) == ["s"]


def test_another_job_starts_anew(tmp_path: Path) -> None:
    source = model(tmp_path / "s", 4)
    weights = source / "model.safetensors"
    for other in ({"bits": 3}, {"exclude": ["*.1.*"]}, {"shard_bytes": 4000}, {"settings": {"block": [1, 16]}}):
        interrupted(source, tmp_path / "t", 3, KeyboardInterrupt())
        assert quantize(source, tmp_path / "t", **other)["resumed"] == 0  # type: ignore[arg-type]
        shutil.rmtree(tmp_path / "t")
    for file in (weights, source / "config.json"):
        interrupted(source, tmp_path / "t", 3, KeyboardInterrupt())
        os.utime(file, ns=(1, 1))  # another file of the same size
        assert quantize(source, tmp_path / "t")["resumed"] == 0
        shutil.rmtree(tmp_path / "t")
    interrupted(source, tmp_path / "t", 3, KeyboardInterrupt())
    source.rename(tmp_path / "r")
    assert quantize(tmp_path / "r", tmp_path / "t")["resumed"] == 0


def test_a_journal_cut_short_anywhere(tmp_path: Path) -> None:
    source = model(tmp_path / "s", 4)
    quantize(source, tmp_path / "wanted")
    interrupted(source, tmp_path / "t", 3, KeyboardInterrupt())
    journal = (tmp_path / PARTIAL / "journal").read_bytes()
    (tmp_path / PARTIAL).rename(tmp_path / "left")
    for length in range(0, len(journal) + 1, 7):
        shutil.copytree(tmp_path / "left", tmp_path / PARTIAL)
        (tmp_path / PARTIAL / "journal").write_bytes(journal[:length])
        assert quantize(source, tmp_path / "t")["resumed"] == max(0, journal[:length].count(b"\n") - 1)
        assert state(tmp_path / "t") == state(tmp_path / "wanted")
        shutil.rmtree(tmp_path / "t")


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"a": 1}', b"\xff"])
def test_a_journal_that_is_damaged(tmp_path: Path, line: bytes) -> None:
    source = model(tmp_path / "s", 4)
    interrupted(source, tmp_path / "t", 3, KeyboardInterrupt())
    with (tmp_path / PARTIAL / "journal").open("ab") as file:
        file.write(line + b"\n")
    quantize(source, tmp_path / "t")
    quantize(source, tmp_path / "wanted")
    assert state(tmp_path / "t") == state(tmp_path / "wanted")


def test_bytes_that_are_not_what_the_journal_says_are_made_again(tmp_path: Path) -> None:
    """The system went down with the process: the journal reached the disk, and not all that it speaks of."""
    source = model(tmp_path / "s", 4)
    quantize(source, tmp_path / "wanted")
    interrupted(source, tmp_path / "t", 4, KeyboardInterrupt())
    shards = sorted((tmp_path / PARTIAL / "model").iterdir())
    shards[0].write_bytes(bytes(shards[0].stat().st_size))
    shards[1].unlink()
    assert len(shards) == 2 and quantize(source, tmp_path / "t")["resumed"] == 0
    assert state(tmp_path / "t") == state(tmp_path / "wanted")


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    source = model(tmp_path / "s", 4)
    with staging.staged(tmp_path / "t", False):
        with pytest.raises(SurroundingsError, match="expected no other process at work on the same target, found one"):
            quantize(source, tmp_path / "t")
        assert (tmp_path / PARTIAL / "model").exists()
    process, other = (start(source, tmp_path / "u") for _ in range(2))
    codes = {process.wait(), other.wait()}
    assert codes <= {0, 2, 5} and 0 in codes and verify.verify(open_source(tmp_path / "u")) == []


def test_a_signal_to_end_is_an_interrupt(tmp_path: Path) -> None:
    source, target = model(tmp_path / "s", 24), tmp_path / "t"
    process = start(source, target)
    assert at_work(process, target, finished=2)
    process.terminate()
    out, _ = process.communicate()
    assert process.returncode == 75 and "to go on" in json.loads(out)["error"]["hint"]
    done = (tmp_path / PARTIAL / "journal").read_bytes().count(b"\n") - 1
    assert json.loads(start(source, target).communicate()[0])["resumed"] == done >= 2


def test_an_export_resumes_too(tmp_path: Path) -> None:
    source = model(tmp_path / "s", 4)
    quantize(source, tmp_path / "q")

    def run(target: str, stop: int = 99) -> dict[str, Any]:
        with small_shards(9000):
            return convert(tmp_path / "q", tmp_path / target, "dense", progress=Stop(stop))

    wanted = run("wanted")
    with pytest.raises(KeyboardInterrupt):
        run("t", 2)
    assert wanted["resumed"] == 0 and run("t")["resumed"] == 2
    assert state(tmp_path / "t") == state(tmp_path / "wanted") and len(state(tmp_path / "t")) > 3


class Stop:
    """Progress that interrupts."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("codec", ["int", "trellis"])
def test_the_same_bytes_with_any_number_of_threads(tmp_path: Path, codec: str) -> None:
    source = model(tmp_path / "s", 12)
    states = []
    for threads in (1, 2, 8):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(write.write.__kwdefaults__, "threads", threads)
            quantize(source, tmp_path / str(threads), codec=codec, bits=2)
        states.append(state(tmp_path / str(threads)))
    assert states[0] == states[1] == states[2] and len(states[0]) > 3
