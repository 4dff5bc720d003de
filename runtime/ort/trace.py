"""A model as a graph of ONNX, its weights left open: it is built without them and traced by ``torch.onnx``."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from onnxscript import ir
from torch import Tensor, nn

from qformat.errors import UnsupportedError
from qformat.manifest import Rows

from .body import OPSET
from .functions import DOMAIN, VERSION, Kind
from .tasks import Decoder, Encoder

MODELS = "a decoder or an encoder of text that transformers knows"


class Stand(NamedTuple):
    """What stands in the graph for a module whose weight is packed: ``rows`` of the stored weight of this name,
    which all together give outputs ``width`` wide.
    """

    kind: Kind
    operator: str
    entry: str
    width: int
    rows: Rows


class Packed(nn.Module):
    """Leaves the node ``qformat::<operator>`` in the graph, for now without the parts."""

    def __init__(self, stand: Stand, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.stand, self.bias, self.dtype = stand, bias, dtype
        self.weight = None  # some models look at its dtype, where it is a tensor

    def forward(self, x: Tensor) -> Tensor:
        name, start, stop = self.stand.rows
        linear = self.stand.kind == "Linear"
        if linear:
            x = x.float()  # ONNX Runtime would use a kernel for float16 or not, as the nodes beside it do
        elif start:
            x = x + start
        y = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{self.stand.operator}",
            (x,),
            {"entry": self.stand.entry, "weight": name},
            dtype=torch.float32,
            shape=(*x.shape[: -1 if linear else None], self.stand.width),
            version=VERSION,
        ).to(self.dtype)
        if linear and stop - start < self.stand.width:
            y = y[..., start:stop]
        return y if self.bias is None else y + self.bias


def skeleton(path: Path, dtype: torch.dtype) -> Any:
    """The transformers model of a folder, its weights allocated and never written: they cost no memory. It is of the
    class that the config names, unless that generates: then of the decoder that transformers has for the config.

    Raises :class:`UnsupportedError` for all but decoders, and encoders of text.
    """
    import transformers
    from transformers.initialization import no_init_weights

    try:
        config = transformers.AutoConfig.from_pretrained(path)
        kind = _class(config)
        if kind is None and config.is_encoder_decoder:
            raise ValueError(architecture(config))
        make = kind._from_config if kind is not None else transformers.AutoModelForCausalLM.from_config
        with no_init_weights():
            model = make(config, dtype=dtype, attn_implementation="eager")
        if kind is not None and not _encodes_text(model):
            raise ValueError(architecture(config))
    except ValueError as error:
        raise UnsupportedError(MODELS, str(error).partition("\n")[0]) from None
    model.tie_weights()
    return model


def _class(config: Any) -> Any:
    """The class that the config names; None where there is none in transformers, or one that generates."""
    import transformers

    kind = getattr(transformers, architecture(config), None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel) or kind.can_generate():
        return None
    if not isinstance(config, kind.config_class or ()):
        raise ValueError(f"{kind.__name__} with the config of {config.model_type}")
    return kind


def _encodes_text(model: Any) -> bool:
    config = model.config
    return model.main_input_name == "input_ids" and config.get_text_config() is config and not config.is_encoder_decoder


def architecture(config: Any) -> str:
    return str((config.architectures or [config.model_type])[0])


def paths(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Parameter of the model -> its name among those of the checkpoint: some lack the prefix of the base model or have
    it too many, some are older than the model's code. Names that the model has no parameter for are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    state, steps = model.state_dict(), get_model_conversion_mapping(model)
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    renamings = [step for step in steps if not isinstance(step, WeightConverter)]
    out: dict[str, str] = {}
    for name in names:
        path, fused = name, None
        if name not in state:
            path, fused = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if path in state and fused is None:
            out[path] = name
    return out


def kind_of(model: Any, module: str) -> Kind | None:
    """What stands for a module whose weight is packed; None where nothing does."""
    kinds: dict[type, Kind] = {nn.Linear: "Linear", nn.Embedding: "Embedding"}
    return kinds.get(type(model.get_submodule(module)))


def stand_in(model: Any, module: str, stand: Stand) -> None:
    """Replace a linear layer or an embedding by what leaves ``stand`` in the graph."""
    bias = getattr(model.get_submodule(module), "bias", None)
    model.set_submodule(module, Packed(stand, bias, model.dtype))


def trace(model: Any, kept: Mapping[str, object]) -> ir.Model:
    """The graph. Initializers are called as the model's parameters; those in ``kept`` have no value yet, so that no
    optimization can fold them.
    """
    task = Decoder(model) if model.can_generate() else Encoder(model)
    inputs = task.inputs()
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                task.eval(),
                tuple(one.value for one in inputs.values()),
                dynamo=True,
                verbose=False,
                input_names=list(inputs),
                dynamic_shapes=(tuple(one.axes for one in inputs.values()),),
                opset_version=OPSET,
                optimize=False,
            )
            graph = program.model.graph
            for name, value in zip(program.exported_program.call_spec.out_spec.context, graph.outputs, strict=True):
                value.name = name
            for name in list(graph.initializers):
                value = graph.initializers.pop(name)
                value.name = name.removeprefix("model.")
                value.const_value = None if value.name in kept else value.const_value
                graph.initializers[value.name] = value
            program.optimize()
    except torch.onnx.OnnxExporterError as error:
        why = str(error.__cause__ or error).strip().partition("\n")[0]
        raise UnsupportedError("a model that torch.onnx can trace", f"{architecture(model.config)}: {why}") from error
    return program.model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter tells of its own progress and of what it does without."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
