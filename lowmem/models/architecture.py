"""The structure of a model, found by running it on the meta device.

Nothing is hard-coded per model family: transformers builds the model without memory, and one forward pass on
the meta device shows which linears each decoder layer calls, in which order, and which of them share an
input. Any decoder-only model whose layers use plain `nn.Linear` works.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import unwrap
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowmem.checkpoint.files.reading import one_line
from lowmem.errors import ArchitectureError, LowmemError
from lowmem.models.experts import refuse_experts
from lowmem.models.layer_state import check_layer_state, has_second_inputs, other_state

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PROBE_TOKENS = 8


@dataclass(frozen=True)
class LinearSpec:
    """One linear of a decoder layer; `name` is relative to the layer, such as `mlp.c_fc`."""

    name: str
    in_features: int
    out_features: int
    bias: bool


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: its linears in execution order, grouped by shared input."""

    name: str
    groups: tuple[tuple[LinearSpec, ...], ...]
    returns_tuple: bool

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        return tuple(linear for group in self.groups for linear in group)


@dataclass(frozen=True)
class Architecture:
    """A decoder-only model: its layers, and the tensors outside them."""

    model_type: str
    layers: tuple[LayerSpec, ...]
    embedding: str
    """Name of the token embedding's weight."""
    head: str
    """Name of the head's weight; a tied head is only stored on demand."""
    tied: bool
    shapes: dict[str, tuple[int, ...]]
    """Of every parameter and persistent buffer; a tied head appears once, as the embedding."""

    @property
    def hidden(self) -> int:
        """Features of the hidden states between layers; an embedding may be narrower, as in OPT-350M."""
        return self.layers[0].linears[0].in_features

    def linear_names(self) -> list[str]:
        """The full name of every linear that is quantized."""
        return [f"{layer.name}.{linear.name}" for layer in self.layers for linear in layer.linears]

    def outside(self) -> list[str]:
        """Names of the tensors outside the decoder layers, the embedding first."""
        prefixes = tuple(layer.name + "." for layer in self.layers)
        names = [n for n in self.shapes if not n.startswith(prefixes)]
        return sorted(names, key=lambda n: n != self.embedding)

    def outside_before_layers(self) -> list[str]:
        """The tensors of `outside` that the first layer's hidden states may depend on.

        Leaves out the head, and the tensors that follow the layers in the model's own order (the last norm).
        """
        names = list(self.shapes)
        last_inside = max(i for i, n in enumerate(names) if n.startswith(self.layers[-1].name + "."))
        return [n for n in self.outside() if n != self.head and names.index(n) < last_inside]

    def inside(self, layer: LayerSpec) -> list[str]:
        """Names of the tensors of one decoder layer, relative to it."""
        return [n[len(layer.name) + 1 :] for n in self.shapes if n.startswith(layer.name + ".")]


def build_model(config: PretrainedConfig, dtype: torch.dtype, *, buffers: bool) -> nn.Module:
    """transformers' model with its parameters on the meta device.

    buffers: make non-persistent buffers (rotary frequencies) real, as a model that will run needs them;
    otherwise they are on meta too. Old causal masks, which nothing reads, are empty. Raises ArchitectureError
    when transformers cannot make a causal language model from the config.
    """
    _check_methods(config)
    try:
        text = config.get_text_config(decoder=True).to_dict()
        check_layer_state(text | {"is_encoder_decoder": config.is_encoder_decoder})
        model = _build(config, dtype, buffers)
        _check_state(model, config)
        return model
    except LowmemError:
        raise
    except Exception as error:  # contradictory sizes fail anywhere in the model's code
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        raise ArchitectureError(
            f"config.json makes no {_kind(config)} model: {one_line(error)}",
            "The file is damaged, or belongs to another model",
        ) from error


def _check_methods(config: PretrainedConfig) -> None:
    """Every key of config.json became an attribute; raise ArchitectureError where one replaced a method."""
    for name in vars(config):
        if callable(getattr(type(config), name, None)):
            raise ArchitectureError(f"config.json has the key {name!r}, which is not a setting")


def _check_state(model: nn.Module, config: PretrainedConfig) -> None:
    """Raise ArchitectureError for state that `check_layer_state` did not recognise by the config's words."""
    from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    text = config.get_text_config(decoder=True)
    types = [type(layer) for layer in DynamicCache(config=text).layers]
    others = {t.__name__ for t in types if t not in (DummyLayer, DynamicLayer, DynamicSlidingWindowLayer)}
    # Without a list of its layers, the class alone says that a model keeps a state.
    unlisted = getattr(text, "layer_types", None) is None
    if others or (unlisted and getattr(model, "_is_stateful", False)):
        raise other_state(_kind(text), sorted(others))


def _kind(config: PretrainedConfig) -> str:
    return str(getattr(config, "model_type", "causal language"))[:100]


def _build(config: PretrainedConfig, dtype: torch.dtype, buffers: bool) -> nn.Module:
    from accelerate import init_empty_weights

    if not buffers:
        return _from_config(config, dtype, torch.device("meta")).eval()
    with contextlib.suppress(RuntimeError):  # a model that reads tensors while it is built
        model = _from_config(config, dtype, torch.device("meta"))
        if _make_buffers(model):
            return model.eval()
    model = _from_config(config, dtype, init_empty_weights(include_buffers=False))
    for module in model.modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            if _is_old_mask(buffer):
                module._buffers[leaf] = torch.empty((0, 0), dtype=torch.bool)
    return model.eval()


def _from_config(config: PretrainedConfig, dtype: torch.dtype, context: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        with context:
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ArchitectureError(
            f"transformers has no causal language model for {_kind(config)!r}",
            "lowmem converts decoder-only models such as gpt_bigcode, llama and starcoder2",
        ) from error
    for module in model.modules():
        if type(module).__name__ == "FalconLinear":  # nn.Linear, in two operations
            module.__class__ = nn.Linear
    return model


def _make_buffers(model: nn.Module) -> bool:
    """Replace buffers on meta by real ones, computed by transformers' own initialisation of their modules.

    Takes a tenth of the time of building the model with buffers, which would also draw random weights.
    Returns False, with the model unusable, when a module does not compute its buffer.
    """
    from transformers import PreTrainedModel

    owners = {"": model}
    for name, module in model.named_modules():
        parent = owners[name.rpartition(".")[0]]
        owners[name] = owner = module if isinstance(module, PreTrainedModel) else parent
        made = []
        for leaf, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                continue
            if _is_old_mask(buffer):
                module._buffers[leaf] = torch.empty((0, 0), dtype=torch.bool)
            elif buffer.dtype is torch.bool:
                return False  # a boolean has no value that marks it as not computed
            else:
                unset = math.nan if buffer.dtype.is_floating_point else torch.iinfo(buffer.dtype).min
                made.append(torch.full_like(buffer, unset, device="cpu"))
                module._buffers[leaf] = made[-1]
        if not made:
            continue
        with torch.no_grad():
            owner._init_weights(module)  # type: ignore[operator]
        for buffer in made:
            floating = buffer.dtype.is_floating_point
            left = buffer.isnan() if floating else buffer == torch.iinfo(buffer.dtype).min
            if bool(left.any()):
                return False
    return True


def _is_old_mask(buffer: torch.Tensor) -> bool:
    """Whether this is a causal mask [positions, positions] that transformers keeps for removed code.

    StarChat's would take 64 MiB. Code that used an empty one in its place would fail, not compute nonsense.
    """
    return buffer.dtype is torch.bool and buffer.dim() == 2 and buffer.shape[0] == buffer.shape[1]


def decoder_layers(model: nn.Module, config: PretrainedConfig) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name: the outermost list of the configured length."""
    count = config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not found:
        raise ArchitectureError(f"{config.model_type!r} has no list of {count} decoder layers")
    return min(found, key=lambda item: item[0].count("."))


def inspect(config: PretrainedConfig) -> Architecture:
    """The architecture of a config's model; no weights are needed.

    Raises ArchitectureError for models that are not made of decoder layers with plain nn.Linear.
    """
    model = build_model(config, torch.float32, buffers=False)
    name, layers = decoder_layers(model, config)
    refuse_experts(f"{config.model_type!r}", (n for n, _ in layers.named_parameters(prefix=name)))
    if has_second_inputs(config.get_text_config().to_dict()):
        raise ArchitectureError(
            f"{config.model_type!r} gives each layer a second input for each token",
            "lowmem runs it, and converts models whose layers take hidden states alone",
        )
    for index, layer in enumerate(layers):
        _check_plain(config.model_type, f"{name}.{index}", layer)
    calls = _probe(model, layers, config.model_type)
    specs = []
    for index, layer in enumerate(layers):
        record = calls[index]
        missing = [n for n, m in layer.named_modules() if type(m) is nn.Linear and n not in record.order]
        if missing:
            raise ArchitectureError(
                f"{name}.{index}.{missing[0]} does not run for every token, as in a mixture of experts",
                "lowmem converts models whose linears all run",
            )
        specs.append(LayerSpec(f"{name}.{index}", _grouped(layer, record), record.returns_tuple))
    embedding, head, tied = _ends(model, config)
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if not (tied and n == head)}
    return Architecture(config.model_type, tuple(specs), embedding, head, tied, shapes)


def _probe(model: nn.Module, layers: nn.ModuleList, model_type: str) -> list[_Calls]:
    """Run one forward pass on meta, and record what each layer did; `model` cannot run afterwards."""
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device="meta")
    # A ready-made mask, so that transformers does not read values of meta tensors; the few models that cannot
    # take one make their own.
    masks = (torch.zeros(1, 1, PROBE_TOKENS, PROBE_TOKENS, device="meta"), None)
    for module in model.modules():
        if "dynamic" in str(getattr(module, "rope_type", "")):
            # Without the update of the frequencies, which reads the positions' values.
            module.forward = unwrap(type(module).forward).__get__(module)
    failure: Exception | None = None
    for mask in masks:
        try:
            with _watched(layers) as calls, torch.no_grad():
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            return calls
        except Exception as error:  # the model's own code may raise anything
            failure = failure or error
    raise ArchitectureError(
        f"{model_type!r} cannot be followed without data: {type(failure).__name__}: {failure}",
        "lowmem needs layers whose linears run for every token",
    ) from failure


def _check_plain(model_type: str, name: str, layer: nn.Module) -> None:
    linears = {n for n, m in layer.named_modules() if type(m) is nn.Linear}
    if not linears:
        kinds = sorted({type(m).__name__ for m in layer.modules() if list(m.parameters(recurse=False))})
        raise ArchitectureError(
            f"{model_type!r} has no nn.Linear in its decoder layers (they hold {', '.join(kinds)})",
            "lowmem converts models such as gpt_bigcode, llama and starcoder2",
        )
    for parameter_name, parameter in layer.named_parameters():
        owner = parameter_name.rpartition(".")[0]
        if parameter.dim() >= 2 and owner not in linears and parameter.numel() >= 1 << 16:
            raise ArchitectureError(
                f"{name}.{parameter_name} of shape {tuple(parameter.shape)} is not a plain linear's weight",
                "lowmem converts models whose decoder layers are plain nn.Linear",
            )


class _Calls:
    """The calls of one layer during the probe."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.inputs: dict[str, torch.Tensor] = {}  # kept alive, so that identity means sameness
        self.returns_tuple = False


@contextlib.contextmanager
def _watched(layers: nn.ModuleList) -> Iterator[list[_Calls]]:
    """Record the order of the linears, the input of each, and the type that each layer returns."""
    calls = [_Calls() for _ in layers]
    handles = []

    def watch(record: _Calls, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            record.order.append(name)
            record.inputs[name] = args[0]

        return hook

    def finish(record: _Calls) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            record.returns_tuple = isinstance(output, tuple)

        return hook

    for layer, record in zip(layers, calls, strict=True):
        for name, module in layer.named_modules():
            if type(module) is nn.Linear:
                handles.append(module.register_forward_pre_hook(watch(record, name)))
        handles.append(layer.register_forward_hook(finish(record)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _grouped(layer: nn.Module, record: _Calls) -> tuple[tuple[LinearSpec, ...], ...]:
    groups: list[list[LinearSpec]] = []
    last: torch.Tensor | None = None
    for name in record.order:
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        spec = LinearSpec(name, linear.in_features, linear.out_features, linear.bias is not None)
        if groups and record.inputs[name] is last:
            groups[-1].append(spec)
        else:
            groups.append([spec])
        last = record.inputs[name]
    return tuple(tuple(group) for group in groups)


def _ends(model: nn.Module, config: PretrainedConfig) -> tuple[str, str, bool]:
    """Names of the weights of embedding and head, and whether the head is tied."""
    names = {id(module): name for name, module in model.named_modules()}
    get_in: Any = model.get_input_embeddings
    get_out: Any = model.get_output_embeddings
    embedding, head = get_in(), get_out()
    if embedding is None or head is None:
        raise ArchitectureError(f"{config.model_type!r} has no token embedding or no head")
    tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    return f"{names[id(embedding)]}.weight", f"{names[id(head)]}.weight", tied
