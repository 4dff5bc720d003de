"""The plugin for ONNX Runtime: its kernels in place of the functions, against float64."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import making
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from qformat import weight
from qformat.errors import UnsupportedError, UsageError
from qformat.kernels import native
from qformat.runtime.ort import plugin
from qformat.runtime.ort.body import OPSET, TYPES
from qformat.runtime.ort.functions import DOMAIN, Kind, function, text
from qformat.weight import PackedWeight

pytestmark = pytest.mark.skipif(not native.available(), reason="no native library")

INT = {"codec": "int", "bits": 4, "block": [1, 16], "zero": 8}
NF4 = {"codec": "table", "bits": 4, "table": "nf4", "block": [1, 32], "scales": "bfloat16"}
NESTED = {**NF4, "scales": {"codec": "int", "bits": 8, "block": [4, 1], "scales": "float32", "zero": 128}}
FP8 = {"codec": "float", "format": "e4m3fn", "block": [-1, -1], "scales": "float8_e8m0fnu"}
AQLM = {"codec": "additive", "bits": 8, "books": 2, "group": [1, 8], "block": [1, -1], "scales": "float16"}
E8P = {"codec": "e8p", "bits": 2, "block": [-1, -1], "scales": "float16"}
MUL1 = {"codec": "trellis", "L": 12, "bits": [2], "code": "mul1", "order": "c0 c1 r0 r1 r2 r3 c2 c3"}
TURN = {"in": {"size": 32, "scale": "int8"}, "out": {"size": 16, "scale": "float16"}}
ENTRIES = {
    "int": making.entry((24, 64), INT),
    "table-packed-scales": making.entry((24, 64), NESTED),
    "float": making.entry((24, 64), FP8),
    "additive": making.entry((24, 64), AQLM),
    "trellis-turned-padded": making.entry((21, 50), MUL1, stored_shape=[32, 64], rotation=TURN),
    "e8p-sum": making.entry((32, 64), E8P, E8P, sum_dtype="float16", rotation=TURN),
}


def packed(name: str) -> PackedWeight:
    return making.packed(np.random.default_rng(len(name)), ENTRIES[name])


def model(held: PackedWeight, kind: Kind, *, number: int = 0, body: bool = True, constant: bool = True) -> bytes:
    """One operator; ``body``: with its function."""
    layout = weight.layout(held.entry)
    types = {part.name: TYPES[str(part.dtype)] for part in layout}
    parts = [helper.make_tensor(n, types[n], part.shape, part.tobytes(), raw=True) for n, part in held.parts.items()]
    name = f"{kind}_{number}"
    names = ["x", *(part.name for part in layout)]
    node = helper.make_node(name, names, ["y"], domain=DOMAIN, entry=text(held.entry), weight="w")
    x = helper.make_tensor_value_info(
        "x",
        TensorProto.FLOAT if kind == "Linear" else TensorProto.INT64,
        ["a", "b", held.shape[1]][: 3 - (kind != "Linear")],
    )
    free = [] if constant else [helper.make_tensor_value_info(part.name, types[part.name], part.dims) for part in parts]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b", None])
    graph = helper.make_graph([node], "test", [x, *free], [y], parts if constant else [])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    functions = [function(kind, name, held.entry)] if body else []
    made = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    return made.SerializeToString()  # type: ignore[no-any-return]


def session(of: bytes, threads: int = 0) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    plugin.register(options)
    with plugin.making() as weights:
        made = onnxruntime.InferenceSession(of, options, providers=["CPUExecutionProvider"])
    made.weights = weights
    return made


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("body", [True, False])  # without: nothing but the plugin can run it
def test_linear(name: str, body: bool) -> None:
    held = packed(name)
    dense = held.decode()
    made = session(model(held, "Linear", body=body))
    assert len(made.weights) == 1 and made.weights[0].packed
    for shape in ((1, 1), (3, 5), (2, 0)):
        x = np.random.default_rng(0).standard_normal((*shape, dense.shape[1]), dtype=np.float32)
        exact = x.astype(np.float64) @ dense.T.astype(np.float64)
        (y,) = made.run(None, {"x": x})
        assert y.dtype == np.float32 and y.shape == exact.shape
        of_float32 = np.abs(x @ dense.T - exact).max(initial=0) * (2 if held.entry.rotation else 1)
        assert np.abs(y - exact).max(initial=0) <= 3 * of_float32 + 1e-9


@pytest.mark.parametrize("name", ENTRIES)
def test_embedding(name: str) -> None:
    held = packed(name)
    dense = held.decode()
    made = session(model(held, "Embedding", body=False))
    rows = np.array([[0, len(dense) - 1, -1], [3, 3, -len(dense)]])
    (y,) = made.run(None, {"x": rows})
    assert np.abs(y - dense[rows]).max() <= (2e-6 if held.entry.rotation else 0) * np.abs(dense).max()
    for beyond in (len(dense), -len(dense) - 1):
        with pytest.raises(Exception, match=f"expected rows below {len(dense)}"):
            made.run(None, {"x": np.array([[beyond]])})


def test_numbers_beyond_those_of_the_library_run_by_their_functions() -> None:
    held = packed("int")
    x = np.random.default_rng(0).standard_normal((1, 2, 64), dtype=np.float32)
    made = session(model(held, "Linear", number=1000))
    assert made.weights == []
    np.testing.assert_allclose(made.run(None, {"x": x})[0], x @ held.decode().T, rtol=1e-4, atol=1e-4)


def test_any_number_of_threads_and_of_sessions_at_once_gives_the_same() -> None:
    held = making.packed(np.random.default_rng(3), making.entry((512, 1024), MUL1, rotation=TURN))
    x = np.random.default_rng(0).standard_normal((1, 33, 1024), dtype=np.float32)
    sessions = [session(model(held, "Linear"), threads) for threads in (1, 2, 3, 0)]
    expected = sessions[0].run(None, {"x": x})[0]
    found: list[Any] = []

    def run(made: onnxruntime.InferenceSession) -> None:
        found.extend(made.run(None, {"x": x})[0] for _ in range(3))

    workers = [threading.Thread(target=run, args=(made,)) for made in sessions * 2]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 24 and all(np.array_equal(y, expected) for y in found)


def test_what_is_wrong_with_a_weight_is_said_when_the_session_is_made() -> None:
    held = packed("int")
    with pytest.raises(Exception, match="w: expected .* elements of codes, found none, or one that is no initializer"):
        session(model(held, "Linear", constant=False))
    proto = onnx.load_from_string(model(held, "Linear"))
    proto.graph.node[0].attribute[0].s = b'{"shape":[24,64]}'
    assert proto.graph.node[0].attribute[0].name == "entry"
    with pytest.raises(Exception, match="w: .*terms"):
        session(proto.SerializeToString())


def test_twice_in_one_session_is_refused() -> None:
    options = onnxruntime.SessionOptions()
    plugin.register(options)
    with pytest.raises(UsageError, match="options without the plugin"):
        plugin.register(options)


def test_a_program_may_register_the_library_by_itself() -> None:
    held = packed("int")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(plugin.library()))
    made = onnxruntime.InferenceSession(model(held, "Linear", body=False), options, providers=["CPUExecutionProvider"])
    x = np.eye(64, dtype=np.float32)[None]
    assert np.array_equal(made.run(None, {"x": x})[0][0], held.decode().T)


def test_the_library_says_what_it_lacks() -> None:
    """Registered where the module that prepares weights was never imported."""
    code = f"""
import onnxruntime
try:
    onnxruntime.SessionOptions().register_custom_ops_library({str(plugin.library())!r})
except Exception as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "expected `import qformat.runtime.ort.plugin`" in out


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda: (None, "no compiler"))
    with pytest.raises(UnsupportedError, match="expected the native library, found no compiler"):
        plugin.register(onnxruntime.SessionOptions())
