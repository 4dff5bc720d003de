"""The torch operators and packed modules, against ``PackedWeight.decode`` and float64."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
from collections.abc import Iterable
from typing import Any

import making
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qformat import codecs
from qformat.errors import DamagedError, UnsupportedError
from qformat.runtime.pytorch import matrix, modules, ops
from qformat.runtime.pytorch.modules import QEmbedding, QLinear
from qformat.runtime.pytorch.prepared import Prepared, _known, prepared, spec
from qformat.runtime.pytorch.tensor import PackedTensor
from qformat.weight import PackedWeight

INT = {"codec": "int", "bits": 4, "block": [1, 32], "zero": 8}
ODD = {"codec": "int", "bits": 3, "block": [2, 5], "zeros": "uint8", "scales": "bfloat16"}
NF4 = {"codec": "table", "bits": 4, "table": "nf4", "block": [1, 16], "scales": "float32"}
GRID = {"codec": "table", "bits": 8, "p": 4, "table": "gauss-p4-n256", "block": [-1, -1], "scales": "float16"}
HASH = {"codec": "trellis", "L": 12, "bits": [2], "code": "hash", "shift": 7, "taps": [0, 2, 10], "index": [2, 2]}
HASH |= {"table": "hash-16", "order": "c2 c3 c0 c1 r0 r1 r2 r3", "scales": "float16"}
MUL1 = {"codec": "trellis", "L": 16, "bits": [3], "code": "mul1", "order": "c0 c1 r0 r1 r2 r3 c2 c3"}
NESTED = {**NF4, "scales": {"codec": "int", "bits": 8, "block": [4, 1], "scales": "float32", "zero": 128}}
TURN = {"in": {"size": 32, "scale": "int8"}, "out": {"size": 16, "scale": "float16"}}
QTIP = {"codec": "trellis", "L": 16, "V": 2, "bits": [3], "code": "hyb", "index": [9], "table": "float16"}
QTIP |= {"order": "c0 r3 c3 c1 c2 r0 r1 r2", "reversed": True}
WHOLE = {"in": {"size": 160, "scale": "float16"}, "out": {"size": 96, "scale": "float32"}}
FULL = {
    "in": {"size": 4, "matrix": "float32", "perm": "int32"},
    "out": {"size": 2, "perm": "int32", "scale": "bfloat16"},
}

# of which the second is taken
PIECES = [{"weights": [name], "rows": rows} for name, rows in (("q", 11), ("k", 21), ("v", 5))]

CASES = {
    "int": making.entry((48, 96), INT),
    "int-odd": making.entry((37, 45), ODD),
    "int-groups": making.entry((16, 40), {**INT, "block": [1, 8], "groups": "int32"}),
    "int-view": making.entry((10, 48), {**INT, "view": [5, 96], "block": [-1, 1]}),
    "int-fused": making.entry((8, 24), {**INT, "zero": 0, "offsets": "float16", "rounding": "fused"}),
    "table": making.entry((33, 50), NF4),
    "table-vectors": making.entry((32, 64), GRID),
    "table-per-row": making.entry((5, 24), {"codec": "table", "bits": 3, "table": "float16", "table_block": [1, -1]}),
    "table-nested": making.entry((16, 64), NESTED),
    "trellis": making.entry((32, 64), HASH),
    "trellis-padded": making.entry((37, 45), MUL1, stored_shape=[48, 48]),
    "int-turned": making.entry((48, 96), INT, rotation=TURN),
    "table-turned": making.entry((48, 96), GRID, rotation={"in": {"size": 8}}),
    "trellis-turned": making.entry((37, 90), HASH, stored_shape=[48, 96], rotation=TURN),
    "int-turned-24-20": making.entry((40, 96), INT, rotation={"in": {"size": 24}, "out": {"size": 20}}),
    "trellis-as-qtip": making.entry((96, 160), QTIP, rotation=WHOLE),
    "int-fully-turned": making.entry((12, 40), INT, rotation=FULL),
    "int-scaled": making.entry((12, 40), INT, rotation={"in": {"scale": "float32"}}),
    "sum": making.entry((32, 64), HASH, INT),
    "sum-rounded": making.entry((32, 64), INT, NF4, sum_dtype="float16"),
    "sum-outside": making.entry((32, 64), {**INT, "outside": True}, HASH, rotation=TURN),
    "sum-outside-of-none": making.entry((32, 64), {**INT, "outside": True}, NF4, sum_dtype="bfloat16"),
    "transposed": making.entry((64, 32), INT, transposed=True),
    "rows": making.entry((37, 45), ODD, concat=PIECES),
    "rows-turned": making.entry((37, 90), HASH, stored_shape=[48, 96], rotation=TURN, concat=PIECES),
}
SHAPES = {  # what only `dequantize` has to hold
    "stack": making.entry((3, 20, 32), INT, stack=1),
    "stack-transposed": making.entry((2, 3, 30, 17), HASH, stack=2, transposed=True, stored_shape=[2, 3, 32, 32]),
    "convolution": making.entry((6, 4, 3, 3), {**INT, "block": [1, 9]}),
    "rows-transposed": making.entry((37, 32), INT, transposed=True, concat=PIECES),
    "rows-of-a-stack": making.entry((37, 4, 32), INT, stack=1, concat=PIECES),
}


def made(name: str) -> PackedWeight:
    weight = making.packed(np.random.default_rng(len(name)), (CASES | SHAPES)[name])
    return dataclasses.replace(weight, rows=(11, 32)) if weight.entry.concat else weight


def arguments(weight: PackedWeight) -> tuple[list[Tensor], str]:
    return list(modules.tensors(weight.parts).values()), spec(weight.entry, weight.rows)


def as_codecs_see_it(weight: PackedWeight) -> Tensor:
    value = torch.from_numpy(weight.decode())
    return value.mT if weight.entry.transposed else value


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def rms(error: Tensor) -> float:
    return float(error.double().square().mean().sqrt())


FEW = ("int-odd", "int-groups", "table-vectors", "table-nested", "trellis-turned", "sum-outside", "stack")
KINDS: dict[str, tuple[type[matrix.Matrix], ...]] = {
    "native": (matrix.Native, matrix.Reference),
    "triton": (matrix.Triton,),  # interpreted where there is no GPU
    "reference": (matrix.Reference,),
}


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("compiled kernels take no tensors of the CPU")
    monkeypatch.setattr(matrix, "MATRICES", {("cpu", name): KINDS[request.param] for name in codecs.NAMES})


def with_each_kind(names: Iterable[str]) -> pytest.MarkDecorator:
    """Every case with each kind of kernels; of the interpreted ones, which are slow, a few."""
    cases = [(kind, name) for kind in KINDS for name in names if kind != "triton" or name in FEW]
    return pytest.mark.parametrize(("kernels", "name"), cases, indirect=["kernels"])


@with_each_kind(CASES | SHAPES)
def test_dequantize(name: str, kernels: None) -> None:
    weight = made(name)
    found, expected = ops.dequantize_op(*arguments(weight)).numpy(), weight.decode()
    assert found.shape == weight.shape
    if weight.entry.rotation is None:
        assert np.array_equal(found, expected)
    else:  # both in float64, added up in another order
        np.testing.assert_array_max_ulp(found, expected, 1)


@with_each_kind(CASES)
def test_linear_is_as_exact_as_float32(name: str, kernels: None) -> None:
    weight = made(name)
    dense = as_codecs_see_it(weight)
    x = normal(2, 9, dense.shape[1])
    exact = x.double() @ dense.double().mT
    y = ops.linear_op(x, *arguments(weight))
    assert y.dtype == torch.float32 and y.shape == exact.shape
    # a rotation is two more products, so what is compared with is made of as many
    of_float32 = rms(x @ dense.mT - exact) * (2 if weight.entry.rotation else 1)
    assert rms(y - exact) <= 2 * of_float32


@with_each_kind(CASES)
def test_embedding(name: str, kernels: None) -> None:
    weight = made(name)
    dense = as_codecs_see_it(weight)
    rows = torch.tensor([[0, len(dense) - 1, 3], [3, 1, 2]])
    found = ops.embedding_op(rows, *arguments(weight))
    if weight.entry.rotation is None:
        assert torch.equal(found, dense[rows])
    else:
        assert rms(found - dense[rows]) <= 1e-6 * rms(dense)


@with_each_kind(CASES)
def test_derivative(name: str, kernels: None) -> None:
    weight = made(name)
    dense = as_codecs_see_it(weight)
    x, y = normal(5, dense.shape[1]).requires_grad_(), normal(5, dense.shape[0])
    (ops.linear_op(x, *arguments(weight)) * y).sum().backward()
    assert x.grad is not None
    assert rms(x.grad - y.double() @ dense.double()) <= 1e-6 * rms(x.grad)


@pytest.mark.parametrize("name", ["trellis-turned", "rows-turned"])  # padded too
def test_operators_are_what_torch_expects(name: str) -> None:
    weight = made(name)
    rest = arguments(weight)
    torch.library.opcheck(ops.linear_op, (normal(2, 3, 90).requires_grad_(), *rest))
    for op, args in (
        (torch.ops.qformat.linear_transposed.default, (normal(4, weight.shape[0]), *rest)),
        (ops.embedding_op, (torch.tensor([[1, 2]]), *rest)),
        (ops.dequantize_op, rest),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_rows_of_a_product_that_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the input is the same and unchanged; each takes its own once."""
    made_of: list[Tensor] = []
    product = Prepared.linear
    monkeypatch.setattr(Prepared, "linear", lambda self, x: made_of.append(x) or product(self, x))
    weight = made("rows-turned")
    parts = list(modules.tensors(weight.parts).values())
    text = spec(weight.entry)
    each = [spec(weight.entry, rows) for rows in ((0, 11), (11, 32), (32, 37))]
    x = normal(3, 90).requires_grad_()
    found = [ops.linear_op(x, parts, one) for one in each]
    assert len(made_of) == 1 and torch.equal(torch.cat(found, dim=1), ops.linear_op(x, parts, text))
    made_of.clear()
    ops.linear_op(x, parts, each[0])
    assert torch.equal(ops.linear_op(x, parts, each[0]), found[0]) and len(made_of) == 2
    with torch.no_grad():
        x.mul_(2)
    assert torch.allclose(ops.linear_op(x, parts, each[1]), 2 * found[1], rtol=1e-4) and len(made_of) == 3
    with torch.inference_mode():  # whose tensors do not tell that they were written to
        x = x * 1
        y = ops.linear_op(x, parts, each[0])
        assert torch.equal(ops.linear_op(x.zero_(), parts, each[1]), torch.zeros(3, 21)) and y.any()


def test_a_layer_of_rows() -> None:
    weight = made("rows")
    x = normal(3, 45)
    layer = modules.linear(weight)
    assert torch.equal(layer(x), ops.linear_op(x, *arguments(weight)))
    whole = dataclasses.replace(weight, rows=None)
    assert torch.equal(modules.linear(whole)(x)[:, 11:32], layer(x))


def test_rows_are_gone_with_the_input() -> None:
    parts, text = arguments(made("rows"))
    x = normal(3, 45)
    ops.linear_op(x, parts, text)
    before = len(ops._products)
    del x
    gc.collect()
    assert len(ops._products) == before - 1


def test_shapes_and_strides_of_activations() -> None:
    rest = arguments(made("trellis-turned"))
    x = normal(3, 2, 90)
    y = ops.linear_op(x, *rest)
    assert torch.equal(ops.linear_op(x.mT.contiguous().mT, *rest), y)
    assert torch.equal(ops.linear_op(x[0, 0], *rest), y[0, 0])
    assert ops.linear_op(x[:0], *rest).shape == (0, 2, 37)
    assert ops.embedding_op(torch.empty(2, 0, dtype=torch.int32), *rest).shape == (2, 0, 90)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_activations_are_rounded_once(dtype: torch.dtype) -> None:
    weight = made("trellis-turned")
    x = normal(4, weight.shape[1]).to(dtype)
    y = ops.linear_op(x, *arguments(weight))
    assert y.dtype == dtype
    assert torch.equal(y, ops.linear_op(x.float(), *arguments(weight)).to(dtype))


def test_wrong_arguments_are_refused() -> None:
    weight = made("trellis-padded")
    with pytest.raises(ValueError, match="45 columns expected, 44 found"):  # and not padded
        ops.linear_op(normal(2, 44), *arguments(weight))
    with pytest.raises(IndexError, match="rows from 0 to 36 expected, 37 to 37 found"):
        ops.embedding_op(torch.tensor([37]), *arguments(weight))
    with pytest.raises(UnsupportedError, match="int8"):
        ops.check_activations("int8")


def test_without_a_kernel_a_strip_is_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "MATRICES", {})
    weight = making.packed(np.random.default_rng(0), making.entry((1000, 64), INT))
    decoded: list[int] = []
    whole = PackedWeight.decode
    monkeypatch.setattr(PackedWeight, "decode", lambda self: decoded.append(self.shape[0]) or whole(self))
    ops.linear_op(normal(1, 64), *arguments(weight))
    assert max(decoded) == matrix.STRIP and sum(decoded) == 1000


def test_what_is_prepared_goes_with_the_weight() -> None:
    gc.collect()
    before = len(_known)
    layer = modules.linear(made("int"))
    layer(normal(1, 96))
    assert len(_known) == before + 1
    del layer
    gc.collect()
    assert len(_known) == before


def test_what_is_prepared_follows_the_values() -> None:
    weight = made("table-per-row")  # whose table a kernel may hold as a copy
    parts, text = arguments(weight)
    parts = [part.clone() for part in parts]
    x = normal(3, 24)
    y = ops.linear_op(x, parts, text)
    parts[1].mul_(2)
    assert torch.allclose(ops.linear_op(x, parts, text), 2 * y)
    assert prepared(parts, text) is prepared(parts, text)


def test_module_keeps_the_bytes_of_its_parts() -> None:
    weight = made("int-odd")
    layer = modules.linear(weight, bias=normal(37))
    assert isinstance(layer, QLinear) and isinstance(layer, nn.Linear)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        layer.to(dtype)
        assert layer.weight.dtype == layer.bias.dtype == dtype
        state = layer.state_dict()
        assert state.keys() == {"bias", *(f"weight_{part}" for part in weight.parts)}
        for name, part in weight.parts.items():
            assert matrix.array(state[f"weight_{name}"]).tobytes() == part.tobytes()
    assert not any(layer.get_parameter(name).requires_grad for name in layer.part_names())
    x = normal(2, 45)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_weight_is_a_tensor_that_is_only_read() -> None:
    packed = made("int")
    weight = modules.linear(packed, dtype=torch.float16).weight
    dense = torch.from_numpy(packed.decode()).half()
    assert isinstance(weight, PackedTensor)
    assert (weight.shape, weight.dtype, weight.device.type) == (dense.shape, torch.float16, "cpu")
    assert torch.equal(weight * 2, dense * 2) and torch.equal(weight.t()[3], dense.t()[3])
    assert torch.equal(weight.to(torch.float32), dense.float())
    writes: list[Any] = [
        lambda: weight.add_(1),
        lambda: weight.__iadd__(1),
        lambda: weight.data.copy_(dense),
        lambda: weight.detach().zero_(),
        lambda: weight.__setitem__(0, 1),
        lambda: setattr(weight, "data", dense),
        lambda: torch.add(dense, 1, out=weight),
        lambda: nn.init.normal_(weight),
    ]
    for write in writes:
        with pytest.raises(UnsupportedError, match="only read"):
            write()


def test_products_with_the_weight_stay_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module's own forward finds the packed weight, whatever way it multiplies with it."""
    monkeypatch.setattr(PackedTensor, "decode", lambda self: pytest.fail("decoded"))
    tensors = {name: PackedTensor(*arguments(made(name)), torch.float32) for name in ("int", "transposed", "stack")}
    x = normal(3, 96)
    y = ops.linear_op(x, *arguments(made("int")))
    assert torch.equal(nn.functional.linear(x, tensors["int"], y[0]), y + y[0])
    rows = torch.tensor([2, 1])
    assert torch.equal(nn.functional.embedding(rows, tensors["int"]), ops.embedding_op(rows, *arguments(made("int"))))
    x = normal(3, 64)
    y = ops.linear_op(x, *arguments(made("transposed")))
    assert torch.equal(x @ tensors["transposed"], y)
    assert torch.equal(torch.addmm(y[0], x, tensors["transposed"]), y[0] + y)
    x = normal(3, 32)
    exact = x.double() @ torch.from_numpy(made("stack").decode()[1]).double().mT
    assert torch.allclose(nn.functional.linear(x, tensors["stack"][torch.tensor(1)]), exact.float(), atol=1e-5)
    some = PackedTensor(*arguments(made("rows-of-a-stack")), torch.float32)
    for index in (0, -1):
        exact = x.double() @ torch.from_numpy(made("rows-of-a-stack").decode()[index]).double().mT
        assert torch.allclose(nn.functional.linear(x, some[index]), exact.float(), atol=1e-5)
    for index in (21, -22):  # where others have matrices
        with pytest.raises(IndexError, match=f"a number below 21 expected, {index} found"):
            some[index]


def test_a_module_of_any_class_is_packed_where_it_stands() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 3

    packed = made("int")
    dense = torch.from_numpy(packed.decode())
    for module, expected in (
        (Scaled(48, 96), dense[[5, 6]] * 3),
        (nn.Embedding(48, 96, padding_idx=0), dense[[5, 6]]),
    ):
        modules.pack(module, "weight", packed.entry)
        for name, part in modules.tensors(packed.parts).items():
            module.get_parameter(f"weight_{name}").data.copy_(part)
        assert torch.equal(module(torch.tensor([5, 6])), expected)
        assert isinstance(module, nn.Embedding) and isinstance(module.weight, PackedTensor)
        modules.unpack(module)
        assert type(module) in (Scaled, nn.Embedding) and torch.equal(module.weight, dense)
        assert [name for name, _ in module.named_parameters()] == ["weight"]
    with pytest.raises(DamagedError, match=r"the model's shape \[4, 96\], found \[48, 96\]"):
        modules.pack(nn.Linear(96, 4), "weight", packed.entry)
    embedding = nn.Embedding(48, 96)
    modules.pack(embedding, "weight", packed.entry)
    assert type(embedding) is QEmbedding


def test_compiled_and_exported() -> None:
    layer = modules.linear(made("trellis-turned"))
    x = normal(3, 90)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    graph = torch.export.export(layer, (x,)).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [ops.linear_op]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", FEW[:-1])
def test_on_a_gpu(name: str) -> None:
    weight = made(name)
    dense = as_codecs_see_it(weight)
    parts, text = arguments(weight)
    parts = [part.cuda() for part in parts]
    x, rows = normal(5, dense.shape[1]), torch.tensor([1, 0, 1])
    assert rms(ops.linear_op(x.cuda(), parts, text).cpu() - x.double() @ dense.double().mT) <= 1e-5
    assert rms(ops.embedding_op(rows.cuda(), parts, text).cpu() - dense[rows]) <= 1e-6
    assert rms(ops.dequantize_op(parts, text).cpu() - torch.from_numpy(weight.decode())) <= 1e-6
