"""Make the `gauss-*` tables of spec/tables: optimal quantizers of the unit Gaussian.

    python bench/make_tables.py [DIR]

p = 1: Lloyd-Max with closed-form cell means, from the normal quantiles at (k + 1/2) / n, until the levels stand still:
the unique optimum. p = 4: Lloyd on 2^19 samples (numpy's PCG64, seed 1) from the first n samples, 60 rounds, then
sorted by squared norm and first value. Both are stored as float32; the files are the definition, this script is where
they came from.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np

NORMAL = NormalDist()


def lloyd_max(n: int) -> np.ndarray:
    levels = np.array([NORMAL.inv_cdf((k + 0.5) / n) for k in range(n)])
    for _ in range(200_000):
        edges = [-math.inf, *((levels[1:] + levels[:-1]) / 2), math.inf]
        density = np.array([0.0 if math.isinf(e) else NORMAL.pdf(e) for e in edges])
        below = np.array([NORMAL.cdf(e) for e in edges])
        moved = (density[:-1] - density[1:]) / (below[1:] - below[:-1])
        moved = (moved - moved[::-1]) / 2
        if np.abs(moved - levels).max() < 1e-13:
            break
        levels = moved
    return levels[:, None]


def lloyd(p: int, n: int, samples: int = 1 << 19, rounds: int = 60) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((samples, p)).astype(np.float32)
    points = x[:n].copy()
    for _ in range(rounds):
        near = np.concatenate(
            [np.argmax(2 * part @ points.T - (points**2).sum(1), axis=1) for part in np.array_split(x, 64)]
        )
        counts = np.bincount(near, minlength=n)
        sums = np.stack([np.bincount(near, weights=x[:, i], minlength=n) for i in range(p)], axis=1)
        points = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], points).astype(np.float32)
    return points[np.lexsort((points[:, 0], (points**2).sum(1).round(6)))]


def dump(folder: Path, name: str, what: str, entries: np.ndarray) -> None:
    rows = ",\n  ".join(json.dumps([float(v) for v in row]) for row in entries.astype(np.float32))
    about = f'{{"what": {json.dumps(what)},\n "source": "bench/make_tables.py",\n "dtype": "float32",\n'
    (folder / f"{name}.json").write_text(f'{about} "entries": [\n  {rows}]}}\n')


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "spec" / "tables"
    for bits in range(1, 9):
        n = 1 << bits
        dump(folder, f"gauss-p1-n{n}", f"optimal scalar quantizer of the unit Gaussian, {n} levels", lloyd_max(n))
    dump(
        folder, "gauss-p4-n256", "optimal quantizer of the unit Gaussian, 4 values an entry, 256 entries", lloyd(4, 256)
    )


if __name__ == "__main__":
    main()
