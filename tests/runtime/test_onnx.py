"""The ONNX functions, in ONNX Runtime and in ``onnx.reference``, against ``decode`` and float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import making
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

from qformat import codecs, weight
from qformat.dtypes import NUMPY, Array, rounded
from qformat.errors import UnsupportedError
from qformat.manifest import Entry
from qformat.runtime.ort.body import OPSET, TYPES, Body
from qformat.runtime.ort.functions import DOMAIN, Kind, decode_term, function, text
from qformat.weight import PackedWeight

INT = {"codec": "int", "bits": 4, "block": [1, 16], "zero": 8}
NF4 = {"codec": "table", "bits": 4, "table": "nf4", "block": [1, 32], "scales": "bfloat16"}
NESTED = {**NF4, "scales": {"codec": "int", "bits": 8, "block": [4, 1], "scales": "float32", "zero": 128}}
HASH = {"codec": "trellis", **codecs.get("trellis").preset(2, True, {})}
TURN = {"in": {"size": 32, "scale": "int8"}, "out": {"size": 16, "scale": "float16"}}
FULL = {
    "in": {"size": 16, "matrix": "float32", "scale": "float32", "perm": "int32"},
    "out": {"size": 4, "matrix": "float64", "perm": "int32"},
}
PRESETS = [(codec, bits) for codec in codecs.NAMES for bits in range(1, 9)] + [("trellis", 2.5)]
ENTRIES = {
    "int": making.entry((24, 64), INT),
    "table-nested": making.entry((24, 64), NESTED),
    "padded": making.entry((21, 50), INT, stored_shape=[24, 64]),
    "scaled": making.entry((24, 64), INT, rotation={"in": {"scale": "bfloat16"}}),
    "placed": making.entry((24, 64), INT, rotation={"out": {"size": 2, "perm": "int32"}}),
    "turned": making.entry((32, 64), INT, rotation=TURN),
    "turned-56-12": making.entry((24, 112), INT, rotation={"in": {"size": 56}, "out": {"size": 12}}),
    "fully-turned": making.entry((24, 64), INT, rotation=FULL),
    "trellis-turned-padded": making.entry((21, 50), HASH, stored_shape=[32, 64], rotation=TURN),
    "sum-rounded": making.entry((24, 64), INT, NF4, sum_dtype="float16"),
    "sum-outside": making.entry((24, 64), INT, {**NF4, "outside": True}, rotation=FULL),
    "sum-outside-of-none": making.entry((21, 50), INT, {**NF4, "outside": True}, stored_shape=[24, 64]),
}


def types_of(entry: Entry) -> dict[str, int]:
    return {part.name: TYPES[str(part.dtype)] for part in weight.layout(entry)}


def initializers(held: PackedWeight) -> list[onnx.TensorProto]:
    types = types_of(held.entry)
    return [helper.make_tensor(n, types[n], part.shape, part.tobytes(), raw=True) for n, part in held.parts.items()]


def model_of(nodes: Any, inputs: Any, output: Any, constants: Any = (), functions: Any = ()) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "test", inputs, [output], list(constants))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)
    onnx.checker.check_model(model)
    return model


def results(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """From ONNX Runtime with constants folded, from it as the graph stands, from ``onnx.reference``."""
    out = []
    for level in ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        out += session.run(None, dict(feeds))
    return out + ReferenceEvaluator(model).run(None, dict(feeds))  # type: ignore[no-any-return]


def check_decoding(term: dict[str, Any], shape: tuple[int, int], rng: np.random.Generator) -> None:
    held = making.packed(rng, making.entry(shape, term))
    with np.errstate(all="ignore"):  # random parts may reach beyond float16
        expected = weight.decode_matrix(held.entry, held.parts)
    body = Body()
    output = helper.make_tensor_value_info(decode_term(body, term, shape), TYPES["float32"], shape)
    for found in results(model_of(body.nodes, [], output, initializers(held)), {}):
        assert found.dtype == np.float32 and found.shape == shape
        equal = found.view(np.uint32) == expected.view(np.uint32)
        assert (equal | np.isnan(found) & np.isnan(expected)).all()


@pytest.mark.parametrize(("codec", "bits"), PRESETS)
def test_what_quantize_writes_decodes_bit_for_bit(codec: str, bits: float) -> None:
    for rotated in (False, True):
        try:
            term = {"codec": codec, **codecs.get(codec).preset(bits, rotated, {})}
        except UnsupportedError:
            pytest.skip(f"{codec} has no {bits} bits")
        check_decoding(term, (16, 80), np.random.default_rng(0))


some = settings(max_examples=40)


@some
@given(st.data(), st.integers(1, 12), st.integers(1, 40), making.seeds)
def test_int_decodes_bit_for_bit(data: st.DataObject, rows: int, cols: int, rng: np.random.Generator) -> None:
    check_decoding(data.draw(making.int_terms((rows, cols))), (rows, cols), rng)


@some
@given(st.data(), st.integers(1, 12), st.integers(1, 40), making.seeds)
def test_table_decodes_bit_for_bit(data: st.DataObject, rows: int, cols: int, rng: np.random.Generator) -> None:
    check_decoding(data.draw(making.table_terms((rows, cols))), (rows, cols), rng)


@some
@given(st.data(), st.integers(1, 12), st.integers(1, 40), making.seeds)
def test_float_decodes_bit_for_bit(data: st.DataObject, rows: int, cols: int, rng: np.random.Generator) -> None:
    check_decoding(data.draw(making.float_terms((rows, cols))), (rows, cols), rng)


@some
@given(st.data(), st.sampled_from([1, 4, 6]), st.sampled_from([1, 8, 12, 24]), making.seeds)
def test_additive_decodes_bit_for_bit(data: st.DataObject, rows: int, cols: int, rng: np.random.Generator) -> None:
    check_decoding(data.draw(making.additive_terms((rows, cols))), (rows, cols), rng)


@some
@given(st.data(), st.integers(1, 12), st.sampled_from([8, 24, 40]), making.seeds)
def test_e8p_decodes_bit_for_bit(data: st.DataObject, rows: int, cols: int, rng: np.random.Generator) -> None:
    check_decoding(data.draw(making.e8p_terms((rows, cols))), (rows, cols), rng)


@some
@given(making.trellis_terms(), making.seeds)
def test_trellis_decodes_bit_for_bit(term: dict[str, Any], rng: np.random.Generator) -> None:
    check_decoding(term, (32, 48), rng)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float64_rounds_once(dtype: Literal["float16", "bfloat16"]) -> None:
    """Just above, on and just below the middle of neighbours; float32 cannot tell these from the middle itself."""
    low = rounded(np.random.default_rng(0).standard_normal(500).astype(np.float32), dtype).astype(np.float64)
    high = rounded(low * (1 + 2.0 ** (-9 if dtype == "float16" else -6)), dtype).astype(np.float64)
    middle = (low + high) / 2
    values = np.concatenate([middle * (1 + tiny) for tiny in (-(2.0**-40), 0, 2.0**-40)] + [low, low * 1.0001])
    expected = rounded(values, dtype)
    assert (expected != rounded(values.astype(np.float32), dtype)).any()
    body = Body()
    output = helper.make_tensor_value_info(body.rounded_double("x", dtype), TYPES["float32"], values.shape)
    x = helper.make_tensor_value_info("x", TYPES["float64"], values.shape)
    for found in results(model_of(body.nodes, [x], output), {"x": values}):
        assert np.array_equal(found, expected)


def one_node(kind: Kind, held: PackedWeight, x: Array) -> list[Array]:
    """The function as it stands in an exported model, run on x."""
    node = helper.make_node(f"{kind}_0", ["x", *held.parts], ["y"], domain=DOMAIN, entry=text(held.entry), weight="w")
    info = helper.make_tensor_value_info("x", TYPES[x.dtype.name], ["batch", "seq", *x.shape[2:]])
    dtype = x.dtype.name if kind == "Linear" else "float32"
    y = helper.make_tensor_value_info("y", TYPES[dtype], ["batch", "seq", "width"])
    model = model_of([node], [info], y, initializers(held), [function(kind, f"{kind}_0", held.entry)])
    found = results(model, {"x": x})
    assert {one.dtype.name for one in found} == {dtype}
    return found


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_linear(name: str, dtype: str) -> None:
    held = making.packed(np.random.default_rng(0), ENTRIES[name])
    x = np.random.default_rng(1).standard_normal((2, 3, held.shape[1])).astype(NUMPY[dtype])
    expected = x.astype(np.float64) @ held.decode().astype(np.float64).T
    unit = 2.0**-24 if dtype == "float32" else 2.0**-11
    for found in one_node("Linear", held, x):
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 8 * unit * np.abs(expected).max()


@pytest.mark.parametrize("name", ENTRIES)
def test_embedding(name: str) -> None:
    held = making.packed(np.random.default_rng(0), ENTRIES[name])
    rows = np.random.default_rng(1).integers(0, held.shape[0], (2, 5))
    expected = held.decode()[rows]
    for found in one_node("Embedding", held, rows):
        assert found.shape == expected.shape
        if held.entry.rotation is None:
            assert np.array_equal(found, expected)
        assert np.abs(found - expected).max() < 8 * 2.0**-24 * np.abs(expected).max()


@pytest.mark.parametrize("more", [{"shape": (2, 4, 8), "stack": 1}, {"shape": (4, 8), "transposed": True}])
def test_what_has_no_function(more: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="a matrix"):
        function("Linear", "Linear_0", making.entry(more.pop("shape"), INT, **more))


def test_equal_packing_has_equal_text() -> None:
    one = making.entry((24, 64), INT, weights=["a"], label="rounded")
    assert text(one) == text(making.entry((24, 64), INT, weights=["b"])) != text(making.entry((24, 48), INT))
