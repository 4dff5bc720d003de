"""The library is found, chosen and survived when it is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from native_setup import each_variant, needs_library, packed

from qformat.errors import UnsupportedError
from qformat.kernels import native

SOURCES = Path(native.__file__).parent / "cpu"
MATRIX = ("int", {"bits": 4, "block": [1, 32], "zero": 8.0}, (256, 512))


@pytest.fixture
def reload() -> Iterator[None]:
    native._load.cache_clear()
    yield
    native._load.cache_clear()


def test_abi_is_that_of_the_header() -> None:
    found = re.search(r"#define QF_ABI (\d+)", (SOURCES / "qformat.h").read_text())
    assert found and int(found[1]) == native.ABI


@needs_library
def test_library_loads_and_scalar_comes_last() -> None:
    assert native.available() and native.why() == ""
    assert native.variants()[-1] == "scalar" and native.variant() in native.variants()


@needs_library
def test_another_abi_is_refused(reload: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    assert not native.available()
    assert f"expected ABI {native.ABI}" in native.why()


def test_without_the_library_everything_says_so(reload: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules["qformat.kernels"], "__path__", [str(tmp_path)])
    assert not native.available() and native.variants() == [] and native.variant() == "numpy"
    assert str(tmp_path) in native.why()
    assert native.matrix("int", None, (1, 1), {}) is None
    with pytest.raises(UnsupportedError, match="native library"):
        native.call("qf_use", b"scalar")


def test_a_file_that_is_no_library_is_survived(reload: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_native.so").write_bytes(b"not a library")
    monkeypatch.setattr(sys.modules["qformat.kernels"], "__path__", [str(tmp_path)])
    assert not native.available() and "_native.so" in native.why()


@each_variant
def test_environment_forces_a_variant(variant: str) -> None:
    code = "from qformat.kernels import native; print(native.variant())"
    env = {**os.environ, "QFORMAT_CPU": variant}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == variant


@needs_library
def test_unknown_variant_is_an_error_and_changes_nothing() -> None:
    before = native.variant()
    with pytest.raises(UnsupportedError), native.using("abacus"):
        pass
    assert native.variant() == before


@needs_library
def test_threads_of_the_caller_do_not_disturb_each_other() -> None:
    matrix, dense = packed(*MATRIX)
    x = np.random.default_rng(0).standard_normal((4, 64, 512), dtype=np.float32)
    results: list[np.ndarray | None] = [None] * len(x)

    def work(i: int) -> None:
        for _ in range(5):
            results[i] = matrix.linear(x[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(x))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, result in enumerate(results):
        assert np.array_equal(result, matrix.linear(x[i]))


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process")  # that it has threads, which is the point
def test_works_in_a_forked_child() -> None:
    matrix, dense = packed(*MATRIX)
    expected = matrix.decode(threads=2)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(matrix.decode(threads=2), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
