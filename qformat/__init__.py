"""qformat: a documented file format for low-bit model weights.

``import qformat`` loads neither torch nor onnx. ``load``, ``quantize``, ``convert`` and the other commands are
resolved on first use.
"""

from __future__ import annotations

import importlib
import importlib.util
import pathlib

from . import hooks

__version__ = "0.1.0"

_root = pathlib.Path(__file__).resolve().parents[1]
if (_root / "pyproject.toml").is_file() and (_root / "converters").is_dir():
    # In a checkout `converters`, `runtime`, `kernels` and `spec` lie beside this package; installed they lie inside it.
    __path__.append(str(_root))

_LAZY = {
    "open": "qformat.sources",
    "convert": "qformat.converters.convert",
    "quantize": "qformat.converters.quantize.job",
    "inspect": "qformat.converters.report",
    "verify": "qformat.converters.report",
    "load": "qformat.runtime.huggingface",
    "evaluate": "qformat.runtime.evaluate",
    "export": "qformat.runtime.ort.export",
    "push": "qformat.converters.hub",
    "pull": "qformat.converters.hub",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


def _register() -> None:
    if importlib.util.find_spec("torch"):  # without it transformers loads no models
        importlib.import_module(_LAZY["load"])


hooks.after("transformers.quantizers.auto", _register)
