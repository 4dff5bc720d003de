"""``codecs``, ``conformance``, ``doctor``: what this installation is made of."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
from typing import Any

from qformat import codecs as registry
from qformat import tables
from qformat.weight import PackedWeight

PACKAGES = {  # distribution: what it is for
    "numpy": "everything",
    "torch": "running models",
    "transformers": "load, eval",
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
            "what": _what(registry.get(name)),
            "native": native.available(),
            "triton": importlib.util.find_spec(f"qformat.kernels.gpu.{name}") is not None
            and _version("triton") is not None,
        }
        for name in registry.NAMES
    ]
    return {"codecs": rows, "tables": list(tables.names())}


def _what(codec: registry.Codec) -> str:
    """The first sentence of a codec's docstring, without its name."""
    text = " ".join((codec.__doc__ or "").split())
    return text.partition(": ")[2].partition(". ")[0].rstrip(".")


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
    for package, use in PACKAGES.items():
        version = _version(package)
        rows.append({"what": package, "found": version or "missing", "note": "" if version else f"for {use}"})
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


def conformance(command: str | None) -> dict[str, Any]:
    """The decoders of this installation, or another program, against the specification's vectors."""
    from qformat import conformance as vectors
    from qformat.kernels.decoders import decoders

    if command is not None:
        rows = vectors.run_command(shlex.split(command))
    else:
        rows = vectors.run({vectors.REFERENCE: PackedWeight.decode, **decoders()})
    counts = {kind: sum(row["result"] == kind for row in rows) for kind in ("passed", "failed", "skipped")}
    return {**counts, "cases": rows}
