"""Settings that must stand before anything is imported."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, hence before any is imported

# Machines differ in speed, so no test fails for being slow; in CI the same code meets the same examples.
settings.register_profile("qformat", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("qformat")
