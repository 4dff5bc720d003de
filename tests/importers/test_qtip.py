"""QTIP files of random bits decode as a second decoder, written from the description of the format, decodes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foreign
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qformat import checkpoint, tables
from qformat.converters.convert import convert
from qformat.converters.importers import find, qtip
from qformat.dtypes import Array
from qformat.errors import DamagedError, UnsupportedError

MODULE = "model.layers.1.mlp.up_proj"
MODES = ("1mad", "2mad", "3inst", "quantlut", "quantlut_sym", "lut")


def params(**changes: Any) -> dict[str, Any]:
    own = {
        "codebook": "bitshift",
        "codebook_version": 0,
        "L": 16,
        "K": 2,
        "V": 1,
        "tlut_bits": 0,
        "decode_mode": "1mad",
    }
    return {**own, "td_x": 16, "td_y": 16, "split_for_tp": False, "skip_list": None, **changes}


def layer(settings: dict[str, Any], rows: int, cols: int, rcp: int = 0, seed: int = 0) -> dict[str, Array]:
    """The tensors of one layer of random bits."""
    rng = np.random.default_rng(seed)
    tile, bits = settings["td_x"] * settings["td_y"], settings["K"]
    words = rng.integers(0, 1 << 16, (rows * cols // tile, tile * bits // 16)).astype(np.uint16)
    parts: dict[str, Array] = {
        "trellis": words.view(np.int16),
        "SU": rng.standard_normal(cols).astype(np.float16),
        "SV": rng.standard_normal(rows).astype(np.float32),
        "rcp": np.array(rcp, np.int64),
        "tp_rank": np.array(8, np.int64),
    }
    if "lut" in settings["decode_mode"]:
        parts["tlut"] = rng.standard_normal((2 ** settings["tlut_bits"], settings["V"])).astype(np.float16)
    return {f"{MODULE}.{part}": array for part, array in parts.items()}


def value(state: int, settings: dict[str, Any], tlut: Array | None) -> list[float]:
    """What a state stands for, with Python's integers."""
    mode, Q, word = settings["decode_mode"], settings["tlut_bits"], (1 << 32) - 1
    z = state * (state + 1)
    if tlut is not None:
        at = state if mode == "lut" else z >> (16 - Q - (mode == "quantlut_sym")) & ((1 << Q) - 1)
        pair = [float(x) for x in tlut[at]]
        return [-pair[0], *pair[1:]] if mode == "quantlut_sym" and z >> 15 & 1 else pair
    if mode == "3inst":
        x = (state * 89226354 + 64248484 & word) & 0x8FFF8FFF ^ 0x3B603B60
        low, high = np.array([x & 0xFFFF, x >> 16], np.uint16).view(np.float16)
        return [float(low + high)]
    x = state * 34038481 + 76625530 & word
    if mode == "2mad":
        x = state * 264435761 + 1013904223 & word
        x = x + (x * 1664525 >> 32) & word
    return [float(np.float32(sum(x.to_bytes(4, "little")) - 510) / np.float32(147.800537109375))]


def streams(tensors: dict[str, Array], settings: dict[str, Any], rows: int, cols: int, kernel: bool) -> Array:
    """The bits of every tile from the first on: [row tiles, column tiles, bits]."""
    words = tensors[f"{MODULE}.trellis"].view(np.uint16)
    high, wide, bits = settings["td_x"], settings["td_y"], settings["K"]
    if not kernel:
        flat = [[word >> (15 - i) & 1 for word in tile for i in range(16)] for tile in words.tolist()]
        return np.array(flat).reshape(rows // high, cols // wide, -1)
    data, out = words.tobytes(), np.zeros((rows // 16, cols // 16, 256 * bits), np.int64)
    for R in range(rows // 32):
        for C in range(cols // 32):
            for lane in range(32):
                for a in (0, 1):
                    for b in (0, 1):
                        at = ((((R * (cols // 32) + C) * 32 + lane) * 2 + a) * 2 + b) * bits
                        v = int.from_bytes(data[at : at + bits], "little")
                        run = [v >> (8 * bits - 1 - i) & 1 for i in range(8 * bits)]
                        out[2 * R + b, 2 * C + a, 8 * bits * lane : 8 * bits * (lane + 1)] = run
    return out


def stored(tensors: dict[str, Array], settings: dict[str, Any], rows: int, cols: int, kernel: bool) -> Array:
    """The matrix between the rotations, element by element."""
    strings, tlut = streams(tensors, settings, rows, cols, kernel), tensors.get(f"{MODULE}.tlut")
    high, wide, V, step = settings["td_x"], settings["td_y"], settings["V"], settings["K"] * settings["V"]
    out = np.empty((rows, cols), np.float32)
    for i, j in np.ndindex(strings.shape[:2]):
        string = strings[i, j].tolist()
        for t in range(high * wide // V):
            window = [string[(t * step + k) % len(string)] for k in range(16)]
            for v, x in enumerate(value(int("".join(map(str, window)), 2), settings, tlut)):
                row, col = divmod(t * V + v, wide)
                if kernel:
                    lane, q = divmod(t * V + v, 8)
                    row, col = 8 * (q >> 1 & 1) + (lane >> 2), 8 * (q >> 2 & 1) + 2 * (lane & 3) + (q & 1)
                out[i * high + row, j * wide + col] = x
    return out


def hadamard(size: int, blocks: int = 1) -> Array:
    """``blocks`` times H_K kron Sylvester on the diagonal."""
    one = size // blocks
    order = next((k for k in (28, 20, 12) if one % k == 0), 1)
    matrix = tables.hadamard(order).astype(np.float64)
    while len(matrix) < one:
        matrix = np.kron(matrix, [[1, 1], [1, -1]])
    return np.kron(np.eye(blocks), matrix / np.sqrt(one))


def write(folder: Path, tensors: dict[str, Array], settings: Any, **config: Any) -> Path:
    return foreign.write(folder, tensors, {"quip_params": settings, "model_type": "llama", **config})


@settings(max_examples=10)
@given(st.data())
def test_every_variant(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(MODES))
    V = 2 if mode == "quantlut_sym" else data.draw(st.sampled_from((1, 2))) if "lut" in mode else 1
    Q = 16 if mode == "lut" else data.draw(st.sampled_from((9, 4))) if "lut" in mode else 0
    K = data.draw(st.integers(1, 5))
    high, wide = data.draw(st.sampled_from(((16, 16), (8, 16), (16, 4))))
    rows, cols = data.draw(st.sampled_from(((32, 64), (96, 32), (32, 160))))
    own = params(decode_mode=mode, V=V, K=K, tlut_bits=Q, td_x=high, td_y=wide)
    kernel = (mode, K in (2, 3, 4), V, Q, high, wide) == ("quantlut_sym", True, 2, 9, 16, 16)
    rcp = data.draw(st.integers(0, 2))
    if (cols if rcp == 1 else rows) // 8 in (12, 20):
        rcp = 0
    tensors = layer(own, rows, cols, rcp, data.draw(st.integers(0, 1 << 32)))
    (item,) = foreign.plan_of(write(tmp_path_factory.mktemp("qtip"), tensors, own)).items
    weight, matrix = item.packed(), stored(tensors, own, rows, cols, kernel)
    assert np.array_equal(weight.decode(rotated=True), matrix)
    SU, SV = (tensors[f"{MODULE}.{name}"].astype(np.float64) for name in ("SU", "SV"))
    left, right = hadamard(rows, 8 if rcp == 2 else 1), hadamard(cols, 8 if rcp == 1 else 1)
    assert foreign.difference(weight.decode(), SV[:, None] * (left @ matrix @ right.T) * SU) < 1e-6
    assert (item.entry.label, item.entry.dtype) == ("bit-exact", "float16")


def test_a_v_proj_of_its_own_and_what_is_skipped(tmp_path: Path) -> None:
    """Bits of v_proj by K_v_proj, or by the size of its codes; a skipped layer is dense."""
    own = params(K_v_proj=4, skip_list=["0_down", "1_up"])
    tensors = layer(own, 32, 32)
    v = {name.replace("mlp.up_proj", "self_attn.v_proj"): a for name, a in layer({**own, "K": 4}, 32, 32).items()}
    dense = {"model.layers.0.mlp.down_proj.weight": np.ones((32, 32), ml_dtypes.bfloat16)}
    bias = {f"{MODULE}.bias": np.ones(32, np.float32)}
    folder = write(tmp_path / "source", tensors | v | dense | bias, own)
    report = convert(folder, tmp_path / "packed")
    assert report["from"] == "qtip" and report["coverage"]["passed"] == 2
    assert any("packed though skip_list excludes them: 1 layer (model.layers.1" in note for note in report["notes"])
    packed = checkpoint.open(tmp_path / "packed")
    assert {name: weight.entry.terms[0]["bits"] for name, weight in packed.items()} == {
        f"{MODULE}.weight": [2],
        "model.layers.1.self_attn.v_proj.weight": [4],
    }
    assert "quip_params" not in packed.config
    assert packed.manifest is not None and packed.manifest.provenance["settings"]["K_v_proj"] == 4
    assert len(foreign.plan_of(write(tmp_path / "unsaid", v, params())).items) == 1
    with pytest.raises(DamagedError, match="v_proj.trellis: expected .*3 bits"):
        foreign.plan_of(write(tmp_path / "other", v, params(K_v_proj=3)))


def test_a_bfloat16_base(tmp_path: Path) -> None:
    tensors = layer(params(), 32, 32)
    tensors[f"{MODULE}.SU"] = tensors[f"{MODULE}.SU"].astype(ml_dtypes.bfloat16)
    (item,) = foreign.plan_of(write(tmp_path, tensors, params())).items
    assert item.entry.dtype == "bfloat16"
    assert item.entry.rotation is not None and item.entry.rotation.in_ is not None
    assert item.entry.rotation.in_.scale == "bfloat16"


def test_quip_is_not_taken_for_it(tmp_path: Path) -> None:
    tensors = layer(params(), 32, 32)
    assert find(checkpoint.open(write(tmp_path / "qtip", tensors, params())))[0].NAME == "qtip"
    assert not qtip.detect(checkpoint.open(write(tmp_path / "quip", tensors, {"codesz": 8, "codebook": "E8P12"})))


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"decode_mode": "4mad"}, UnsupportedError, "decode_mode"),
        ({"L": 12}, UnsupportedError, "L 16, found 12"),
        ({"codebook": "other"}, UnsupportedError, "codebook"),
        ({"codebook_version": 1}, UnsupportedError, "codebook_version"),
        ({"K": 9}, DamagedError, "K from 1 to 8"),
        ({"K": "2"}, DamagedError, "K from 1 to 8, found '2'"),
        ({"V": 4}, UnsupportedError, "V 1 or 2, found 4"),
        ({"td_x": None}, DamagedError, "td_x"),
        ({"K": 3}, DamagedError, "up_proj.trellis: expected .*3 bits"),
        ({"td_x": 64}, DamagedError, "whole tiles of 64 x 16"),
        ({"skip_list": "0_up"}, DamagedError, "skip_list as a list"),
        ({"V": 2}, DamagedError, "V = 1 for code 1mad"),
        ({"decode_mode": "quantlut", "tlut_bits": 9}, DamagedError, "up_proj.tlut: expected"),
        ({"decode_mode": "quantlut", "tlut_bits": 13}, DamagedError, "tlut_bits from 1 to 12"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, change: dict[str, Any], kind: type, words: str) -> None:
    with pytest.raises(kind, match=words):
        foreign.decoded(foreign.plan_of(write(tmp_path, layer(params(), 32, 32), params(**change))))


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("trellis", lambda array: array * 0, "0 throughout"),
        ("trellis", lambda array: array[:-1], "2 bits for 32 x 64"),
        ("trellis", lambda array: array.astype(np.int32), "int32"),
        ("SU", lambda array: array[:-1], "whole tiles"),
        ("SU", lambda array: array * np.float16("inf"), "finite"),
        ("SV", lambda array: array * np.float32("nan"), "finite"),
        ("SV", lambda _: None, "no such tensor"),
        ("rcp", lambda _: None, "no such tensor"),
        ("rcp", lambda _: np.array(3), "0, 1 or 2"),
        ("rcp", lambda _: np.zeros(1, np.int64), "0 axes"),
        ("tlut", lambda _: np.ones((4, 1), np.float16), "none beside decode_mode 1mad"),
        ("weight", lambda _: np.ones((32, 64), np.float16), "both"),
    ],
)
def test_what_is_damaged(tmp_path: Path, part: str, change: Any, words: str) -> None:
    tensors = layer(params(), 32, 64)
    name = f"{MODULE}.{part}"
    if (changed := change(tensors.get(name))) is None:
        del tensors[name]
    else:
        tensors[name] = changed
    with pytest.raises(DamagedError) as caught:
        foreign.decoded(foreign.plan_of(write(tmp_path, tensors, params())))
    assert name in str(caught.value) and words in str(caught.value)


def test_a_rank_that_was_never_written(tmp_path: Path) -> None:
    tensors = layer(params(), 32, 64, rcp=1)
    tensors[f"{MODULE}.tp_rank"] = np.array(4, np.int64)
    with pytest.raises(DamagedError, match="tp_rank: expected 8"):
        foreign.plan_of(write(tmp_path / "rank", tensors, params()))
    with pytest.raises(UnsupportedError, match="up_proj.weight: expected a Hadamard"):
        foreign.plan_of(write(tmp_path / "size", layer(params(), 32, 176), params()))


def test_the_kernels_order_needs_whole_blocks(tmp_path: Path) -> None:
    own = params(decode_mode="quantlut_sym", V=2, tlut_bits=9)
    with pytest.raises(DamagedError, match="in 32s"):
        foreign.plan_of(write(tmp_path, layer(own, 16, 32), own))
