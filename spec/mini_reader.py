"""A reader of qformat 0.1 in one file: whole models whose weights are dense, or packed with `int` and `trellis`.

    python mini_reader.py MODEL                       a line for every weight: shape, mean, root mean square
    python mini_reader.py INPUT OUTPUT.safetensors    the packed weights as float32, as vectors/README.md wants it

It is written from README.md, codecs/int.md and codecs/trellis.md alone, in their order, and names their rules (F1, M5,
trellis-4): the check that they say enough. It is meant to be read. It trusts its files: what a reader has to refuse is
in the rules, and of all that only a version, codec, dtype, table or rotation that it does not know ends it, with one
line. It needs numpy, and beside it `hadamard.json` and the folder `tables`.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).parent
Size = tuple[int, int]  # rows and columns of a matrix
Record = dict[str, Any]  # an object of the manifest
Numbers = Callable[[str], np.ndarray]  # from the name of a part to its numbers
Tensors = dict[str, "Tensor"]
Weights = Iterator[tuple[str, np.ndarray]]


class Unsupported(Exception):
    """Valid, perhaps, but not for this reader."""


# ---- Files

NUMPY = {  # dtype in the header: what holds it, or its bits where numpy lacks it
    "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8",
    "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2", "F8_E4M3": "u1", "F8_E8M0": "u1", "BOOL": "?",
}  # fmt: skip


class Tensor(NamedTuple):
    """A tensor as it lies in a file."""

    dtype: str
    shape: list[int]
    data: np.ndarray

    def numbers(self, place: tuple[int, ...] = ()) -> np.ndarray:
        """Its numbers, or those at a place in its first axes; widened to float32 where numpy lacks the dtype."""
        if self.dtype not in NUMPY:
            raise Unsupported(f"a tensor of dtype {self.dtype}")
        bits = self.data.view(NUMPY[self.dtype]).reshape(self.shape)[place]
        if self.dtype == "BF16":
            return (bits.astype(np.uint32) << 16).view(np.float32)
        if self.dtype == "F8_E8M0":
            return np.ldexp(1.0, bits.astype(np.int32) - 127).astype(np.float32)
        if self.dtype == "F8_E4M3":
            exponent, fraction = bits.astype(np.int32) >> 3 & 15, bits & 7
            size = np.ldexp(np.where(exponent > 0, 8.0 + fraction, fraction), np.maximum(exponent, 1) - 10)
            return np.where(bits < 128, size, -size).astype(np.float32)
        return bits


def read_file(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a safetensors file, and its metadata."""
    content = np.asarray(np.memmap(path, np.uint8, "r"))
    end = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header, data = json.loads(content[8:end].tobytes()), content[end:]
    metadata = header.pop("__metadata__", {})
    records = header.items()
    return {name: Tensor(r["dtype"], r["shape"], data[slice(*r["data_offsets"])]) for name, r in records}, metadata


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder (F1)."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        return [folder / name for name in sorted({*json.loads(index.read_text())["weight_map"].values()})]
    if single.exists():
        return [single]
    return [path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated")]


def read_model(path: Path) -> tuple[Tensors, Record]:
    """All tensors of a folder or a lone file, and the manifest: from config.json or from a file (F2)."""
    tensors, manifest = {}, {}
    if (path / "config.json").exists():
        manifest = json.loads((path / "config.json").read_text()).get("quantization_config", {})
    for file in weight_files(path) if path.is_dir() else [path]:
        found, metadata = read_file(file)
        tensors |= found
        manifest = manifest or json.loads(metadata.get("quantization_config", "{}"))
    if manifest.get("version") != "0.1":
        raise Unsupported(f"a manifest of version {manifest.get('version')}")
    return tensors, manifest


# ---- Manifest: what a key is where it is absent

ENTRY = {
    "terms": [], "stack": 0, "stored_shape": None, "transposed": False, "concat": [], "axis": 0, "pieces": [],
    "sum_dtype": "float32", "rotation": None,
}  # fmt: skip
SIDE = {"size": 1, "scale": None, "perm": None, "matrix": None}
INT = {
    "block": [1, -1], "view": None, "scales": "float16", "zero": 0, "zeros": None, "offsets": None, "groups": None,
    "rounding": "none", "round_dtype": "float32",
}  # fmt: skip
TRELLIS = {
    "V": 1, "tile": [16, 16], "reversed": False, "multiplier": None, "shift": 0, "taps": [], "index": [],
    "additive": False, "table": None, "block": [1, -1], "view": None, "scales": None,
}  # fmt: skip
RANGE = r"\{(\d+)\.\.(\d+)\}"


def names_of(patterns: list[str]) -> list[str]:
    """The names that patterns stand for, in order, the last range running fastest (M5)."""
    names = []
    for pattern in patterns:
        template = re.sub(RANGE, "{}", pattern)
        ranges = [range(int(first), int(last) + 1) for first, last in re.findall(RANGE, pattern)]
        names += [template.format(*numbers) for numbers in itertools.product(*ranges)]
    return names


# ---- What codecs share


def bit_fields(codes: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The codes of every row of bytes, the first bit of each the lowest (C1)."""
    string = np.unpackbits(codes, axis=-1, bitorder="little")[:, : count * bits]
    return sum(string[:, k::bits].astype(np.uint16) << k for k in range(bits))


def blocks(term: Record, size: Size) -> tuple[Size, Size]:
    """Rows and columns of a block, and how many blocks there are down and across (C2, C3)."""
    whole = term["view"] or size
    rows, cols = (n if each == -1 else min(each, n) for each, n in zip(term["block"], whole, strict=True))
    return (rows, cols), (-(-whole[0] // rows), -(-whole[1] // cols))


def spread(values: np.ndarray, term: Record, size: Size) -> np.ndarray:
    """For every element the value of its block."""
    (rows, cols), whole = blocks(term, size)[0], term["view"] or size
    return values.repeat(rows, axis=0)[: whole[0]].repeat(cols, axis=1)[:, : whole[1]].reshape(size)


# ---- Values


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values rounded to a dtype once, ties to even, and widened to float32 again."""
    digits, lowest, end = {"float16": (11, -24, 16), "bfloat16": (8, -133, 128), "float32": (24, -149, 128)}[dtype]
    exact = values.astype(np.float64)
    last = np.maximum(np.frexp(exact)[1] - digits, lowest)  # the exponent of the last digit that the dtype has
    exact = np.ldexp(np.rint(np.ldexp(exact, -last)), last)
    return np.where(np.abs(exact) < 2.0**end, exact, np.copysign(np.inf, exact)).astype(np.float32)


def term_values(record: Record, prefix: str, size: Size, stored: Numbers) -> np.ndarray:
    """float32 values of a term for a matrix; the names of its parts begin with a prefix (P1, V1)."""
    if record["codec"] not in CODECS:
        raise Unsupported(f"the codec {record['codec']}")
    defaults, values = CODECS[record["codec"]]
    term = defaults | record

    def part(name: str) -> np.ndarray:
        """What is stored, or the values of what is packed itself (V4)."""
        if isinstance(term.get(name), dict):
            return term_values(term[name], f"{prefix}{name}_", blocks(term, size)[1], stored)
        return stored(prefix + name)

    return values(term, size, part)


def matrix_values(entry: Record, size: Size, stored: Numbers) -> np.ndarray:
    """W of one matrix, its padding with it: the sum of its terms, within the rotation and outside (V2, V3)."""
    inside, outside = [], []
    for i, term in enumerate(entry["terms"]):
        values = term_values(term, f"{i}_" if len(entry["terms"]) > 1 else "", size, stored)
        (outside if term.get("outside") else inside).append(values)
    sides = {name: SIDE | side for name, side in (entry["rotation"] or {}).items() if side is not None}
    matrix, *others = inside if sides else inside + outside
    for values in others:
        matrix = rounded(matrix + values, entry["sum_dtype"])
    if not sides:
        return matrix
    matrix = matrix.astype(np.float64)
    if "out" in sides:
        matrix = turned(matrix, sides["out"], lambda part: stored(f"out_{part}"))
    if "in" in sides:
        matrix = turned(matrix.T, sides["in"], lambda part: stored(f"in_{part}")).T
    return sum(outside, start=matrix).astype(np.float32)


def weight_values(tensors: Tensors, weight: str, entry: Record, read: set[str]) -> np.ndarray:
    """A weight of an entry with terms: each matrix of its stack decoded, transposed, cut (V5 to V8, M7, M8)."""
    shape, stack = entry["shape"], entry["stack"]
    rows, *cols = (entry["stored_shape"] or shape)[stack:]
    size = (math.prod(cols), rows) if entry["transposed"] else (rows, math.prod(cols))
    result = np.empty(shape, np.float32)
    for place in np.ndindex(*shape[:stack]):

        def stored(part: str, place: tuple[int, ...] = place) -> np.ndarray:
            read.add(f"{weight}_{part}")
            return tensors[f"{weight}_{part}"].numbers(place)

        matrix = matrix_values(entry, size, stored)
        matrix = matrix.T if entry["transposed"] else matrix
        result[place] = matrix[: shape[stack], : math.prod(shape[stack + 1 :])].reshape(shape[stack:])
    return result


# ---- Rotation


def hadamard(size: int) -> np.ndarray:
    """H_K for blocks of a size (R2, R8)."""
    odd = size // (size & -size)
    if odd == 1:
        return np.ones((1, 1))
    known, order = json.loads((HERE / "hadamard.json").read_text())["matrices"], 4 * odd
    if size % order or str(order) not in known:
        raise Unsupported(f"a rotation of size {size}")
    return np.array([[1.0 - 2 * int(bit) for bit in f"{int(row, 16):0{order}b}"] for row in known[str(order)]])


def turned(matrix: np.ndarray, side: Record, stored: Numbers) -> np.ndarray:
    """diag(scale) · P · U · matrix in float64: what a side does to rows, or to columns that were made rows (R1)."""
    (length, width), size = matrix.shape, side["size"]
    if side["matrix"]:
        matrix = stored("matrix").astype(np.float64) @ matrix.reshape(-1, size, width)  # R5
    elif size > 1:
        h = hadamard(size)
        half = size // len(h)
        matrix = h @ matrix.reshape(-1, len(h), half * width)
        while half > 1:  # S of 2n rows is S of n rows four times, the last negative
            half //= 2
            pairs = matrix.reshape(-1, 2, half * width)
            matrix = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        matrix = matrix / math.sqrt(size)
    matrix = matrix.reshape(length, width)
    if side["perm"]:
        matrix = matrix[np.argsort(stored("perm"))]  # R3: row j goes to perm[j]
    return matrix * stored("scale").astype(np.float64)[:, None] if side["scale"] else matrix  # R4


# ---- int


def int_values(term: Record, size: Size, part: Numbers) -> np.ndarray:
    """float32 values of a matrix (int-1 to int-7)."""

    def of_each(name: str) -> np.ndarray:
        """The scale, zero or offset of every element; with groups, columns name theirs (int-6)."""
        values = part(name).astype(np.float32)
        if term["groups"]:
            return values.repeat(blocks(term, size)[0][0], axis=0)[: size[0], part("groups")]
        return spread(values, term, size)

    def r(values: np.ndarray, *when: str) -> np.ndarray:
        return rounded(values, term["round_dtype"]) if term["rounding"] in when else values

    q = bit_fields(part("codes"), term["bits"], size[1]).astype(np.float32)
    if term["offsets"]:
        q = q.astype(np.float64) if term["rounding"] == "fused" else q  # makes product and sum float64
        return r(r(q * of_each("scales"), "each") + of_each("offsets"), "once", "each", "fused")
    zero = of_each("zeros") if term["zeros"] else np.float32(term["zero"])
    return r(r(q - zero, "each") * of_each("scales"), "once", "each", "fused")


# ---- trellis


def states(term: Record, codes: np.ndarray) -> np.ndarray:
    """The state of every step of every tile: L bits of a cyclic string, the first the lowest (trellis-1 to -3)."""
    widths = term["V"] * np.resize(term["bits"], math.prod(term["tile"]) // term["V"])
    begins, count = np.cumsum(widths) - widths, widths.sum()
    string = np.unpackbits(codes, axis=-1, bitorder="little")
    return sum(string[..., (begins + i) % count].astype(np.int32) << i for i in range(term["L"]))


def places(term: Record) -> np.ndarray:
    """Where in a tile, row by row, the values of its steps lie: [steps, V] (trellis-4, -5)."""
    element = np.arange(math.prod(term["tile"]))
    unit = {"r": term["tile"][1], "c": 1}
    bits = enumerate(term["order"].split(" "))
    place = sum((element >> k & 1) * unit[bit[0]] << int(bit[1:]) for k, bit in bits).reshape(-1, term["V"])
    return place[::-1] if term["reversed"] else place


def calculated(code: str, s: np.ndarray, multiplier: int | None) -> np.ndarray:
    """What states stand for without a table (trellis-6 to -9, -16); the lower 32 bits of x count."""
    if code == "1mad":
        x = s * 34038481 + 76625530
    elif code == "2mad":
        y = s * 264435761 + 1013904223 & 0xFFFFFFFF
        x = y + (y * 1664525 >> 32)
    elif code == "3inst":
        x = s * 89226354 + 64248484
    else:
        x = s * ({"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}[code] if multiplier is None else multiplier)
    byte_sum = sum(x >> shift & 255 for shift in (0, 8, 16, 24))
    if code in ("1mad", "2mad"):
        return (byte_sum - 510).astype(np.float32) / np.float32(147.800537109375)
    if code == "mul1":
        return rounded((1024 + byte_sum) * 1774 / 2**18 - 1329 / 2**7, "float16")
    y = (x & 0x8FFF8FFF) ^ 0x3B603B60
    lower, upper = (half.astype(np.uint16).view(np.float16).astype(np.float64) for half in (y & 0xFFFF, y >> 16))
    return rounded(lower + upper, "float16")


def looked_up(term: Record, s: np.ndarray, table: np.ndarray) -> np.ndarray:
    """What states stand for with a table (trellis-10, -11, -12, -15)."""
    z, masks = s * (s + 1), [2**bits - 1 for bits in term["index"]]
    if term["code"] == "hyb":
        pairs = table[z >> 15 - term["index"][0] & masks[0]]
        return np.where(np.stack([z >> 15 & 1, 0 * z], axis=1), -pairs, pairs)
    if term["code"] == "lut":
        return table[z >> 16 - term["index"][0] & masks[0]]
    if term["code"] == "hash":
        x = s >> term["shift"] & masks[0]
        y = np.bitwise_xor.reduce([s >> tap for tap in term["taps"]]) & masks[1]
        second = masks[0] + 1
        return table[x] + table[second + y] if term["additive"] else table[x + y * second]
    return table


def named_table(name: str) -> np.ndarray:
    """A table of the specification (table-2, table-7)."""
    if not (path := HERE / "tables" / f"{name}.json").exists():
        raise Unsupported(f"the table {name}")
    return np.array(json.loads(path.read_text())["entries"], np.float32)


def trellis_values(term: Record, size: Size, part: Numbers) -> np.ndarray:
    """float32 values of a matrix: those of all states, picked by the steps, placed in their tiles, scaled."""
    s = np.arange(2 ** term["L"], dtype=np.int64)
    if term["table"] is None:
        values = calculated(term["code"], s, term["multiplier"])
    elif term["table"] in ("float16", "bfloat16", "float32", "int8"):
        values = looked_up(term, s, part("table").astype(np.float32))
    else:
        values = looked_up(term, s, named_table(term["table"]))
    steps = values.reshape(-1, term["V"])[states(term, part("codes"))]
    (down, across), (high, wide) = steps.shape[:2], term["tile"]
    tiles = np.empty((down, across, high * wide), np.float32)
    tiles[..., places(term)] = steps
    matrix = tiles.reshape(down, across, high, wide).swapaxes(1, 2).reshape(size)
    return matrix * spread(part("scales").astype(np.float32), term, size) if term["scales"] else matrix


CODECS = {"int": (INT, int_values), "trellis": (TRELLIS, trellis_values)}

# ---- Whole models


def packed_weights(tensors: Tensors, manifest: Record, read: set[str]) -> Weights:
    """Every packed weight as float32, its aliases (M6) and what lies in it (M9); `read` gains the names of parts."""
    entries = [ENTRY | entry for entry in manifest["entries"]]
    packed = {name: entry for entry in entries if entry["terms"] for name in names_of(entry["weights"])}
    aliases = manifest.get("aliases", {}).items()
    for entry in entries:
        related = [names_of(piece["weights"]) for piece in entry["concat"] + entry["pieces"]]
        for i, weight in enumerate(names_of(entry["weights"])):
            others = [names[i] for names in related]
            sources = others if entry["pieces"] else [weight]  # M10
            values = np.concatenate([weight_values(tensors, one, packed[one], read) for one in sources], entry["axis"])
            yield weight, values
            yield from ((alias, values) for alias, name in aliases if name == weight)
            ends = np.cumsum([piece["rows"] for piece in entry["concat"]], dtype=int)[:-1]
            yield from zip(others, np.split(values, ends), strict=True) if entry["concat"] else ()


def weights(folder: str | Path) -> Weights:
    """Every weight of a model: packed ones as float32, then those that are dense as they are (bfloat16 as float32)."""
    tensors, manifest = read_model(Path(folder))
    read: set[str] = set()
    yield from packed_weights(tensors, manifest, read)
    yield from ((name, tensor.numbers()) for name, tensor in tensors.items() if name not in read)


# ---- Command line


def write_file(path: str, values: dict[str, np.ndarray]) -> None:
    """A safetensors file of float32 tensors."""
    header, end = {}, 0
    for name, array in values.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    Path(path).write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *(a.tobytes() for a in values.values())]))


def main(arguments: list[str]) -> int:
    """0, or 4 for what is unsupported."""
    if len(arguments) not in (1, 2):
        print(__doc__)
        return 2
    try:
        if len(arguments) == 2:
            write_file(arguments[1], dict(packed_weights(*read_model(Path(arguments[0])), read=set())))
            return 0
        for name, values in weights(arguments[0]):
            mean, square = values.mean(dtype=np.float64), np.square(values, dtype=np.float64).mean()
            print(f"{name:64} {values.shape!s:24} {mean:12.5g} {math.sqrt(square):12.5g}")
    except Unsupported as what:
        print(f"error: {arguments[0]}: not supported: {what}", file=sys.stderr)
        return 4
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
