"""The command line: what it prints, what it leaves behind, how it fails."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hostile
import numpy as np
import pytest
import safetensors
from making import dense_folder, entry, folder, packed

from qformat import checkpoint, cli, codecs, files
from qformat.converters import convert as converting
from qformat.dtypes import NUMPY
from qformat.shards import Shard

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
KEYS = {"file", "weight", "expected", "found", "hint"}
RNG = np.random.default_rng(0)


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on standard output."""
        assert self.out.endswith("\n") and self.out.count("\n") == 1
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


def qformat(*words: object, **environment: str) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "qformat", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )
    return Done(done.returncode, done.stdout, done.stderr)


Command = Callable[..., Done]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process: many cases in the time of one."""

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["qformat", *map(str, words)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as leaving:
            code = leaving.code or 0
        return Done(code, *capfd.readouterr())

    return run


def check_failure(done: Done, code: int) -> None:
    lines = done.err.splitlines()
    assert done.code == code, done
    assert lines[0].startswith("error: ") and len(lines) <= 2, done.err
    assert len(lines) == 1 or lines[1].startswith("hint: ")


# The life of a model


class Life(NamedTuple):
    source: Path
    packed: Path
    report: dict[str, Any]


LIVES = {
    "tiny-llama": ["--codec", "table", "--bits", "4"],
    "tiny-moe": ["--codec", "int", "--bits", "3", "--include", "model.embed_tokens.weight"],
}


@pytest.fixture(scope="module", params=LIVES)
def life(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Life:
    source, target = EXAMPLES / request.param, tmp_path_factory.mktemp(request.param) / "packed"
    done = qformat("quantize", source, target, *LIVES[request.param], "--json", "--quiet")
    assert done.code == 0 and done.err == ""
    return Life(source, target, done.json)


def test_quantize_reports_what_inspect_reports(life: Life) -> None:
    found = qformat("inspect", life.packed, "--json").json
    keys = {"format", "stored_bits", "bytes", "weights", "coverage", "notes", "files"}
    assert found.keys() == keys and life.report.keys() == keys | {"seconds", "resumed", "terms", "rotate"}
    for key in ("format", "stored_bits", "bytes", "weights", "coverage"):
        assert found[key] == life.report[key]
    assert found["format"] == "qformat"
    assert found["bytes"] == sum(path.stat().st_size for path in life.packed.glob("*.safetensors"))
    assert {tuple(one) for one in found["weights"]} == {("name", "codec", "shape", "stored_bits", "label")}


def test_every_source_tensor_is_accounted_for(life: Life) -> None:
    coverage, source = life.report["coverage"], Shard(life.source / files.SINGLE).tensors
    assert coverage["tensors"] == len(source)
    assert coverage["consumed"] + coverage["passed"] + len(coverage["left_out"]) == len(source)
    assert coverage["consumed"] == len(life.report["weights"])
    opened = checkpoint.open(life.packed)
    assert {*opened, *opened.dense} == set(source)
    matrices = {name for name in source if name.endswith("proj.weight")}
    extra = {"model.embed_tokens.weight"} if "--include" in LIVES[life.source.name] else set()
    assert set(opened) == matrices | extra
    for name in opened.dense:
        assert opened.raw(name).tobytes() == Shard(life.source / files.SINGLE).raw(name).tobytes()


def test_stored_bits_are_every_byte(life: Life) -> None:
    with safetensors.safe_open(life.packed / files.SINGLE, "np") as file:
        sizes = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        dtypes = {"U8": 1, "F16": 2}
        for one in life.report["weights"]:
            parts = [part for name, part in sizes.items() if name.startswith(one["name"] + "_")]
            nbytes = sum(int(np.prod(part.get_shape())) * dtypes[part.get_dtype()] for part in parts)
            assert one["stored_bits"] == pytest.approx(8 * nbytes / np.prod(one["shape"]), abs=1e-6)


def test_verify_finds_nothing_wrong(life: Life) -> None:
    done = qformat("verify", life.packed, "--json")
    assert done == Done(0, done.out, "")
    assert done.json["ok"] is True and done.json["problems"] == []
    assert done.json["weights"] == len(life.report["weights"])


def test_dense_is_the_decoded_values(life: Life, tmp_path: Path) -> None:
    done = qformat("convert", life.packed, tmp_path / "d", "--to", "dense", "--dtype", "float32", "--json")
    assert done.code == 0 and {"from", "because", "seconds", "coverage"} <= done.json.keys()
    opened, dense, source = checkpoint.open(life.packed), checkpoint.open(tmp_path / "d"), checkpoint.open(life.source)
    assert dense.tensors.keys() == source.tensors.keys() and dense.manifest is None and dense.settings is None
    assert dense.config == {**source.config, "dtype": "float32"}
    for name in source.tensors:
        assert dense.tensors[name].dtype == "float32" and dense.tensors[name].shape == source.tensors[name].shape
        want = opened[name].decode() if name in opened else source.array(name).astype(np.float32)
        assert dense.array(name).tobytes() == want.tobytes()


def test_dense_has_the_dtype_of_the_source_by_default(life: Life, tmp_path: Path, command: Command) -> None:
    assert command("convert", life.packed, tmp_path / "d", "--to", "dense", "--quiet").code == 0
    dense, source, opened = (checkpoint.open(path) for path in (tmp_path / "d", life.source, life.packed))
    assert dense.config == source.config
    for name in source.tensors:
        assert dense.tensors[name].dtype == source.tensors[name].dtype
        if name in opened:
            assert dense.raw(name).tobytes() == opened[name].decode().astype(NUMPY["bfloat16"]).tobytes()


def test_side_files_travel_or_are_named(life: Life) -> None:
    fates = {file["name"]: file["fate"] for file in life.report["files"]}
    assert fates.keys() == {path.name for path in life.source.iterdir()}
    for name, fate in fates.items():
        if fate == "copied":
            assert filecmp.cmp(life.source / name, life.packed / name, shallow=False)
        elif fate == "left out":
            assert not (life.packed / name).exists()
    assert fates["tokenizer.json"] == fates["generation_config.json"] == "copied"
    assert fates["PROVENANCE.md"] == "left out"


def test_the_other_keys_of_the_config_stay(life: Life) -> None:
    config = json.loads((life.packed / files.CONFIG).read_text())
    assert config.pop(checkpoint.KEY)["quant_method"] == "qformat"
    assert config == json.loads((life.source / files.CONFIG).read_text())


def test_to_qformat_again_is_the_same_shard(life: Life, tmp_path: Path, command: Command) -> None:
    copy = shutil.copytree(life.packed, tmp_path / "copy")
    hostile.config(copy, lambda found: found.update(kv_cache={"bits": 8}, later="kept"))
    assert command("convert", copy, tmp_path / "again", "--json").code == 0
    assert filecmp.cmp(copy / files.SINGLE, tmp_path / "again" / files.SINGLE, shallow=False)
    first, second = (json.loads((path / files.CONFIG).read_text()) for path in (copy, tmp_path / "again"))
    for key in ("entries", "kv_cache", "later", "version"):
        assert first[checkpoint.KEY][key] == second[checkpoint.KEY][key]


def test_an_expert_unlike_its_siblings(tmp_path: Path, command: Command) -> None:
    """Another shape, another dtype, left dense: each stays what it is, under its own name."""
    tensors = {f"l.0.experts.{i}.up_proj.weight": RNG.standard_normal((16, 64)).astype(np.float32) for i in range(6)}
    tensors["l.0.experts.2.up_proj.weight"] = RNG.standard_normal((24, 64)).astype(np.float32)
    tensors["l.0.experts.3.up_proj.weight"] = RNG.standard_normal((16, 64)).astype(np.float16)
    tensors["l.0.router.weight"] = RNG.standard_normal((6, 64)).astype(np.float32)
    source = dense_folder(tmp_path / "s", tensors)
    done = command(
        "quantize", source, tmp_path / "q", "--codec", "int", "--exclude", "*experts.4.*", "--json", "--quiet"
    )
    shapes = {one["name"]: one["shape"] for one in done.json["weights"]}
    assert shapes == {f"l.0.experts.{i}.up_proj.weight": [24 if i == 2 else 16, 64] for i in (0, 1, 2, 3, 5)}
    assert done.json["coverage"] == {"tensors": 7, "consumed": 5, "passed": 2, "left_out": []}
    entries = json.loads((tmp_path / "q" / files.CONFIG).read_text())[checkpoint.KEY]["entries"]
    assert sorted(one["weights"] for one in entries) == [
        ["l.0.experts.2.up_proj.weight"],
        ["l.0.experts.3.up_proj.weight"],
        ["l.0.experts.5.up_proj.weight", "l.0.experts.{0..1}.up_proj.weight"],
    ]
    assert command("convert", tmp_path / "q", tmp_path / "d", "--to", "dense").code == 0
    dense = checkpoint.open(tmp_path / "d")
    for name, array in tensors.items():
        assert dense.array(name).dtype == array.dtype
        np.testing.assert_allclose(dense.array(name).astype(np.float32), array, atol=0.6)
    np.testing.assert_array_equal(dense.array("l.0.experts.4.up_proj.weight"), tensors["l.0.experts.4.up_proj.weight"])


def test_odd_tensors_go_through(tmp_path: Path, command: Command) -> None:
    tensors: dict[str, Any] = {
        "a.weight": RNG.standard_normal((8, 64)).astype(np.float32),
        "scalar": np.float32(3).reshape(()),
        "nothing": np.zeros((3, 0), np.float16),
        "none": np.zeros(0, np.float32),
        "ints": np.arange(4),
        "mtp.1.norm": np.ones(3, np.float64),
        "Ünïcode 名": np.ones(2, np.uint8),
    }
    source = dense_folder(tmp_path / "s", tensors)
    assert command("quantize", source, tmp_path / "q", "--codec", "int", "--json").json["coverage"]["passed"] == 6
    assert command("verify", tmp_path / "q").code == 0
    assert command("convert", tmp_path / "q", tmp_path / "d", "--to", "dense", "--dtype", "bfloat16").code == 0
    dense = checkpoint.open(tmp_path / "d")
    assert {name: tensor.dtype for name, tensor in dense.tensors.items()} == {
        **dict.fromkeys(("a.weight", "scalar", "nothing", "none", "mtp.1.norm"), "bfloat16"),
        "ints": "int64",
        "Ünïcode 名": "uint8",
    }
    assert [dense.tensors[name].shape for name in ("scalar", "nothing", "none")] == [(), (3, 0), (0,)]


# What exists is refused, or replaced whole


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return dense_folder(tmp_path / "dense", {f"l.{i}.weight": np.ones((8, 64), np.float32) for i in range(4)})


def state(path: Path) -> dict[str, bytes]:
    return {str(one.relative_to(path)): one.read_bytes() for one in sorted(path.rglob("*")) if one.is_file()}


def test_a_target_that_exists_is_refused(dense: Path, tmp_path: Path, command: Command) -> None:
    target = tmp_path / "q"
    target.mkdir()
    (target / "mine").write_text("kept")
    done = command("quantize", dense, target, "--codec", "int", "--json")
    check_failure(done, 2)
    assert done.json["error"] == {
        "file": str(target),
        "weight": "",
        "expected": "a target that does not exist",
        "found": "one that does",
        "hint": "--overwrite replaces it",
    }
    assert state(target) == {"mine": b"kept"}
    assert command("quantize", dense, target, "--codec", "int", "--overwrite").code == 0
    assert (target / files.SINGLE).exists() and not (target / "mine").exists()
    assert sorted(os.listdir(tmp_path)) == ["dense", "q"]


def test_a_failure_in_the_middle_leaves_the_old(dense: Path, tmp_path: Path, command: Command) -> None:
    target = tmp_path / "q"
    assert command("quantize", dense, target, "--codec", "int").code == 0
    before = state(target)
    hostile.tensors(dense, lambda arrays: arrays["l.3.weight"].__setitem__((0, 0), np.nan))
    done = command("quantize", dense, target, "--codec", "int", "--overwrite", "--json")
    check_failure(done, 3)
    assert done.json["error"]["weight"] == "l.3.weight" and done.json["error"]["file"] == str(dense / files.SINGLE)
    assert done.json["error"]["found"] == "1 that are not"
    assert state(target) == before and sorted(os.listdir(tmp_path)) == ["dense", "q"]
    check_failure(command("quantize", dense, tmp_path / "new", "--codec", "int"), 3)
    assert sorted(os.listdir(tmp_path)) == ["dense", "q"]


def test_a_failure_at_the_end_leaves_the_old(
    dense: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "q"
    assert command("quantize", dense, target, "--codec", "int").code == 0
    before, rename = state(target), Path.rename

    def refuse(self: Path, to: Path) -> Path:
        if self.name == "model":
            raise OSError(28, "No space left on device", str(self))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    done = command("quantize", dense, target, "--codec", "int", "--bits", "2", "--overwrite")
    check_failure(done, 5)
    assert "No space left on device" in done.err and "to go on" in done.err
    assert state(target) == before and sorted(os.listdir(tmp_path)) == [".q.partial", "dense", "q"]


def test_an_interrupt_leaves_the_old(
    dense: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(converting, "summary", interrupted)
    packed_path = tmp_path / "q"
    assert command("quantize", dense, packed_path, "--codec", "int").code == 0
    from qformat.converters import write

    monkeypatch.setattr(write, "_copy", interrupted)
    done = command("convert", packed_path, tmp_path / "d", "--to", "dense", "--json")
    check_failure(done, 75)
    left = tmp_path / ".d.partial"
    assert done.json["error"]["hint"] == f"run the same command again to go on; to give up delete {left}"
    assert sorted(os.listdir(tmp_path)) == [".d.partial", "dense", "q"]


def test_a_model_can_replace_itself(dense: Path, tmp_path: Path, command: Command) -> None:
    view = checkpoint.open(dense).array("l.0.weight")  # still mapped when the file goes
    done = command("quantize", dense, dense, "--codec", "int", "--overwrite", "--json")
    assert done.code == 0 and {file["name"] for file in done.json["files"]} == {files.CONFIG, files.SINGLE}
    assert checkpoint.open(dense).manifest is not None and (view == 1).all()


def test_a_target_that_holds_the_source_is_refused(dense: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "other").write_text("kept")
    done = command("quantize", dense, tmp_path, "--codec", "int", "--overwrite")
    check_failure(done, 2)
    assert "a target that does not hold the source" in done.err and (tmp_path / "other").exists()


def test_a_target_in_new_folders(dense: Path, tmp_path: Path, command: Command) -> None:
    assert command("quantize", dense, tmp_path / "a/b/q", "--codec", "int").code == 0
    assert sorted(os.listdir(tmp_path / "a/b")) == ["q"]
    done = command("quantize", dense, tmp_path / "other" / "x" / "q", "--codec", "int", "--set", "bits=9")
    check_failure(done, 3)
    assert not (tmp_path / "other").exists()


def test_a_target_below_a_file(dense: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").write_text("")
    check_failure(command("quantize", dense, tmp_path / "file" / "q", "--codec", "int"), 5)


# Failures


WRONG: list[tuple[list[str], int, str]] = [
    (["quantise", "a", "b"], 2, "No such command 'quantise'"),
    (["quantize"], 2, "Missing argument 'SRC'"),
    (["quantize", "a"], 2, "Missing argument 'DST'"),
    (["quantize", "{dense}", "{new}", "--bits", "four"], 2, "Invalid value for '--bits'"),
    (["quantize", "{dense}", "{new}", "--colour", "red"], 2, "No such option: --colour"),
    (["quantize", "{none}", "{new}"], 2, "none: expected a folder or file, found none"),
    (
        ["quantize", "{dense}", "{new}", "--codec", "int5"],
        4,
        f"one of the codecs {', '.join(codecs.NAMES)}, found 'int5'",
    ),
    (
        ["quantize", "{dense}", "{new}", "--codec", "int", "--bits", "2.5"],
        4,
        "whole bits from 1 to 8 for int, found 2.5",
    ),
    (
        ["quantize", "{dense}", "{new}", "--codec", "int", "--bits", "nan"],
        4,
        "whole bits from 1 to 8 for int, found nan",
    ),
    (["quantize", "{dense}", "{new}", "--bits", "inf"], 4, "bits from 1 to 8"),
    (["quantize", "{dense}", "{new}", "--codec", "table", "--bits", "nan"], 4, "bits from 1 to 8"),
    (["quantize", "{dense}", "{new}", "--bits", "nan"], 4, "bits from 1 to 8"),
    (["quantize", "{dense}", "{new}", "--codec", "int", "--set", "zero"], 2, "--set KEY=VALUE, found 'zero'"),
    (["quantize", "{dense}", "{new}", "--codec", "int", "--set", "colour=red"], 3, "known keys, found `colour`"),
    (["quantize", "{dense}", "{new}", "--codec", "int", "--set", "zero=NaN"], 3, "`float` .* at `\\$.zero`, found nan"),
    (["quantize", "{dense}", "{new}", "--codec", "int", "--set", "zero=-3"], 4, "a zero from 0 to 15"),
    (["quantize", "{dense}", "{new}", "--rotate", "left"], 2, "--rotate hadamard, none or a size, found left"),
    (
        ["quantize", "{dense}", "{new}", "--include", "nothing*"],
        2,
        "--include with the name of a matrix .* 'nothing\\*'",
    ),
    (["quantize", "{dense}", "{new}", "--exclude", "*"], 2, "weights to pack, found none"),
    (["quantize", "{packed}", "{new}"], 2, "expected a dense model, found qformat"),
    (["convert", "{packed}", "{new}", "--to", "onyx"], 2, "--to one of .*found onyx"),
    (["convert", "{packed}", "{new}", "--to", "dense", "--dtype", "int8"], 2, "--dtype one of"),
    (["convert", "{packed}", "{new}", "--dtype", "float32"], 2, "--dtype only with --to dense"),
    (["convert", "{packed}", "{new}", "--from", "onyx"], 2, "--from one of .*found onyx"),
    (["convert", "{dense}", "{new}"], 2, "expected packed weights, found none"),
    (["convert", "{dense}", "{new}", "--from", "qformat"], 2, "dense: expected a folder that qformat packed"),
    (["inspect", "{none}"], 2, "a folder or file, found none"),
    (["verify", "{none}"], 2, "a folder or file, found none"),
    (["verify", "n" * 5000], 2, "a folder or file, found none"),
    (["inspect", os.devnull], 3, "expected a weight file, found none"),
    (["eval", "{none}"], 2, "a folder or file, found none"),
    (["export", "{packed}", "{new}", "--to", "onyx"], 2, "--to onnx, found onyx"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("wrong")
    one = packed(np.random.default_rng(0), entry((8, 32), hostile.INT), "w")
    return {
        "dense": dense_folder(path / "dense", {"l.weight": np.ones((8, 64), np.float32)}),
        "packed": folder(path / "packed", {"w": one}),
        "new": path / "new",
        "none": path / "none",
    }


@pytest.mark.parametrize(("words", "code", "message"), WRONG, ids=[" ".join(words)[:60] for words, _, _ in WRONG])
def test_what_is_wrong_is_told_in_a_line(
    words: list[str], code: int, message: str, places: dict[str, Path], command: Command
) -> None:
    words = [word.format(**places) if "{" in word else word for word in words]
    done = command(*words, "--json")
    check_failure(done, code)
    assert re.search(message, done.err), done.err
    assert done.json.keys() == {"error"} and done.json["error"].keys() == KEYS
    plain = command(*words)
    assert plain.out == "" and plain.err == done.err
    assert not places["new"].exists()


def test_the_module_is_the_command() -> None:
    done = qformat("inspect", "nowhere", "--json")
    check_failure(done, 2)
    assert done.json["error"]["file"] == "nowhere"
    assert qformat("--version").out.startswith("qformat 0.")
    done = qformat("inspekt", "--json")
    check_failure(done, 2)
    assert done.json["error"].keys() == KEYS


def test_help(command: Command) -> None:
    done = command("--help")
    assert done.code == 0 and all(name in done.out for name in ("quantize", "convert", "inspect", "verify", "doctor"))
    assert command().code == 2
    assert "--set" in command("quantize", "--help").out


def test_verify_tells_each_problem(tmp_path: Path, command: Command) -> None:
    path = hostile.sound(tmp_path / "m")
    hostile.tensors(
        path, lambda arrays: (arrays["l.0.weight_scales"].fill(np.nan), arrays["r.weight_scales"].fill(np.inf))
    )
    for words in (["--json"], []):
        done = command("verify", path, *words)
        assert done.code == 3
        assert [line.split(": expected")[0] for line in done.err.splitlines()] == [
            f"error: {path / files.SINGLE}: l.0.weight",
            f"error: {path / files.SINGLE}: r.weight",
        ]
        if words:
            assert done.json["ok"] is False
            assert [one["weight"] for one in done.json["problems"]] == ["l.0.weight", "r.weight"]
            assert all(one.keys() == KEYS for one in done.json["problems"])


def test_a_traceback_only_when_asked(places: dict[str, Path], command: Command) -> None:
    assert "Traceback" not in command("inspect", places["none"]).err
    assert "Traceback" in command("inspect", places["none"], "--debug").err


def test_escape_sequences_do_not_reach_the_terminal(tmp_path: Path, command: Command) -> None:
    name = "[red]\x1b[2J\n"
    source = dense_folder(
        tmp_path / "s", {name: np.ones(3, np.float32), "a.weight": np.full((8, 8), np.nan, np.float32)}
    )
    (source / f"{name}.txt").write_text("")
    for words in (["inspect", source], ["quantize", source, tmp_path / "q", "--include", "*"]):
        done = command(*words)
        assert "\x1b" not in done.out + done.err
        assert words[0] == "quantize" or "left out: [red]\\x1b[2J\\x0a.txt" in done.out


@pytest.mark.parametrize("coding", ["ascii", "utf-8"])
def test_names_beyond_ascii_print_anywhere(coding: str, tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "名", {"重み.weight": np.ones((8, 8), np.float32)})
    (source / "説明.txt").write_text("")
    done = qformat("quantize", source, tmp_path / "q", "--codec", "int", "--json", PYTHONIOENCODING=coding)
    assert done.code == 0 and done.json["weights"][0]["name"] == "重み.weight"
    done = qformat("inspect", source, PYTHONIOENCODING=coding)
    assert done.code == 0 and "Traceback" not in done.err


# What a command costs


NO_TORCH = """
import sys
sys.argv = ["qformat", *sys.argv[1:]]
from qformat.cli import main
try:
    main()
finally:
    heavy = "torch triton onnx onnxruntime onnxscript transformers ray huggingface_hub".split()
    loaded = [name for name in heavy if name in sys.modules] + ["rich"] * ("rich.table" in sys.modules)
    sys.stderr.write("loaded: " + " ".join(loaded) + "\\n")
"""


@pytest.mark.parametrize(
    "words",
    [
        ["codecs"],
        ["inspect", "{packed}"],
        ["verify", "{packed}"],
        ["convert", "{packed}", "{new}/d", "--to", "dense"],
        ["quantize", "{dense}", "{new}/q", "--codec", "trellis", "--bits", "2"],
    ],
    ids=lambda words: words[0],
)
def test_a_command_loads_no_torch(words: list[str], places: dict[str, Path], tmp_path: Path) -> None:
    words = [word.format(**{**places, "new": tmp_path}) for word in words]
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *words, "--json"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stderr.endswith("loaded: \n"), done.stderr  # nor rich, which only tables need


def test_quiet_and_a_pipe_print_no_progress(places: dict[str, Path], tmp_path: Path) -> None:
    done = qformat("quantize", places["dense"], tmp_path / "q", "--codec", "int", "--quiet")
    assert done.code == 0 and done.err == "" and "stored bits" in done.out


def test_codecs_lists_what_there_is(command: Command) -> None:
    found = command("codecs", "--json").json
    assert [one["name"] for one in found["codecs"]] == list(codecs.NAMES)
    assert all(one.keys() == {"name", "what", "native", "triton"} and one["what"] for one in found["codecs"])
    assert {"nf4", "fp4", "hyb-q9", "higgs-p2-n256"} <= set(found["tables"])
    assert "trellis" in command("codecs").out


def test_settings_are_json_where_they_can_be() -> None:
    from qformat.cli.commands import parse_settings

    assert parse_settings(["bits=3", "code=mul1", "block=[1, -1]", "table=float16", "a==b", "scales=null"]) == {
        "bits": 3,
        "code": "mul1",
        "block": [1, -1],
        "table": "float16",
        "a": "=b",
        "scales": None,
    }


WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from qformat.cli import main; main()"


def test_a_missing_package_is_named_with_the_extra_that_brings_it() -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, "eval", str(EXAMPLES / "tiny-llama")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 5
    assert done.stderr.splitlines() == [
        "error: expected the package torch, found none",
        "hint: pip install 'qformat-weights[torch]'",
    ]


def test_conformance_holds_another_program_against_the_vectors() -> None:
    """One that gives up on everything as damaged is right about the invalid cases alone."""
    report = qformat("conformance", "--decoder", f"{sys.executable} -S -c 'raise SystemExit(3)'", "--json").json
    results = {row["case"]: row["result"] for row in report["cases"]}
    assert {row["decoder"] for row in report["cases"]} == {"command"} and report["skipped"] == 0
    assert results["files/invalid-truncated"] == "passed" and results["table/nf4"] == "failed"
    assert report["failed"] > report["passed"] > 100
