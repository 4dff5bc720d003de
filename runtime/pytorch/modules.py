"""Modules whose weights stay packed. :func:`pack` turns a module into one where it stands; its class says the rest."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from qformat import weight
from qformat.dtypes import Array, name_of
from qformat.errors import DamagedError
from qformat.manifest import Entry
from qformat.weight import PackedWeight

from . import ops
from .prepared import entry_of, shape_of, spec
from .tensor import Joined, PackedTensor, PiecesTensor


class Info(NamedTuple):
    """Of one packed parameter: the operators' text, the names of its parts, the dtype that it shows."""

    spec: str
    parts: tuple[str, ...]
    dtype: torch.dtype
    owner: nn.Module | None = None  # that has the parts, where it is another module
    held: bool = False  # for other modules, and no parameter of this one

    def tensors(self, module: nn.Module) -> list[Tensor]:
        return [(self.owner or module)._parameters[part] for part in self.parts]  # type: ignore[misc]

    def show(self, module: nn.Module) -> PackedTensor:
        return PackedTensor(self.tensors(module), self.spec, self.dtype)


class Pieces(NamedTuple):
    """Of one parameter that is stored as several: the modules that hold these and their names there."""

    of: tuple[tuple[nn.Module, str], ...]
    axis: int
    dtype: torch.dtype
    held: bool = False  # as of :class:`Info`

    def _each(self) -> list[tuple[nn.Module, Info]]:
        return [(owner, owner.packed[name]) for owner, name in self.of]  # type: ignore[index, misc]

    def tensors(self, module: nn.Module) -> list[Tensor]:
        return [tensor for owner, info in self._each() for tensor in info.tensors(owner)]

    def show(self, module: nn.Module) -> PackedTensor:
        pieces = [info._replace(dtype=self.dtype).show(owner) for owner, info in self._each()]
        return PiecesTensor(pieces, self.axis, self.dtype)


class Packed(nn.Module):
    """A module with packed parameters. The parts are parameters ``<name>_<part>`` without gradient, whose dtypes stay
    what they are whatever the module is cast to; ``<name>`` itself is a read-only :class:`PackedTensor`.
    """

    packed: dict[str, Info | Pieces]

    def parts(self, name: str = "weight") -> list[Tensor]:
        return self.packed[name].tensors(self)

    def part_names(self) -> list[str]:
        """Of the parts that lie in this module."""
        return [part for info in self.stored.values() for part in info.parts]

    @property
    def stored(self) -> dict[str, Info]:
        """What has its parts in this module."""
        own = {name: info for name, info in self.packed.items() if isinstance(info, Info)}
        return {name: info for name, info in own.items() if info.owner is None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        kept = {id(self._parameters[part]) for part in self.part_names()}

        def moved(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            return tensor.to(out.device) if id(tensor) in kept and out.dtype != tensor.dtype else out

        super()._apply(moved, recurse)
        shown = {name: fn(torch.empty(0, dtype=info.dtype)).dtype for name, info in self.packed.items()}
        self.packed = {name: info._replace(dtype=shown[name]) for name, info in self.packed.items()}
        return self


def _shown(name: str) -> property:
    def get(self: Packed) -> PackedTensor:
        return self.packed[name].show(self)

    return property(get, doc="The weight; decoded when it is computed with by other means than a product.")


class QLinear(Packed, nn.Linear):
    weight = _shown("weight")

    def forward(self, input: Tensor) -> Tensor:
        info: Any = self.packed["weight"]
        y = ops.linear_op(input, info.tensors(self), info.spec)
        return y if self.bias is None else y + self.bias


class QEmbedding(Packed, nn.Embedding):
    weight = _shown("weight")

    def forward(self, input: Tensor) -> Tensor:
        info: Any = self.packed["weight"]
        return ops.embedding_op(input, info.tensors(self), info.spec).to(info.dtype)


def pack(module: nn.Module, name: str, entry: Entry, rows: tuple[int, int] | None = None) -> None:
    """Replace a module's parameter by the parts that ``entry`` says, empty, on its device; the module's class changes.
    With ``rows`` the parameter was these of what is stored.

    Raises :class:`DamagedError` where the parameter has another shape.
    """
    dense = _replaced(module, name, shape_of(text := spec(entry, rows)))
    _describe(module, name, Info(text, _register(module, name, entry, dense.device), dense.dtype), _simple(text))


def hold(module: nn.Module, name: str, entry: Entry, like: Tensor) -> None:
    """Let a module have the parts of a weight that is none of its own, for :func:`share` and :func:`compose`; on the
    device of ``like``.
    """
    parts = _register(module, name, entry, like.device)
    _describe(module, name, Info(spec(entry), parts, like.dtype, held=True))


def share(module: nn.Module, name: str, owner: nn.Module, held: str, rows: tuple[int, int]) -> None:
    """Replace a module's parameter by ``rows`` of what ``owner`` holds as ``held``; see :func:`pack`."""
    whole: Info = owner.packed[held]  # type: ignore[index, assignment]
    dense = _replaced(module, name, shape_of(text := spec(entry_of(whole.spec), rows)))
    _describe(module, name, Info(text, whole.parts, dense.dtype, owner), _simple(text))


def compose(module: nn.Module, name: str, entry: Entry, of: Sequence[tuple[nn.Module, str]]) -> None:
    """Replace a module's parameter by what others hold, one after another along the axis of ``entry``."""
    dense = _replaced(module, name, entry.shape)
    _describe(module, name, Pieces(tuple(of), entry.axis, dense.dtype))


def _replaced(module: nn.Module, name: str, shape: tuple[int, ...]) -> Tensor:
    """The parameter of a module, taken away."""
    dense = module._parameters[name]
    assert dense is not None
    if tuple(dense.shape) != shape:
        raise DamagedError(f"the model's shape {list(dense.shape)}", str(list(shape)))
    return module._parameters.pop(name)  # type: ignore[return-value]


def _register(module: nn.Module, name: str, entry: Entry, device: torch.device) -> tuple[str, ...]:
    """Empty parts; their names."""
    parts = weight.layout(entry)
    for part in parts:
        empty = torch.empty(part.shape, dtype=getattr(torch, str(part.dtype)), device=device)
        module.register_parameter(f"{name}_{part.name}", nn.Parameter(empty, requires_grad=False))
    return tuple(f"{name}_{part.name}" for part in parts)


def _simple(text: str) -> bool:
    """Whether the weight is the matrix that its codec sees."""
    return len(shape_of(text)) == 2 and not entry_of(text).transposed


def _describe(module: nn.Module, name: str, info: Info | Pieces, simple: bool = False) -> None:
    module.__class__ = _class(type(module), name, simple)
    module.packed = {**getattr(module, "packed", {}), name: info}  # type: ignore[assignment]


@functools.cache
def _class(kind: type[nn.Module], name: str, simple: bool) -> type[nn.Module]:
    """``kind`` with the parameter ``name`` packed: it keeps its own forward, which finds a :class:`PackedTensor`."""
    for plain, packed in ((nn.Linear, QLinear), (nn.Embedding, QEmbedding)):
        if kind is plain and name == "weight" and simple:
            return packed
    bases = (kind,) if issubclass(kind, Packed) else (Packed, kind)
    return type(kind.__name__, bases, {name: _shown(name), "__module__": kind.__module__})


def unpack(module: Packed) -> None:
    """Undo :func:`pack`, :func:`share` and :func:`compose`: the decoded weights as ordinary parameters, in the dtypes
    that they showed. What a module holds for others is gone, so that these come first.
    """
    dense = {name: getattr(module, name).decode() for name, info in module.packed.items() if not info.held}
    for part in module.part_names():
        del module._parameters[part]
    module.__class__ = next(kind for kind in type(module).__mro__ if not issubclass(kind, Packed))
    del module.packed
    for name, value in dense.items():
        module.register_parameter(name, nn.Parameter(value))


def unfuse(module: nn.Module, name: str, leaves: Sequence[str]) -> None:
    """Replace a parameter ``[experts, out, in]`` by linear layers: children ``<expert>.<leaf>``, which share its rows
    equally. The module's own code still finds ``name``: a :class:`Joined`.
    """
    fused = module._parameters.pop(name)
    assert fused is not None
    experts, rows, cols = fused.shape
    for number in range(experts):
        if str(number) not in module._modules:
            module.add_module(str(number), nn.Module())
        for leaf in leaves:
            layer = nn.Linear(cols, rows // len(leaves), bias=False, device=fused.device, dtype=fused.dtype)
            module.get_submodule(str(number)).add_module(leaf, layer)
    module.__class__ = _unfused_class(type(module), name, tuple(leaves))


@functools.cache
def _unfused_class(kind: type[nn.Module], name: str, leaves: tuple[str, ...]) -> type[nn.Module]:
    joined = property(lambda self: Joined(self, leaves))
    return type(kind.__name__, (kind,), {name: joined, "__module__": kind.__module__})


def linear(packed: PackedWeight, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A linear layer on the parts of a packed matrix, which are not copied; ``dtype`` is what its weight shows."""
    rows, cols = packed.shape
    layer = nn.Linear(cols, rows, bias=False, device="meta", dtype=dtype)
    stored = {f"weight_{number}": piece for number, piece in enumerate(packed.pieces)}
    for name, piece in stored.items():
        hold(layer, name, piece.entry, like=layer.weight)
    if stored:
        compose(layer, "weight", packed.entry, [(layer, name) for name in stored])
    else:
        stored = {"weight": packed}
        whole = msgspec.structs.replace(packed.entry, concat=())
        pack(layer, "weight", whole if packed.rows is None else packed.entry, packed.rows)
    for name, one in stored.items():
        for part, tensor in tensors(one.parts).items():
            setattr(layer, f"{name}_{part}", nn.Parameter(tensor, requires_grad=False))
    layer.bias = None if bias is None else nn.Parameter(bias)
    return layer


def tensors(parts: Mapping[str, Array]) -> dict[str, Tensor]:
    """Parts as tensors that share their memory: read-only where the file is mapped so."""
    return {name: _tensor(part) for name, part in parts.items()}


def _tensor(part: Array) -> Tensor:
    dtype: Any = getattr(torch, name_of(part.dtype))
    bits = part if part.dtype.isbuiltin == 1 else part.view(f"i{part.dtype.itemsize}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(bits).view(dtype)
