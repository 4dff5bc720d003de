"""``Body``: the nodes of a function being written, and the steps that the codecs share.

What a codec's ``decode`` does in NumPy is done here in operators of ONNX, in the same order and with the same
roundings, so that the values are equal bit for bit. A value is the name of a node's output; a NumPy array stands for a
constant.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qformat import bits as fields
from qformat import blocks
from qformat.dtypes import NUMPY, Array
from qformat.layout import PartType

OPSET = 20
TYPES: dict[str, int] = {  # of parts and dense tensors; float8 as bytes, which every runtime reads
    "bool": TensorProto.BOOL,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "uint16": TensorProto.UINT16,
    "int16": TensorProto.INT16,
    "uint32": TensorProto.UINT32,
    "int32": TensorProto.INT32,
    "uint64": TensorProto.UINT64,
    "int64": TensorProto.INT64,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "float8_e4m3fn": TensorProto.UINT8,
    "float8_e8m0fnu": TensorProto.UINT8,
}
Value = str | Array | np.generic


class Body:
    """The nodes of one function, in order."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def op(self, kind: str, *inputs: Value, **attributes: Any) -> str:
        """Add a node of one output; its name is returned."""
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        out = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [out], **attributes))
        return out

    def constant(self, value: Array | np.generic) -> str:
        return self.op("Constant", value=numpy_helper.from_array(np.asarray(value)))

    def cast(self, x: Value, dtype: str) -> str:
        return self.op("Cast", x, to=TYPES[dtype])

    def reshape(self, x: Value, *shape: int) -> str:
        return self.op("Reshape", x, np.array(shape, np.int64))

    def cut(self, x: str, *shape: int) -> str:
        """The first elements along the last axes."""
        stops, axes = np.array(shape, np.int64), np.arange(-len(shape), 0, dtype=np.int64)
        return self.op("Slice", x, np.zeros_like(stops), stops, axes)

    def widen(self, x: str, dtype: PartType) -> str:
        """A part as float32, exactly; one that was packed is that already."""
        if not isinstance(dtype, str) or dtype == "float32":
            return x
        if "float8" in dtype:
            table = np.arange(256, dtype=np.uint8).view(NUMPY[dtype]).astype(np.float32)
            return self.op("Gather", table, self.cast(x, "int32"))
        return self.cast(x, "float32")

    def rounded(self, x: str, dtype: str) -> str:
        """float32 rounded to ``dtype``, widened back."""
        return x if dtype == "float32" else self.cast(self.cast(x, dtype), "float32")

    def rounded_double(self, x: str, dtype: str) -> str:
        """float64 rounded once to ``dtype``, as float32. Runtimes reach the 16-bit types by way of float32, and a
        number that this first rounding has made a tie may then go the wrong way: it goes where the remainder points.
        """
        near = self.cast(x, "float32")
        if dtype == "float32":
            return near
        once = self.rounded(near, dtype)
        step = self.op("Sub", near, once)
        other = self.op("Add", self.op("Add", once, step), step)  # the neighbour, where `near` is a tie
        remainder = self.cast(self.op("Sign", self.op("Sub", x, self.cast(near, "float64"))), "float32")
        towards = self.op("Greater", self.op("Mul", self.op("Sign", step), remainder), np.float32(0))
        tie = self.op("Equal", self.rounded(other, dtype), other)
        return self.op("Where", self.op("And", towards, tie), other, once)

    def windows(self, packed: str, size: int, starts: Array, width: int) -> str:
        """Fields of ``width`` bits of cyclic strings, at the bits ``starts``: uint8 [..., size] -> int32 of the shape
        [..., *starts]. Bytes are joined to words before they are gathered: there are fewer of them than fields.
        """
        byte = word = self.cast(packed, "int32")
        for k in range(1, (int((starts % 8).max()) + width + 7) // 8):
            following = self.op("Gather", byte, (np.arange(size) + k) % size, axis=-1)
            word = self.op("Add", word, self.op("Mul", following, np.int32(256**k)))
        field = self.op("Gather", word, starts // 8, axis=-1)
        if (starts % 8).any():
            field = self.op("Div", field, (1 << starts % 8).astype(np.int32))
        return self.op("BitwiseAnd", field, np.int32(2**width - 1))

    def unpack(self, packed: str, bits: int, shape: tuple[int, int]) -> str:
        """``qformat.bits.unpack``: uint8 [rows, bytes] -> codes int32 [rows, count]."""
        rows, count = shape
        groups = -(-count // fields.GROUP)
        missing = groups * bits - fields.row_bytes(count, bits)
        if missing:
            packed = self.op("Concat", packed, np.zeros((rows, missing), np.uint8), axis=1)
        grouped = self.reshape(packed, rows, groups, bits)
        codes = self.reshape(self.windows(grouped, bits, np.arange(fields.GROUP) * bits, bits), rows, -1)
        return self.cut(codes, count) if groups * fields.GROUP != count else codes

    def spread(self, values: str, shape: tuple[int, int], block: blocks.Block, view: blocks.Block | None = None) -> str:
        """``qformat.blocks.spread``: one value for each block -> what broadcasts to one for each element."""
        full = view or shape
        (rows, cols), (down, across) = blocks.size(block, full), blocks.grid(block, full)
        if view is None:  # an axis with one block need not be filled: 1 broadcasts
            rows, cols = (rows if down > 1 else 1), (cols if across > 1 else 1)
        if (rows, cols) != (1, 1):
            values = self.op("Expand", self.reshape(values, down, 1, across, 1), np.array([down, rows, across, cols]))
            values = self.reshape(values, down * rows, across * cols)
        reach = min(down * rows, full[0]), min(across * cols, full[1])
        if reach != (down * rows, across * cols):
            values = self.cut(values, *reach)
        return self.reshape(values, *shape) if view is not None else values
