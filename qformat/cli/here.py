"""``codecs``, ``conformance``, ``doctor``: what this installation is made of."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

from qformat import codecs as registry
from qformat import tables
from qformat.weight import PackedWeight

PACKAGES = ("numpy", "torch", "transformers", "triton", "onnx", "onnxruntime", "huggingface-hub", "vllm", "sglang")
BUYS = {
    "torch": "running models",
    "transformers": "qformat.load, eval",
    "triton": "GPU kernels",
    "onnx": "export --to onnx",
    "onnxruntime": "running exported models",
    "huggingface-hub": "models on the Hub",
}


def codecs() -> dict[str, Any]:
    from qformat.kernels import native

    rows = [
        {
            "name": name,
            "what": (registry.get(name).__doc__ or "").split(": ", 1)[-1].split(". Page")[0].strip(),
            "native": native.available(),
            "triton": importlib.util.find_spec(f"qformat.kernels.gpu.{name}") is not None
            and _version("triton") is not None,
        }
        for name in registry.NAMES
    ]
    return {"codecs": rows, "tables": list(tables.names())}


def doctor() -> dict[str, Any]:
    from qformat.kernels import native

    found = native.variant() if native.available() else "missing"
    rows = [
        {"what": "python", "found": platform.python_version(), "note": platform.platform()},
        {"what": "processor", "found": f"{os.cpu_count()} threads", "note": platform.machine()},
        {
            "what": "native library",
            "found": found,
            "note": "" if native.available() else f"{native.why()}; everything works, slower",
        },
    ]
    for package in PACKAGES:
        version = _version(package)
        rows.append(
            {
                "what": package,
                "found": version or "missing",
                "note": "" if version else f"for {BUYS.get(package, package)}",
            }
        )
    if _version("torch"):
        import torch

        gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
        rows.append({"what": "gpu", "found": gpu, "note": "" if torch.cuda.is_available() else "models run on the CPU"})
    return {"rows": rows}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def conformance() -> dict[str, Any]:
    from qformat import conformance as vectors
    from qformat.kernels.decoders import decoders

    rows = vectors.run({vectors.REFERENCE: PackedWeight.decode, **decoders()})
    counts = {kind: sum(row["result"] == kind for row in rows) for kind in ("passed", "failed", "skipped")}
    return {**counts, "cases": rows}
