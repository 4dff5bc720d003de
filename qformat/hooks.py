"""What makes ``import qformat`` enough for transformers to load packed models, whichever of the two is imported first.

transformers looks for no plug-ins, and loading either library here would be too much: the quantizer registers itself as
soon as the module of transformers that holds the registry has been loaded.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class _After:
    """A finder of one module, which finds what the others find and has ``then`` called when it has been loaded."""

    def __init__(self, name: str, then: Callable[[], object]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_then(module: ModuleType) -> None:
            load(module)
            self.then()

        spec.loader.exec_module = load_then  # type: ignore[method-assign]
        return spec


def after(name: str, then: Callable[[], object]) -> None:
    """Call ``then`` once the module ``name`` has been loaded: now, or when that happens."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _After(name, then))
