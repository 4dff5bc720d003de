"""A second decoder, written from the pages of ``spec/`` and nothing else: plain Python, one value at a time.

It shares no code with qformat. Where it and the reference agree on every vector, the pages say enough.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
import sys
from collections.abc import Callable
from operator import mul
from pathlib import Path
from typing import Any

Matrix = list[list[float]]
TABLES = Path(__file__).resolve().parents[1] / "spec" / "tables"

# ---- numbers: significant bits, exponent of the smallest positive value, largest value
FORMATS = {
    "float32": (24, -149, (2 - 2**-23) * 2.0**127),
    "float16": (11, -24, 65504.0),
    "bfloat16": (8, -133, (2 - 2**-7) * 2.0**127),
}


def rounded(x: float, dtype: str) -> float:
    """x rounded once to the nearest value, ties to even."""
    if x == 0 or math.isinf(x) or math.isnan(x):
        return x
    precision, smallest, largest = FORMATS[dtype]
    unit = max(math.frexp(x)[1] - precision, smallest)
    y = math.copysign(math.ldexp(round(math.ldexp(x, -unit)), unit), x)
    return y if abs(y) <= largest else math.copysign(math.inf, x)


def f32(x: float) -> float:
    return rounded(x, "float32")


def _e4m3(byte: int) -> float:
    exponent, fraction = byte >> 3 & 15, byte & 7
    value = math.ldexp(8 + fraction, exponent - 10) if exponent else math.ldexp(fraction, -9)
    return math.nan if byte & 127 == 127 else -value if byte & 128 else value


# dtype in the file -> bytes of an element, how a group of them becomes a number
READ: dict[str, tuple[int, Callable[[bytes], float]]] = {
    "U8": (1, lambda b: b[0]),
    "I8": (1, lambda b: struct.unpack("<b", b)[0]),
    "I16": (2, lambda b: struct.unpack("<h", b)[0]),
    "I32": (4, lambda b: struct.unpack("<i", b)[0]),
    "F16": (2, lambda b: struct.unpack("<e", b)[0]),
    "BF16": (2, lambda b: struct.unpack("<f", b"\0\0" + b)[0]),
    "F32": (4, lambda b: struct.unpack("<f", b)[0]),
    "F64": (8, lambda b: struct.unpack("<d", b)[0]),
    "F8_E4M3": (1, lambda b: _e4m3(b[0])),
    "F8_E8M0": (1, lambda b: math.nan if b[0] == 255 else math.ldexp(1.0, b[0] - 127)),
}


class Tensor:
    """Shape and numbers, flat in row-major order."""

    def __init__(self, shape: list[int], values: list[Any]) -> None:
        self.shape, self.values = shape, values

    def at(self, lead: tuple[int, ...]) -> Tensor:
        """One matrix of a stack."""
        rest = self.shape[len(lead) :]
        index = 0
        for size, i in zip(self.shape, lead, strict=False):
            index = index * size + i
        count = math.prod(rest)
        return Tensor(rest, self.values[index * count : (index + 1) * count])


def read_file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, info in header.items():
        if info["dtype"] not in READ:
            continue  # no part has it
        size, number = READ[info["dtype"]]
        start, stop = (8 + length + offset for offset in info["data_offsets"])
        tensors[name] = Tensor(info["shape"], [number(data[i : i + size]) for i in range(start, stop, size)])
    return metadata, tensors


def named_table(name: str) -> list[list[float]]:
    return json.loads((TABLES / f"{name}.json").read_text())["entries"]


# ---- what codecs share
def fields(row: list[int], bits: int, count: int) -> list[int]:
    """Bit fields from the least significant bit upward."""
    number = int.from_bytes(bytes(row), "little")
    return [number >> bits * i & (1 << bits) - 1 for i in range(count)]


def code_rows(parts: dict[str, Tensor], bits: int, count: int) -> list[list[int]]:
    rows, size = parts["codes"].shape
    return [fields(parts["codes"].values[i * size : (i + 1) * size], bits, count) for i in range(rows)]


def spread(tensor: Tensor, term: dict[str, Any], rows: int, cols: int) -> Callable[[int, int], float]:
    """The value of a part with one value a block, for the element in row i and column j."""
    down, across = term.get("block", [1, -1])
    R, C = term.get("view") or (rows, cols)
    down, across = R if down == -1 else down, C if across == -1 else across
    columns = -(-C // across)

    def value(i: int, j: int) -> float:
        r, c = divmod(i * cols + j, C)
        return tensor.values[r // down * columns + c // across]

    return value


# ---- codecs: (term, rows, cols, parts) -> matrix
def decode_int(term: dict[str, Any], rows: int, cols: int, parts: dict[str, Tensor]) -> Matrix:
    codes = code_rows(parts, term["bits"], cols)
    of = {name: spread(parts[name], term, rows, cols) for name in ("scales", "zeros", "offsets") if name in parts}
    if "groups" in parts:
        for name in of:
            down, width = term["block"][0], parts[name].shape[1]
            height = rows if down == -1 else down
            of[name] = lambda i, j, n=name, h=height, w=width: parts[n].values[i // h * w + parts["groups"].values[j]]
    rounding, dtype = term.get("rounding", "none"), term.get("round_dtype", "float32")
    each = (lambda x: rounded(f32(x), dtype)) if rounding == "each" else f32
    last = f32 if rounding == "none" else lambda x: rounded(f32(x), dtype)
    zero = f32(term.get("zero", 0))

    def value(i: int, j: int) -> float:
        q, scale = codes[i][j], of["scales"](i, j)
        if "offsets" in of:
            offset = of["offsets"](i, j)
            return rounded(q * scale + offset, dtype) if rounding == "fused" else last(each(q * scale) + offset)
        return last(each(q - (of["zeros"](i, j) if "zeros" in of else zero)) * scale)

    return [[value(i, j) for j in range(cols)] for i in range(rows)]


def decode_table(term: dict[str, Any], rows: int, cols: int, parts: dict[str, Tensor]) -> Matrix:
    p = term.get("p", 1)
    codes = code_rows(parts, term["bits"], cols // p)
    named = None if "table" in parts else named_table(term["table"])
    scale = spread(parts["scales"], term, rows, cols) if "scales" in parts else None
    offset = spread(parts["offsets"], term, rows, cols) if "offsets" in parts else None
    down, across = term.get("table_block", [-1, -1])
    down, across = rows if down == -1 else down, cols if across == -1 else across

    def value(i: int, j: int) -> float:
        code = codes[i][j // p]
        if named is not None:
            x = named[code][j % p]
        else:
            _, width, entries, _ = parts["table"].shape
            block = i // down * width + j // across
            x = parts["table"].values[(block * entries + code) * p + j % p]
        x = f32(x * scale(i, j)) if scale else x
        x = f32(x + offset(i, j)) if offset else x
        return rounded(x, term.get("round_dtype", "float32")) if term.get("rounding") == "once" else x

    return [[value(i, j) for j in range(cols)] for i in range(rows)]


def decode_trellis(term: dict[str, Any], rows: int, cols: int, parts: dict[str, Tensor]) -> Matrix:
    high, wide = term.get("tile", [16, 16])
    L, V, widths = term["L"], term.get("V", 1), term["bits"]
    steps = high * wide // V
    starts = [0]
    for u in range(steps):
        starts.append(starts[-1] + V * widths[u % len(widths)])
    N = starts[-1]
    states = state_values(term, parts)
    scale = spread(parts["scales"], term, rows, cols) if "scales" in parts else None
    out = [[0.0] * cols for _ in range(rows)]
    for tile in range(rows // high * (cols // wide)):
        string = int.from_bytes(bytes(parts["codes"].values[tile * N // 8 : (tile + 1) * N // 8]), "little")
        string |= string << N  # the windows of the last steps run into the beginning
        top, left = tile // (cols // wide) * high, tile % (cols // wide) * wide
        for u, v in itertools.product(range(steps), range(V)):
            state = string >> starts[u] & (1 << L) - 1
            number = (steps - 1 - u if term.get("reversed") else u) * V + v
            at = {"r": 0, "c": 0}
            for bit, name in enumerate(term["order"].split()):
                at[name[0]] |= (number >> bit & 1) << int(name[1:])
            i, j = top + at["r"], left + at["c"]
            x = states(state)[v]
            out[i][j] = f32(x * scale(i, j)) if scale else x
    return out


MULTIPLIERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}


def state_values(term: dict[str, Any], parts: dict[str, Tensor]) -> Callable[[int], list[float]]:
    """What a state stands for."""
    code, V = term["code"], term.get("V", 1)
    if "table" in parts:
        width = parts["table"].shape[1]
        flat = parts["table"].values
        table = [flat[i : i + width] for i in range(0, len(flat), width)]
    else:
        table = named_table(term["table"]) if term.get("table") else []
    word = 0xFFFFFFFF

    def byte_sum(x: int) -> int:
        return sum(x.to_bytes(4, "little"))

    def halves(x: int) -> float:
        x = x & 0x8FFF8FFF ^ 0x3B603B60
        low, high = struct.unpack("<ee", x.to_bytes(4, "little"))
        return rounded(low + high, "float16")

    def hashed(s: int) -> float:
        i, j = term["index"]
        u = s >> term.get("shift", 0) & (1 << i) - 1
        v = 0
        for tap in term["taps"]:
            v ^= s >> tap
        v &= (1 << j) - 1
        return f32(table[u][0] + table[(1 << i) + v][0]) if term.get("additive") else table[u | v << i][0]

    def hyb(s: int) -> list[float]:
        Q = term["index"][0]
        z = s * (s + 1)
        a, b = table[z >> 15 - Q & (1 << Q) - 1]
        return [-a if z >> 15 & 1 else a, b]

    def lut(s: int) -> list[float]:
        Q = term["index"][0]
        return table[s * (s + 1) >> 16 - Q & (1 << Q) - 1]

    def mad(x: int) -> list[float]:
        return [f32((byte_sum(x & word) - 510) / 147.800537109375)]

    def second(x: int) -> int:
        return x + (x * 1664525 >> 32)

    multiplier = term.get("multiplier", MULTIPLIERS.get(code))
    functions: dict[str, Callable[[int], list[float]]] = {
        "1mad": lambda s: mad(s * 34038481 + 76625530),
        "2mad": lambda s: mad(second(s * 264435761 + 1013904223 & word)),
        "3inst": lambda s: [halves(s * 89226354 + 64248484 & word)],
        "mcg": lambda s: [halves(s * multiplier & word)],
        "mul1": lambda s: [
            rounded((1024 + byte_sum(s * multiplier & word)) * (1774 * 2.0**-18) + -1329 * 2.0**-7, "float16")
        ],
        "hyb": hyb,
        "lut": lut,
        "hash": lambda s: [hashed(s)],
        "table": lambda s: table[s][:V],
    }
    return functions[code]


def decode_additive(term: dict[str, Any], rows: int, cols: int, parts: dict[str, Tensor]) -> Matrix:
    down, across = term.get("group", [1, 8])
    bits, books = term["bits"], term.get("books", 1)
    height, runs, size = parts["codes"].shape
    run = next(n for n in (1, 2, 4, 8) if n * books * bits % 8 == 0)
    codes = [
        code
        for i in range(height * runs)
        for code in fields(parts["codes"].values[i * size : (i + 1) * size], bits, run * books)
    ]
    scale = spread(parts["scales"], term, rows, cols) if "scales" in parts else None

    def value(i: int, j: int) -> float:
        first = (i // down * runs * run + j // across) * books
        at = i % down * across + j % across
        picked = [parts["table"].values[((m << bits) + codes[first + m]) * down * across + at] for m in range(books)]
        total = picked[0]
        for x in picked[1:]:
            total = f32(total + x)
        return f32(total * scale(i, j)) if scale else total

    return [[value(i, j) for j in range(cols)] for i in range(rows)]


def decode_e8p(term: dict[str, Any], rows: int, cols: int, parts: dict[str, Tensor]) -> Matrix:
    bits, codes = term.get("bits", 2), parts["codes"].values
    table = named_table("e8p" if bits == 2 else "e81b")
    of = {"block": [-1, -1], **term}
    scale = spread(parts["scales"], of, rows, cols) if "scales" in parts else None

    def value(i: int, j: int) -> float:
        first, k = (i * cols + j) // 8 * bits, j % 8
        x = table[codes[first + bits - 1]][k]
        if bits == 2:
            odd = codes[first].bit_count() % 2
            turned = codes[first] ^ odd
            x = (-x if turned >> (0, 4, 1, 5, 2, 6, 3, 7)[k] & 1 else x) + (-0.25 if odd else 0.25)
        x = f32(x * scale(i, j)) if scale else x
        return rounded(x, term.get("round_dtype", "float32")) if term.get("rounding") == "once" else x

    return [[value(i, j) for j in range(cols)] for i in range(rows)]


# format -> bits of the exponent and of the fraction, bias
FLOATS: dict[str, tuple[int, int, int]] = {
    "e4m3fn": (4, 3, 7),
    "e5m2": (5, 2, 15),
    "e4m3fnuz": (4, 3, 8),
    "e5m2fnuz": (5, 2, 16),
    "e3m2": (3, 2, 3),
    "e2m3": (2, 3, 1),
    "e2m2": (2, 2, 1),
    "e2m1": (2, 1, 1),
}


def decode_float(term: dict[str, Any], rows: int, cols: int, parts: dict[str, Tensor]) -> Matrix:
    E, m, bias = FLOATS[term["format"]]
    codes = code_rows(parts, 1 + E + m, cols)
    scale = spread(parts["scales"], term, rows, cols) if "scales" in parts else None
    rounding, dtype = term.get("rounding", "none"), term.get("round_dtype", "float32")
    each = (lambda x: rounded(x, dtype)) if rounding == "each" else lambda x: x
    last = (lambda x: x) if rounding == "none" else lambda x: rounded(x, dtype)
    whole = parts["global_scale"].values[0] if "global_scale" in parts else None
    h = None if whole is None else f32(whole / f32(term.get("global_divisor", 1)))

    def number(code: int) -> float:
        exponent, fraction = code >> m & (1 << E) - 1, code & (1 << m) - 1
        value = math.ldexp(fraction + (1 << m), exponent - bias - m) if exponent else math.ldexp(fraction, 1 - bias - m)
        return -value if code >> E + m else value

    def value(i: int, j: int) -> float:
        q = number(codes[i][j])
        if scale is None:
            return last(q)
        s, form = scale(i, j), term.get("global_form", "multiply")
        if h is None:
            return last(f32(q * s))
        if form == "last":
            return last(f32(each(f32(q * s)) * h))
        return last(f32(q * each(f32(s * h if form == "multiply" else s / h))))

    return [[value(i, j) for j in range(cols)] for i in range(rows)]


CODECS = {
    "additive": decode_additive,
    "e8p": decode_e8p,
    "float": decode_float,
    "int": decode_int,
    "table": decode_table,
    "trellis": decode_trellis,
}


def decode_term(term: dict[str, Any], rows: int, cols: int, parts: dict[str, Tensor], prefix: str) -> Matrix:
    """Parts that are packed themselves are decoded first, as the matrix of their last axis."""
    own = {}
    for name in ("codes", "scales", "global_scale", "zeros", "offsets", "groups", "table"):
        if prefix + name in parts:
            own[name] = parts[prefix + name]
        elif isinstance(inner := term.get(name), dict):
            R, C = term.get("view") or (rows, cols)
            down, across = term.get("block", [1, -1])
            grid = [-(-R // (R if down == -1 else down)), -(-C // (C if across == -1 else across))]
            matrix = decode_term(inner, *grid, parts, f"{prefix}{name}_")
            own[name] = Tensor(grid, [x for row in matrix for x in row])
    return CODECS[term["codec"]](term, rows, cols, own)


# ---- rotations
def transposed(m: Matrix) -> Matrix:
    return [list(row) for row in zip(*m, strict=True)]


def hadamard(size: int) -> Matrix:
    odd = size
    while odd % 2 == 0:
        odd //= 2
    signs = [[1]]
    if odd > 1:
        strings = json.loads((TABLES.parent / "hadamard.json").read_text())["matrices"][str(4 * odd)]
        signs = [[-1 if int(row[j // 4], 16) >> (3 - j % 4) & 1 else 1 for j in range(4 * odd)] for row in strings]
    m = size // len(signs)
    sylvester = [[(-1) ** (i & j).bit_count() for j in range(m)] for i in range(m)]
    return [[h * s / math.sqrt(size) for h in a for s in i] for a in signs for i in sylvester]


def undo_side(m: Matrix, side: dict[str, Any], name: str, parts: dict[str, Tensor]) -> Matrix:
    """m · Uᵀ · Pᵀ · diag(scale), for the side of columns."""
    size = side.get("size", 1)
    if "matrix" in side:
        flat = parts[f"{name}_matrix"].values
        U = [flat[i * size : (i + 1) * size] for i in range(size)]
    else:
        U = hadamard(size)
    if size > 1 or "matrix" in side:
        m = [[sum(map(mul, U[j % size], row[j // size * size :])) for j in range(len(row))] for row in m]
    if "perm" in side:
        where = {place: j for j, place in enumerate(parts[f"{name}_perm"].values)}
        m = [[row[where[j]] for j in range(len(row))] for row in m]
    if "scale" in side:
        m = [[x * s for x, s in zip(row, parts[f"{name}_scale"].values, strict=True)] for row in m]
    return m


# ---- a weight
def decode_matrix(entry: dict[str, Any], rows: int, cols: int, parts: dict[str, Tensor]) -> tuple[Matrix, Matrix]:
    """(Ŵ, W): the sum of the terms inside the rotation, and the weight with its padding."""
    terms, dtype = entry["terms"], entry.get("sum_dtype", "float32")
    inside: Matrix | None = None
    outside = []

    def add(a: Matrix, b: Matrix) -> Matrix:
        return [[rounded(f32(x + y), dtype) for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)]

    for i, term in enumerate(terms):
        value = decode_term(term, rows, cols, parts, f"{i}_" if len(terms) > 1 else "")
        if term.get("outside"):
            outside.append(value)
        else:
            inside = value if inside is None else add(inside, value)
    assert inside is not None
    rotation = {key: side for key, side in (entry.get("rotation") or {}).items() if side is not None}
    if not rotation:
        full = inside
        for value in outside:
            full = add(full, value)
        return inside, full
    full = inside
    if "in" in rotation:
        full = undo_side(full, rotation["in"], "in", parts)
    if "out" in rotation:
        full = transposed(undo_side(transposed(full), rotation["out"], "out", parts))
    for value in outside:
        full = [[x + y for x, y in zip(p, q, strict=True)] for p, q in zip(full, value, strict=True)]
    return inside, [[f32(x) for x in row] for row in full]


def decode(entry: dict[str, Any], parts: dict[str, Tensor]) -> tuple[list[float], list[float]]:
    """(Ŵ, W) of a weight, flat in row-major order; W cut to its shape."""
    shape, stack = entry["shape"], entry.get("stack", 0)
    out, *rest = entry.get("stored_shape", shape)[stack:]
    rows, cols = (math.prod(rest), out) if entry.get("transposed") else (out, math.prod(rest))
    stored: list[float] = []
    weight: list[float] = []
    for lead in itertools.product(*map(range, shape[:stack])):
        inside, full = decode_matrix(entry, rows, cols, {name: part.at(lead) for name, part in parts.items()})
        stored += itertools.chain(*inside)
        full = transposed(full) if entry.get("transposed") else full
        height, width = shape[stack], math.prod(shape[stack + 1 :])
        weight += itertools.chain(*(row[:width] for row in full[:height]))
    return stored, weight


def expand(pattern: str) -> list[str]:
    pieces = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    ranges = [range(int(a), int(b) + 1) for a, b in zip(pieces[1::3], pieces[2::3], strict=True)]
    return (
        [
            "".join(map(str, itertools.chain(*zip(pieces[::3], n, strict=False), pieces[-1:])))
            for n in itertools.product(*ranges)
        ]
        if ranges
        else [pattern]
    )


def decode_file(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Weight name -> (Ŵ, W) of a lone file or of a folder."""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    config = path / "config.json"
    manifest = json.loads(config.read_text())["quantization_config"] if config.is_file() else None
    tensors: dict[str, Tensor] = {}
    for file in files:
        metadata, found = read_file(file)
        tensors |= found
        if "quantization_config" in metadata:
            manifest = json.loads(metadata["quantization_config"])
    out = {}
    for entry in (one for one in manifest["entries"] if "terms" in one):
        for number, name in enumerate(itertools.chain(*map(expand, entry["weights"]))):
            parts = {t[len(name) + 1 :]: tensor for t, tensor in tensors.items() if t.startswith(f"{name}_")}
            stored, weight = out[name] = decode(entry, parts)
            size, start = math.prod(entry["shape"][1:]), 0
            for piece in entry.get("concat", ()):
                own = list(itertools.chain(*map(expand, piece["weights"])))[number]
                out[own] = stored, weight[start * size : (start + piece["rows"]) * size]
                start += piece["rows"]
    for entry in (one for one in manifest["entries"] if "pieces" in one):
        pieces = [list(itertools.chain(*map(expand, piece["weights"]))) for piece in entry["pieces"]]
        for name, *stored in zip(itertools.chain(*map(expand, entry["weights"])), *pieces, strict=True):
            # what lies beyond the axis, and is before it: a run of each piece in turn
            runs = math.prod(entry["shape"][: entry.get("axis", 0)])
            values = [out[piece][1] for piece in stored]
            joined = (part[i * len(part) // runs : (i + 1) * len(part) // runs] for i in range(runs) for part in values)
            out[name] = [], list(itertools.chain(*joined))
    return out | {alias: out[name] for alias, name in manifest.get("aliases", {}).items()}


if __name__ == "__main__":
    for name, (_, weight) in decode_file(Path(sys.argv[1])).items():
        print(name, weight)
