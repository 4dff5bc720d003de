"""It works three ways: from a wheel, from `pip install -e .`, and from a checkout with nothing installed.

Each way has an environment of its own, which sees the libraries installed here but not an installed qformat.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("converters", "runtime", "kernels", "spec", "examples")
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__", "tiny-*", "tests")
NO_COMPILER = {"CC": "false", "CXX": "false"}


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1", **variables}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the sources in ``checkout`` and a dense model of one layer in ``dense``."""
    place = tmp_path_factory.mktemp("install")
    shutil.copytree(ROOT, place / "checkout", ignore=LEFT_OUT)
    (place / "dense").mkdir()
    weight = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    save_file({"layer.weight": weight, "layer.bias": weight[0]}, place / "dense" / "model.safetensors")
    (place / "dense" / "config.json").write_text('{"model_type": "none"}')
    return place


@pytest.fixture(scope="module")
def wheel(place: Path) -> Path:
    """A wheel built from the source distribution."""
    build = "from setuptools import build_meta; build_meta.build_sdist('../dist')"
    run(sys.executable, "-c", build, cwd=place / "checkout")
    [sdist] = (place / "dist").glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", place / "dist", sdist, cwd=place)
    return next((place / "dist").glob("*.whl"))


def environment(place: Path, name: str, *install: str | Path, **variables: str) -> Path:
    """The Python of a new environment in which ``pip install *install`` has run."""
    folder = place / name
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    (packages / "here.pth").write_text(sysconfig.get_path("purelib"))  # a folder named in a .pth has its own ignored
    python = folder / "bin" / "python"
    if install:
        pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation")
        run(*pip, *install, cwd=place, **variables)
    return python


def smoke(python: Path, place: Path, cwd: Path, installed_in: Path) -> bool:
    """The package lies where it should, and its commands run there; whether it has its C++ library."""
    found = run(python, "-c", "import qformat; print(qformat.__file__)", cwd=cwd).strip()
    assert Path(found) == installed_in / "qformat" / "__init__.py"
    commands = [(python, "-m", "qformat")]
    if (script := python.with_name("qformat")).exists():
        commands.append((script,))
    for command in commands:
        packed = place / f"packed-{python.parents[1].name}-{len(command)}"
        run(*command, "quantize", place / "dense", packed, "--codec", "trellis", "--bits", "2", "--quiet", cwd=cwd)
        assert json.loads(run(*command, "verify", packed, "--json", cwd=cwd))["ok"]
        conformance = json.loads(run(*command, "conformance", "--json", cwd=cwd))
        assert conformance["passed"] > 0 and conformance["failed"] == 0
    library = run(python, "-c", "from qformat.kernels import native; print(native.available())", cwd=cwd)
    run(python, "-c", "from qformat import tables; assert tables.resource('examples/heldout.txt').is_file()", cwd=cwd)
    return library.strip() == "True"


def test_from_a_checkout(place: Path) -> None:
    checkout = place / "checkout"
    assert not smoke(environment(place, "plain"), place, checkout, checkout)


def test_editable_without_a_compiler(place: Path) -> None:
    checkout = place / "checkout"
    python = environment(place, "editable", "-e", checkout, **NO_COMPILER)
    assert python.with_name("qformat").exists()
    assert not smoke(python, place, place, checkout)


def test_from_a_wheel(place: Path, wheel: Path) -> None:
    python = environment(place, "wheel", wheel)
    assert python.with_name("qformat").exists()
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(python.parents[1])}))
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0])
    assert smoke(python, place, place, packages) == bool(compiler)


def test_what_a_wheel_holds(wheel: Path) -> None:
    """All modules, the specification and the held-out text; nothing but ``qformat`` and its metadata."""
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert {name.parts[0].split("-")[0] for name in names} == {"qformat", "qformat_weights"}
    assert "-cp311-abi3-" in wheel.name
    paths = [path for folder in ("qformat", *MAPPED) for path in (ROOT / folder).rglob("*")]
    data = {path for path in (ROOT / "spec").rglob("*") if path.is_file()} | {ROOT / "examples" / "heldout.txt"}
    expected = {path.relative_to(ROOT) for path in paths if path.suffix == ".py" or path in data}
    expected = {path if path.parts[0] == "qformat" else Path("qformat") / path for path in expected}
    expected.add(Path("qformat/py.typed"))
    held = {name for name in names if name.parts[0] == "qformat" and "_native" not in name.name}
    assert held == expected
