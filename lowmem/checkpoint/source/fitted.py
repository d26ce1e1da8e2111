"""A checkpoint under the names of its model, renamed and merged as transformers does when it loads one.

transformers 5 renames tensors (GPT-NeoX publishes its head as `embed_out`) and merges others (the experts of
a layer into one tensor). Its own rules are applied here, so that every reader meets the model's names, and
with them those for SantaCoder's first layout, which transformers does not know. A head
that the config ties to the embedding, and that is stored with other values, stays a head of its own, as in
transformers' `tie_weights`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem.checkpoint.dequantize import PackedWeight
from lowmem.checkpoint.files.reading import one_line
from lowmem.checkpoint.formats import QUANT_PARTS, LinearFormat
from lowmem.checkpoint.headers.santacoder import (
    JOINED,
    KEYS_AND_VALUES,
    QUERIES,
    TRANSPOSED,
    has_first_names,
)
from lowmem.checkpoint.source.base import ByteRange, Source, TensorInfo
from lowmem.checkpoint.source.config import is_reduced_to_text
from lowmem.checkpoint.source.model_tensors import expected_shapes, model_of
from lowmem.checkpoint.source.text_names import is_left_out, text_name
from lowmem.errors import SourceError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


def fitted(source: Source, model: nn.Module | None = None) -> Source:
    """`source` under the names of its model; `source` itself where these are its names already.

    model: the model of the source's config, if the caller has one. Raises SourceError where packed tensors
    would have to be merged, VerifyError where transformers makes no model of the config.
    """
    if model is None:
        model = model_of(source.config())
    text = is_reduced_to_text(source.config_json, source.config())
    places, left_out = _places(source, model, text=text)
    untied = _untied(source, places, model)
    if not (untied or left_out or text) and all(name == place for name, place in places.items()):
        return source
    return FittedSource(source, model, places, untied=untied, text=text, left_out=left_out)


@dataclass(frozen=True)
class _Merged:
    """One tensor of the model that transformers makes of stored ones."""

    converter: Any
    """transformers' WeightConverter."""
    parts: Mapping[str, tuple[str, ...]]
    """The stored tensors of each of its source patterns, in its order."""
    first: str
    """The model's name that the stored ones were renamed to."""
    file: str
    """Of the first stored tensor."""

    @property
    def stored(self) -> list[str]:
        """All stored tensors."""
        return [name for names in self.parts.values() for name in names]

    def infos(self, source: Source, model: nn.Module) -> dict[str, TensorInfo]:
        """What is made, by name, found on the meta device.

        Raises SourceError where the stored tensors do not fit together.
        """

        def read(name: str) -> torch.Tensor:
            info = source.infos[name]
            return torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta")

        try:
            made = self.convert(read, model)
        except Exception as error:  # whatever torch raises for parts of different sizes
            raise SourceError(
                f"{source.display} holds parts of {self.first!r} that do not fit together: {one_line(error)}",
                "It is incomplete, or of another architecture than its config",
            ) from error
        dtype = str(next(iter(made.values())).dtype).removeprefix("torch.")
        return {name: TensorInfo(tuple(tensor.shape), dtype, self.file) for name, tensor in made.items()}

    def convert(self, read: Any, model: nn.Module) -> dict[str, torch.Tensor]:
        """Every tensor of the model that `read`'s tensors make, by name."""
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.parts.items():
            converter.collected_tensors[pattern] = [_Reading(read, name) for name in names]
        made = converter.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class _Reading:
    """A read that waits until transformers asks for it."""

    read: Any
    name: str

    def __call__(self) -> torch.Tensor:
        tensor: torch.Tensor = self.read(self.name)
        return tensor


@dataclass(frozen=True)
class _Made:
    """One of the tensors that a merge makes."""

    merged: _Merged
    info: TensorInfo


_Place = str | _Made
"""A name of the source's `dense_infos`, or how the tensor is made of others."""


def _places(source: Source, model: nn.Module, *, text: bool) -> tuple[dict[str, _Place], list[str]]:
    """Where each tensor of the model is, by its name; and the stored tensors of other models.

    text: the model is the text model of a checkpoint that holds more.
    """
    stored, left_out = _bare_names(source, text=text)
    if not left_out and all(name in stored for name in expected_shapes(model, stored)):
        return dict(stored), []
    return _renamed(source, stored, model.state_dict(), model), left_out


def _bare_names(source: Source, *, text: bool) -> tuple[dict[str, str], list[str]]:
    """Stored tensors as a dense model has them, by the text model's name; and those of other parts."""
    packed = {f"{linear}.{part}" for linear in source.quantized for part in QUANT_PARTS}
    names = [name for name in source.dense_infos if name not in packed]
    if not text:
        return {name: name for name in names}, []
    left_out = [name for name in names if is_left_out(name)]
    others = set(left_out)
    return {text_name(name): name for name in names if name not in others}, left_out


def _renamed(
    source: Source, stored: Mapping[str, str], own: Mapping[str, torch.Tensor], model: nn.Module
) -> dict[str, _Place]:
    """The rules of transformers' `convert_and_load_state_dict_in_model`, without its loading."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    prefix: Any = model.base_model_prefix
    rules = [*get_model_conversion_mapping(model), *_own_rules(source, stored)]  # type: ignore[arg-type]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    places: dict[str, _Place] = {}
    merged: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for bare in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(bare, renamings, converters, prefix, own)
        if name not in own and bare in own:
            name, pattern = rename_source_key(bare, [], [], prefix, own)
        if pattern is None or name not in own:
            places.setdefault(name if name in own else bare, stored[bare])
            continue
        if source.packed_name(stored[bare]) is not None:
            raise SourceError(
                f"{source.display} holds quantized tensors that its model merges, such as "
                f"{source.packed_name(stored[bare])!r}",
                "lowmem merges only 16-bit tensors, such as those of experts: use the 16-bit original",
            )
        parts = merged.setdefault(name, (of_pattern[pattern], {}))[1]
        parts.setdefault(pattern, []).append(stored[bare])
    for name, (converter, parts) in merged.items():
        kept = {pattern: tuple(names) for pattern, names in parts.items()}
        file = source.infos[next(iter(kept.values()))[0]].file
        place = _Merged(converter, kept, name, file)
        infos = place.infos(source, model)
        for made, info in infos.items():
            places[made] = _Made(place, info)
    return places


def _own_rules(source: Source, stored: Iterable[str]) -> list[Any]:
    """The rules for a layout that transformers does not know: SantaCoder's first one."""
    from transformers.core_model_loading import Concatenate, Transpose, WeightConverter

    if not has_first_names(source.config_json, stored):
        return []
    halves = (QUERIES, KEYS_AND_VALUES)
    join = [Concatenate(dim=1), Transpose(0, 1)]  # [in, a] and [in, b] → [in, a + b] → [a + b, in]
    return [
        WeightConverter([f"{half}.weight" for half in halves], f"{JOINED}.weight", join),
        WeightConverter([f"{half}.bias" for half in halves], f"{JOINED}.bias", [Concatenate(dim=0)]),
        *(
            WeightConverter(f"{linear}.weight", f"{linear}.weight", [Transpose(0, 1)])
            for linear in TRANSPOSED
        ),
    ]


def _untied(source: Source, places: dict[str, _Place], model: nn.Module) -> str:
    """The stored head that the config ties, and that differs from the embedding; "" without one.

    Where only the head is stored it becomes the embedding's place, too, as transformers ties both ways.
    """
    tied: Any = model.get_expanded_tied_weights_keys  # type: ignore[assignment]
    for head, embedding in tied(all_submodels=True).items():
        one, other = places.get(embedding), places.get(head)
        if isinstance(one, str) and isinstance(other, str):
            if source.packed_name(other) or not source.same_values(one, other):
                return other
        elif one is None and isinstance(other, str):
            places[embedding] = other
    return ""


class FittedSource(Source):
    """A source whose tensors have the names, and the shapes, of its model."""

    def __init__(
        self,
        inner: Source,
        model: nn.Module,
        places: Mapping[str, _Place],
        *,
        untied: str,
        text: bool,
        left_out: list[str],
    ) -> None:
        """places: the model's names → where each is; see `fitted`, which makes them."""
        self._inner, self._model, self._places = inner, model, dict(places)
        self._kind, self.reads_rows = inner._kind, inner.reads_rows
        self.path, self.display, self.format = inner.path, inner.display, inner.format
        self.untied = bool(untied)
        self.quantized: dict[str, LinearFormat] = {}
        self._groups_in_order = {}
        self._inner_linear: dict[str, str] = {}
        self.infos = self._infos()
        self._reduced = text
        self._config_json = self._own_config_json()
        self.notes = tuple(_notes(inner, untied, left_out))

    def _infos(self) -> dict[str, TensorInfo]:
        infos: dict[str, TensorInfo] = {}
        for name, place in self._places.items():
            if isinstance(place, _Made):
                infos[name] = place.info
            elif (packed := self._inner.packed_name(place)) is not None:
                linear = name.removesuffix(".weight")
                self.quantized[linear] = self._inner.quantized[packed]
                self._inner_linear[linear] = packed
                infos |= {f"{linear}.{part}": self._inner.infos[f"{packed}.{part}"] for part in QUANT_PARTS}
            else:
                infos[name] = self._inner.infos[place]
        return infos

    def _own_config_json(self) -> Mapping[str, Any]:
        config = dict(self._inner.config_json)
        if self._reduced:
            made: dict[str, Any] = self._inner.config().to_dict()
            kept = {k: v for k, v in config.items() if k in ("quantization_config", "dtype", "torch_dtype")}
            config = {**made, **kept}
        if self.untied:
            config["tie_word_embeddings"] = False
        return config

    def config(self) -> PretrainedConfig:
        """As Source.config; it does not tie a head that is stored with values of its own."""
        config = self._inner.config()
        if self.untied:
            config.tie_word_embeddings = False
        return config

    def _place(self, name: str) -> _Place:
        """Where a tensor of `infos` is: as stored, or what makes it."""
        linear, _, part = name.rpartition(".")
        if part in QUANT_PARTS and linear in self._inner_linear:
            return f"{self._inner_linear[linear]}.{part}"
        return self._places[name]

    def _read(self, name: str, rows: slice | torch.Tensor | None) -> torch.Tensor:
        self._check_read(name, rows)
        place = self._place(name)
        if isinstance(place, str):
            return self._inner.read(place, rows)
        made = place.merged.convert(self._inner.read, self._model)[name]
        return made if rows is None else made[rows]

    def _map(self, name: str) -> torch.Tensor | None:
        place = self._place(name)
        return self._inner.map(place) if isinstance(place, str) else None

    def packed(self, linear: str) -> PackedWeight:
        """See Source.packed."""
        return self._inner.packed(self._inner_linear[linear])

    def shards(self) -> list[tuple[Path, bytes]]:
        """See Source.shards."""
        return self._inner.shards()

    def checksummed_shards(self) -> list[Path]:
        """See Source.checksummed_shards."""
        return self._inner.checksummed_shards()

    def byte_ranges(self, names: Iterable[str]) -> list[ByteRange]:
        """See Source.byte_ranges."""
        stored: list[str] = []
        for name in (part for dense in names for part in self._stored(dense)):
            place = self._place(name)
            stored += [place] if isinstance(place, str) else place.merged.stored
        return self._inner.byte_ranges(stored)

    def read_overhead(self, numel: int) -> int:
        """See Source.read_overhead; a merged tensor exists in parts, joined and reordered."""
        merged = any(isinstance(place, _Made) for place in self._places.values())
        return (3 if merged else 1) * self._inner.read_overhead(numel)

    def release(self) -> None:
        """See Source.release."""
        self._inner.release()

    def tokenizer(self) -> Any:
        """See Source.tokenizer."""
        return self._inner.tokenizer()

    def generation_config(self) -> dict[str, Any]:
        """See Source.generation_config."""
        return self._inner.generation_config()

    def side_files(self) -> list[Path]:
        """See Source.side_files."""
        return self._inner.side_files()

    def license_name(self) -> str | None:
        """See Source.license_name."""
        return self._inner.license_name()

    def fingerprint(self) -> str:
        """See Source.fingerprint: of the stored tensors."""
        return self._inner.fingerprint()


def _notes(source: Source, untied: str, left_out: list[str]) -> Iterable[str]:
    if untied:
        yield (
            f"config.json ties the head to the embedding, but the weights hold another head ({untied}), "
            "which is used, as in transformers"
        )
    if left_out:
        size = sum(source.dense_infos[name].nbytes for name in left_out)
        yield (
            f"only the text model of this {source.config_json.get('model_type')} checkpoint is used; "
            f"{len(left_out)} tensors of its other parts ({size / 2**30:.2f} GiB), such as {left_out[0]}, "
            "are left out"
        )
