"""Names, shapes and dtypes of the tensors that the model of a config.json has, without weights."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem.checkpoint.files.reading import one_line
from lowmem.checkpoint.headers.config import read_config
from lowmem.checkpoint.source.config import model_config
from lowmem.checkpoint.values import FLOATS
from lowmem.errors import SourceError, VerifyError

if TYPE_CHECKING:
    from torch import nn


def meta_model(folder: Path) -> nn.Module:
    """The model of config.json on the meta device, without weights; no code of the folder runs.

    Raises VerifyError when transformers cannot make a causal language model of it.
    """
    try:
        config = model_config(folder, read_config(folder / "config.json"))
    except SourceError as error:
        raise VerifyError(f"config.json makes no model: {error.message}") from error
    return model_of(config)


def model_of(config: Any) -> nn.Module:
    """As `meta_model`, of a transformers config."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # problems are reported by the caller
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # the values are not trusted, and each model class fails in its own way
        raise VerifyError(f"config.json makes no model: {one_line(error)}") from error
    return model


def integer_buffers(model: nn.Module) -> set[str]:
    """Names of the buffers that the model defines as integers; all other tensors must be floats."""
    return {name for name, buffer in model.named_buffers() if not buffer.dtype.is_floating_point}


def unique_tensors(model: nn.Module) -> Iterator[tuple[str, tuple[tuple[str, ...], tuple[int, ...]]]]:
    """(name, (all its names, shape)) of every tensor in a model's state; a tied head is listed once."""
    groups: dict[int, list[str]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
        shapes[id(tensor)] = tuple(tensor.shape)
    for key, names in groups.items():
        yield names[0], (tuple(names), shapes[key])


def expected_shapes(model: nn.Module, stored: Container[str]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a checkpoint must hold; a tied head once, under the name in `stored`."""
    return {
        next((alias for alias in aliases if alias in stored), name): shape
        for name, (aliases, shape) in unique_tensors(model)
    }


def misfit(
    shape: tuple[int, ...], dtype: torch.dtype, needed: tuple[int, ...], *, integers: bool
) -> str | None:
    """How a stored tensor differs from the model's, or None. integers: the model's is of integers."""
    if shape != needed:
        return f"has shape {list(shape)}, the model needs {list(needed)}"
    if not integers and dtype not in FLOATS:
        return f"has dtype {str(dtype).removeprefix('torch.')}, not a float of 16 bits or more"
    return None
