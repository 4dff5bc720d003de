"""The tree holds together: who imports whom, what an import costs, which files a codec and a scheme have."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from qformat import codecs
from qformat.converters import exporters, importers

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("converters", "runtime", "kernels")  # folders that are packages of qformat when imported

# Area -> the areas it may import. The command line may import all, but only inside its functions.
MAY_IMPORT = {
    "core": {"core"},
    "kernels": {"core", "kernels"},
    "converters": {"core", "kernels", "converters"},
    "runtime": {"core", "kernels", "runtime"},
    "cli": {"core", "cli"},
}
# The package resolves `load`, `convert` and the other commands on first use, and so names modules of all areas;
# `python -m qformat` is the command line.
EXCEPTIONS = {"qformat", "qformat.__main__"}
HOSTS = {"huggingface", "vllm_plugin", "sglang_plugin", "ort"}

# Package -> libraries that its modules may import at the top, and those only inside functions. Subpackages inherit.
LIBRARIES = {
    "qformat": ("numpy ml_dtypes msgspec xxhash", ""),
    "qformat.cli": ("typer rich", "torch"),
    "qformat.sources": ("", "huggingface_hub"),
    "qformat.kernels.gpu": ("torch triton", ""),
    "qformat.kernels.decoders": ("", "torch"),
    "qformat.converters": ("", "torch"),
    "qformat.converters.hub": ("", "huggingface_hub"),
    "qformat.converters.card": ("", "huggingface_hub"),
    "qformat.runtime": ("torch", ""),
    "qformat.runtime.huggingface": ("transformers", ""),
    "qformat.runtime.places": ("transformers", ""),
    "qformat.runtime.evaluate": ("", "transformers tokenizers"),
    "qformat.runtime.ort": ("onnx onnxruntime onnxscript", "transformers"),
}
OF_A_CODEC = """
    spec/codecs/{}.md spec/vectors/{} qformat/codecs/{}.py kernels/cpu/{}.cpp kernels/gpu/{}.py tests/codecs/test_{}.py
"""
HEAVY = set("torch triton onnx onnxruntime onnxscript transformers ray huggingface_hub typer rich".split())


class Import(NamedTuple):
    module: str
    line: int
    at_once: bool  # runs when the importing module is imported


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "qformat" else ("qformat", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for folder in ("qformat", *MAPPED) for p in sorted((ROOT / folder).rglob("*.py"))}


def area(module: str) -> str:
    folder = module.split(".")[1] if "." in module else ""
    return folder if folder in MAY_IMPORT else "core"


def imports(module: str) -> Iterator[Import]:
    """Every import of a module, whether a statement or a module of ours that a string names."""
    tree = ast.parse(MODULES[module].read_text())
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node, at_once in _nodes(tree, True):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if _is_ours(inner) else base, node.lineno, at_once)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_ours(node.value):
            yield Import(node.value, node.lineno, False)


def _is_ours(name: str) -> bool:
    return name.startswith("qformat.") and (name in MODULES or any(m.startswith(name + ".") for m in MODULES))


def _nodes(node: ast.AST, at_once: bool) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below, and whether each runs on import: not those of functions and of `if TYPE_CHECKING`."""
    later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
        isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    )
    for child in ast.iter_child_nodes(node):
        yield child, at_once and not later
        yield from _nodes(child, at_once and not later)


@pytest.mark.parametrize("module", MODULES)
def test_imports_of_ours(module: str) -> None:
    if module in EXCEPTIONS:
        return
    for found in imports(module):
        if found.module.split(".")[0] != "qformat":
            continue
        where = f"{MODULES[module]}:{found.line} imports {found.module}"
        anything = area(module) == "cli" and not found.at_once
        assert anything or area(found.module) in MAY_IMPORT[area(module)], where
        assert not _crosses(module, found.module), where


def _crosses(module: str, other: str) -> bool:
    """Siblings that stay apart: two codecs, an importer and an exporter, two hosts."""
    (a, b), (c, d) = (name.split(".")[1:3] if name.count(".") > 1 else ("", "") for name in (module, other))
    if (a, c) == ("codecs", "codecs"):
        one, two = (next((n for n in codecs.NAMES if re.fullmatch(f"_?{n}(_.*)?", m)), "") for m in (b, d))
        return bool(one and two) and one != two
    if (a, c) == ("converters", "converters"):
        return {b, d} == {"importers", "exporters"}
    host, other_host = ({*module.split(".")[2:3]} & HOSTS, {*other.split(".")[2:3]} & HOSTS)
    if area(module) == area(other) == "runtime":
        return bool(other_host) and (bool(host) and host != other_host or module.split(".")[2] == "pytorch")
    return False


@pytest.mark.parametrize("module", MODULES)
def test_imports_of_libraries(module: str) -> None:
    at_once, later = set(sys.stdlib_module_names) | {"qformat"}, set[str]()
    for package in itertools.accumulate(module.split("."), lambda a, b: f"{a}.{b}"):
        top, inside = LIBRARIES.get(package, ("", ""))
        at_once |= set(top.split())
        later |= set(inside.split())
    for found in imports(module):
        allowed = at_once if found.at_once else at_once | later
        assert found.module.split(".")[0] in allowed, f"{MODULES[module]}:{found.line} imports {found.module}"


def test_the_rules_refuse() -> None:
    """The checks above can fail: each kind of forbidden pair is told from an allowed one."""
    assert "core" not in {area(m) for m in ("qformat.kernels.native", "qformat.converters.convert", "qformat.cli")}
    assert _crosses("qformat.codecs.int", "qformat.codecs.table")
    assert _crosses("qformat.codecs._trellis_codes", "qformat.codecs.int")
    assert not _crosses("qformat.codecs.trellis", "qformat.codecs._trellis_codes")
    assert _crosses("qformat.converters.importers.gptq", "qformat.converters.exporters.dense")
    assert _crosses("qformat.runtime.huggingface", "qformat.runtime.ort.export")
    assert _crosses("qformat.runtime.pytorch.linear", "qformat.runtime.huggingface")
    assert not _crosses("qformat.runtime.ort.export", "qformat.runtime.pytorch")
    function = ast.parse("import a\ndef f():\n    import b")
    assert [n.names[0].name for n, at_once in _nodes(function, True) if isinstance(n, ast.Import) and at_once] == ["a"]


def test_mapped_folders_are_not_packages_by_themselves() -> None:
    """An `__init__.py` there would make `import kernels` find this folder instead of the library of that name."""
    assert [path for folder in MAPPED for path in (ROOT / folder).glob("__init__.py")] == []
    pattern = re.compile(rf"^\s*(?:import|from)\s+(?:{'|'.join(MAPPED)})\b", re.MULTILINE)
    folders = ("qformat", *MAPPED, "tests", "bench", "examples", "scripts")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert [path for path in sources if pattern.search(path.read_text())] == []


def test_no_folder_has_the_name_of_a_library() -> None:
    """Such a folder shadows the library as soon as its parent is on the path, where pytest and `python -c` put it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    libraries = {re.split(r"[^\w-]", name)[0].replace("-", "_") for name in wanted}
    libraries |= HEAVY | {"vllm", "sglang", "gguf", "tokenizers", "datasets", "mlx", "flax", "jax"}
    top = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name != "build"]
    folders = {path for folder in top for path in (folder, *folder.rglob("*")) if path.is_dir()}
    assert [path for path in folders if path.name in libraries] == []


def in_fresh_interpreter(statement: str) -> dict[str, list[str]]:
    """What ``statement`` loads beyond NumPy, as {library: its modules}; it must print nothing."""
    code = f"import sys, numpy; old = {{*sys.modules}}; {statement}; print(*sorted({{*sys.modules}} - old))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.count("\n") == 1
    loaded: dict[str, list[str]] = {}
    for name in done.stdout.split():
        loaded.setdefault(name.split(".")[0], []).append(name)
    return loaded


def test_importing_the_package_is_light() -> None:
    """Neither torch nor anything like it; opening and decoding need no more than the core's own libraries."""
    light = in_fresh_interpreter("import qformat")
    assert light.keys() & HEAVY == set()
    assert len(light["qformat"]) <= 3, light["qformat"]
    assert len(list(itertools.chain(*light.values()))) <= 25, light
    core = in_fresh_interpreter("import qformat; qformat.open; [*map(qformat.codecs.get, qformat.codecs.NAMES)]")
    assert core.keys() & HEAVY == set()


def test_the_command_line_loads_no_runtime() -> None:
    loaded = in_fresh_interpreter("import qformat.cli")
    assert loaded.keys() & (HEAVY - {"typer", "rich"}) == set()


@pytest.mark.parametrize("name", codecs.NAMES)
def test_a_codec_has_its_files(name: str) -> None:
    missing = [place for place in OF_A_CODEC.split() if not (ROOT / place.format(name)).exists()]
    assert missing == []
    assert any((ROOT / "spec/vectors" / name).iterdir())
    assert codecs.get(name).NAME == name


@pytest.mark.parametrize("name", codecs.NAMES)
def test_a_codec_module_is_in_order(name: str) -> None:
    tree = ast.parse((ROOT / f"qformat/codecs/{name}.py").read_text())
    defined = [n.targets[0].id for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
    lines = {n.name: n.lineno for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert "NAME" in defined
    order = [lines[wanted] for wanted in ("Params", "layout", "decode", "encode", "check")]
    assert order == sorted(order)


def test_the_registries_are_complete() -> None:
    """Every codec, importer and exporter that has a file is in its registry, and the other way round."""
    for folder, names in (
        ("qformat/codecs", codecs.NAMES),
        ("converters/importers", importers.NAMES),
        ("converters/exporters", exporters.NAMES),
    ):
        files = {path.stem for path in (ROOT / folder).glob("*.py") if not path.stem.startswith("_")}
        assert files == set(names), folder
    assert {path.stem for path in (ROOT / "spec/codecs").glob("*.md")} == set(codecs.NAMES)
