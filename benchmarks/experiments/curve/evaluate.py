"""Evaluates versions alike: the unquantized model in float32 with a version's dequantized linears in it.

A version's norms and biases replace the model's where its converter tuned them; embedding and head stay. So
no kernel's arithmetic plays a part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lowmem.benchmarks.experiments.curve.linears import Linear
from lowmem.benchmarks.experiments.curve.record import Divergence
from lowmem.benchmarks.experiments.peers.steps import logits_of

if TYPE_CHECKING:
    import torch
    from lowmem.benchmarks.quality.texts import Text

TEXTS = ("code", "dialogues", "humaneval")


class Evaluator:
    """The unquantized model `source`, its logits on the texts, and the divergence of its versions."""

    def __init__(self, source: str) -> None:
        self.source = source

    @cached_property
    def config(self) -> Any:
        """transformers' config of the model."""
        return self.model.config

    @cached_property
    def model(self) -> Any:
        """The model in float32; `divergences` replaces its linears, norms and biases."""
        import torch

        from lowmem.loading.loader import LoadOptions, load

        return load(self.source, LoadOptions(dtype=torch.float32)).model

    @cached_property
    def names(self) -> list[str]:
        """The linears of the decoder layers."""
        from lowmem.models.architecture import inspect

        return list(inspect(self.config).linear_names())

    @cached_property
    def texts(self) -> tuple[Text, ...]:
        """The texts, 24 rows of 512 tokens each."""
        from lowmem.benchmarks.quality.texts import read_texts

        from lowmem.checkpoint.source.open import open_source

        return read_texts(TEXTS, (), open_source(self.source).tokenizer(), self.config.vocab_size)

    @cached_property
    def reference(self) -> dict[str, list[torch.Tensor]]:
        """The unquantized model's logits on each text, some rows at a time."""
        return {text.name: list(logits_of(self.model, text.rows)) for text in self.texts}

    @cached_property
    def small(self) -> dict[str, torch.Tensor]:
        """The unquantized model's norms and biases, by name."""
        return {name: value.detach() for name, value in self.model.named_parameters() if value.dim() == 1}

    def divergences(
        self,
        linears: Iterable[tuple[Linear, torch.Tensor]],
        tuned: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[list[Linear], list[Divergence]]:
        """How a version's linears are stored, and its divergence on each text.

        tuned: the version's norms and biases, those of the unquantized model where None. Raises ValueError
        unless the version has exactly the model's linears, in their shapes.
        """
        from lowmem.benchmarks.quality.divergence import compare, standard_error
        from torch import nn

        reference, small = self.reference, self.small  # before anything is replaced
        for name, value in small.items():
            self.model.get_parameter(name).data = (tuned or {}).get(name, value).to(value.dtype)
        stored = []
        for linear, weight in linears:
            module = self.model.get_submodule(linear.name)
            if weight.shape != module.weight.shape:
                raise ValueError(f"{linear.name} has shape {list(weight.shape)}")
            module.weight = nn.Parameter(weight, requires_grad=False)
            stored.append(linear)
        if sorted(linear.name for linear in stored) != sorted(self.names):
            raise ValueError(f"{len(stored)} linears for the {len(self.names)} of the model")
        found = []
        for text in self.texts:
            pairs = zip(reference[text.name], logits_of(self.model, text.rows), strict=True)
            kld = compare(text.rows, ((p.flatten(0, 1), q.flatten(0, 1)) for p, q in pairs)).kld
            found.append(Divergence(text.name, int(kld.size), float(kld.mean()), standard_error(kld)))
        return stored, found
