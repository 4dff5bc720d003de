"""Packed models and sessions that the tests of export share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import making
import numpy as np
import onnxruntime
import torch
import transformers

from qformat import checkpoint, codecs
from qformat.converters.quantize.weight import entry_of, pack
from qformat.dtypes import Array
from qformat.runtime.ort.export import FILE
from qformat.weight import PackedWeight

STREAMED = {"optimization.disable_specified_optimizers": "ConstantFolding"}


def folder(
    path: Path, weights: Mapping[str, PackedWeight], dense: Mapping[str, Array], config: Mapping[str, Any]
) -> Path:
    making.folder(path, weights, dense)
    settings = json.loads((path / "config.json").read_text())[checkpoint.KEY]
    (path / "config.json").write_text(json.dumps({**config, checkpoint.KEY: settings}))
    return path


def packed(
    tensors: Mapping[str, Array], schemes: Mapping[str, tuple[str, float, Any]]
) -> tuple[dict[str, PackedWeight], dict[str, Array]]:
    """Weights packed as the first scheme says whose key is in their names (codec, bits, rotation), and the rest."""
    weights, rest = {}, {}
    for name, array in tensors.items():
        kind = next((kind for kind in schemes if kind in name and array.ndim == 2), None)
        if kind is None:
            rest[name] = array
            continue
        codec, bits, rotate = schemes[kind]
        terms = codecs.preset(codec, bits, rotate == "hadamard", {})
        weights[name] = pack(entry_of(name, array.shape, str(array.dtype), terms, rotate), array)
    return weights, rest


def session(path: Path, **config: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(path / FILE, options, providers=["CPUExecutionProvider"])


def exact(path: Path) -> Any:
    """The model of the decoded weights, in float64."""
    opened = checkpoint.open(path)
    config = transformers.AutoConfig.from_pretrained(path)
    del config.quantization_config
    model = getattr(transformers, config.architectures[0])(config).double().eval()
    whole = [name for name in opened if not opened[name].entry.concat]
    arrays = {name: opened[name].decode() for name in [*whole, *opened.members]}
    arrays |= {name: opened.array(name) for name in opened.dense}
    state = {name: torch.from_numpy(array.astype(np.float64)) for name, array in arrays.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= set(model.all_tied_weights_keys) and not unexpected
    model.tie_weights()
    return model
