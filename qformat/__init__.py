"""qformat: a documented file format for low-bit model weights.

``import qformat`` loads neither torch nor onnx. ``load``, ``quantize``, ``convert`` and the other commands are resolved on first use.
"""

from __future__ import annotations

import pathlib

__version__ = "0.1.0"

_root = pathlib.Path(__file__).resolve().parents[1]
if (_root / "pyproject.toml").is_file() and (_root / "converters").is_dir():
    # In a checkout `converters`, `runtime`, `kernels` and `spec` lie beside this package; installed they lie inside it.
    __path__.append(str(_root))
