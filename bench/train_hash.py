"""Train the table of a ``hash`` trellis on Gaussian samples: encode, average the samples of each entry, round, repeat.

    python bench/train_hash.py --bits 2 --L 14 --index 3 2 --shift 7 --taps 0 3 5 12 --reach 63

The start is the quantiles of the Gaussian, ascending in the entry's number; ``--turn`` numbers the entries by
``u | (v ^ u) << bits of u`` instead. A sample divided by ``unit`` is what the trellis is searched with: tables are
small integers. Prints one JSON object: the table as stored, its unit, and the mean squared error on fresh samples.
"""

from __future__ import annotations

import argparse
import json
import sys
from statistics import NormalDist

import numpy as np

from qformat.codecs import trellis
from qformat.dtypes import Array
from qformat.kernels.cpu.trellis import search_error

TILE = 256


def params_of(options: argparse.Namespace) -> trellis.Params:
    return trellis.Params(
        L=options.L,
        bits=(options.bits,),
        code="hash",
        order=trellis.ORDERS[1],
        shift=options.shift,
        taps=tuple(options.taps),
        index=tuple(options.index),
        table="int8",
    )


def start(index: tuple[int, int], turn: bool) -> Array:
    """float64 [entries]: quantiles of the unit Gaussian in the order of the entries' numbers."""
    count = 2 ** sum(index)
    quantile = np.array([NormalDist().inv_cdf((k + 0.5) / count) for k in range(count)])
    number = np.arange(count)
    if turn:
        u, v = number & (2 ** index[0] - 1), number >> index[0]
        number = u | (v ^ u & (2 ** index[1] - 1)) << index[0]
    return quantile[number]


def rounded(means: Array, reach: int) -> tuple[Array, float]:
    """int8 table and the unit that it counts in."""
    unit = float(np.abs(means).max()) / reach
    return np.rint(means / unit).astype(np.int8)[:, None], unit


def encode(params: trellis.Params, table: Array, unit: float, samples: Array) -> tuple[Array, float]:
    """States [tiles, steps] and the mean squared error of the samples."""
    values = trellis.values(params, {"table": table})
    targets = (samples / np.float32(unit)).reshape(-1, TILE, 1)
    codes, error = search_error(params, targets, values)
    return trellis.unpack(params, codes), float(error.sum()) * unit**2 / samples.size


def train(params: trellis.Params, options: argparse.Namespace) -> tuple[Array, float]:
    entries = 2 ** sum(params.index)
    number = trellis.values(params, {"table": np.arange(entries, dtype=np.int16)[:, None]})[:, 0].astype(np.int64)
    samples = gaussian(options.train, options.seed)
    means = start((params.index[0], params.index[1]), options.turn)
    for turn in range(options.rounds):
        table, unit = rounded(means, options.reach)
        states, error = encode(params, table, unit, samples)
        print(f"round {turn}: {error:.5f}", file=sys.stderr)
        entry = number[states].ravel()
        count = np.bincount(entry, minlength=entries)
        means = np.where(count > 0, np.bincount(entry, samples, entries) / np.maximum(count, 1), means)
    return rounded(means, options.reach)


def gaussian(log2: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(2**log2, dtype=np.float32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--L", type=int, required=True)
    parser.add_argument("--index", type=int, nargs=2, required=True, metavar=("U", "V"))
    parser.add_argument("--shift", type=int, required=True)
    parser.add_argument("--taps", type=int, nargs="+", required=True)
    parser.add_argument("--reach", type=int, default=127, help="largest magnitude of an entry")
    parser.add_argument("--turn", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--train", type=int, default=18, help="log2 of the samples trained on")
    parser.add_argument("--test", type=int, default=20, help="log2 of the fresh samples")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    params = params_of(options)
    table, unit = train(params, options)
    _, error = encode(params, table, unit, gaussian(options.test, options.seed + 1000))
    row = {key: getattr(options, key) for key in ("bits", "L", "index", "shift", "taps", "turn", "seed")}
    print(json.dumps({**row, "mse": round(error, 6), "unit": round(unit, 6), "table": table[:, 0].tolist()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
