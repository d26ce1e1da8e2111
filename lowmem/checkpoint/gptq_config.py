"""The settings of a GPTQ checkpoint, as every tool writes them → how each linear is stored. Needs no torch.

AutoGPTQ and GPTQ-for-LLaMa write quantize_config.json; GPTQModel, optimum and transformers write the
`quantization_config` of config.json; AutoRound writes it under names of its own. Some tools write numbers as
strings, and flags as null. packed_headers.py compares the result with the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowmem.checkpoint.foreign import HINT, foreign_method
from lowmem.checkpoint.formats import LAYOUTS, FormatException, LinearFormat, QuantizationFormat
from lowmem.config import BITS
from lowmem.errors import ForeignError, SourceError

_READABLE = "Only GPTQ checkpoints of 2 to 8 bits can be read"
_AUTO_ROUND = ("auto-round", "auto_round", "autoround", "intel/auto-round")
_KERNELS = frozenset(("exllama", "exllamav2", "triton", "tritonv2", "torch", "ipex", "hpu"))
"""Names of kernels, which AutoRound once wrote after the layout ("auto_round:exllamav2")."""
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}
_MOST_BITS = 16
"""From this width on, a linear is not quantized."""


@dataclass(frozen=True)
class _Settings:
    """An object of settings: every value is taken in any spelling, or refused by its name."""

    data: Mapping[str, Any]
    origin: str
    """The name of the file, and of the entry in it, for messages."""

    def refuse(self, problem: str, hint: str = _READABLE) -> SourceError:
        """The error for a setting that cannot be used."""
        return ForeignError(f"{self.origin}: {problem}", hint)

    def first(self, *names: str) -> Any:
        """The first of these keys that is present and not null; None without one."""
        return next((self.data[name] for name in names if self.data.get(name) is not None), None)

    def whole(self, default: int | None, *names: str) -> int:
        """A whole number, also as a string or as 4.0. default: without the key; None: the key is needed."""
        value = self.first(*names)
        if value is None and default is not None:
            return default
        text = "" if isinstance(value, bool) else str(value).strip()
        if not re.fullmatch(r"-?\d{1,9}(\.0)?", text, re.ASCII):
            raise self.refuse(f"{names[0]} is {short(value)}")
        return int(text.removesuffix(".0"))

    def flag(self, default: bool, name: str) -> bool:
        """A boolean, also as a string or as 0 and 1; without the key, or where it is null, the default."""
        value = self.data.get(name)
        if value is None:
            return default
        found = _BOOLEANS.get(str(value).strip().lower())
        if found is None:
            raise self.refuse(f"{name} is {short(value)}, neither true nor false")
        return found

    def text(self, default: str, *names: str) -> str:
        """A string in lower case."""
        return str(self.first(*names) or default).lower()

    def objects(self, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The items of an object whose values are objects; none where it is null."""
        value = self.data.get(name) or {}
        if not isinstance(value, Mapping):
            raise self.refuse(f"{name} is {short(value)}, not an object")
        for key, item in value.items():
            if item is not None and not isinstance(item, Mapping):
                raise self.refuse(f"{name} has {short(item)} for {short(key)}, not an object")
            yield str(key), item or {}


def parse_quantization(data: Mapping[str, Any], origin: str = "quantization_config") -> QuantizationFormat:
    """How the settings in `data` say that linears are stored.

    origin: the file's name in messages. Raises SourceError for a method, a layout or a value that cannot be
    read, in one line that names it.
    """
    settings = _Settings(data, origin)
    if foreign := foreign_method(data):
        raise foreign.error(origin)
    method = settings.text("", "quant_method", "method")
    if not method and ("desc_act" in data or "damp_percent" in data):
        method = "gptq"  # as early versions of auto-gptq
    auto_round = method in _AUTO_ROUND
    if method != "gptq" and not auto_round:
        name = short(method or "missing")
        raise settings.refuse(f"quant_method is {name}, which lowmem does not read", HINT)
    _check_arithmetic(settings)
    layout = _auto_round_layout(settings) if auto_round else _layout(settings)
    # Without group_size: 128, as transformers and GPTQModel read it; null: no groups, auto-gptq's default.
    groups = -1 if "group_size" in data and data["group_size"] is None else 128
    default = _linear_format(settings, LinearFormat(0, groups, sym=False, layout=layout))
    exceptions = (*_extra_config(settings, default), *_dynamic(settings, default))
    return QuantizationFormat(default, exceptions, _quantizer(settings, auto_round), origin)


def _linear_format(settings: _Settings, default: LinearFormat) -> LinearFormat:
    """`default`, except for what `settings` say. default: its bits are 0 where settings must name them.

    Without `sym`, nothing is promised: the early tools left it out, and stored zero-points of any value.
    """
    bits = settings.whole(default.bits or None, "bits", "wbits", "w_bit")
    if bits not in BITS:
        raise settings.refuse(f"bits is {bits}")
    if bits not in LAYOUTS[default.layout].bits:
        raise settings.refuse(
            f"bits is {bits}, which checkpoint_format {default.layout} does not store, only gptq_p does",
            "The settings are not of these tensors: use the ones that came with them",
        )
    group_size = settings.whole(default.group_size, "group_size", "groupsize", "q_group_size")
    if group_size != -1 and group_size < 1:
        raise settings.refuse(f"group_size is {group_size}")
    return LinearFormat(
        bits,
        group_size,
        sym=settings.flag(default.sym, "sym"),
        desc_act=settings.flag(default.desc_act, "desc_act"),
        layout=default.layout,
    )


def _layout(settings: _Settings) -> str:
    layout = settings.text("gptq", "checkpoint_format", "format")
    if layout not in LAYOUTS or settings.flag(False, "is_marlin_format"):
        raise settings.refuse(
            f"checkpoint_format is {short('marlin' if layout in LAYOUTS else layout)}",
            f"Only the formats {', '.join(LAYOUTS)} can be read: use such a copy, or convert the original",
        )
    return layout


def _auto_round_layout(settings: _Settings) -> str:
    """`packing_format` (before 2025 `backend`), such as "auto_round:auto_gptq": that is v1.

    "auto_round" and "auto_round:gptqmodel" store zero-points as they are, which is v2.
    """
    packing = settings.text("auto", "packing_format", "backend")
    packing = "auto_round:auto_gptq" if packing == "auto" else packing
    family, *rest = packing.replace("autoround", "auto_round").replace("auto-round", "auto_round").split(":")
    words = set(rest) - _KERNELS
    if family == "auto_gptq" or (family == "auto_round" and words and words <= {"auto_gptq", "gptq"}):
        return "gptq"
    if family == "auto_round" and words <= {"gptqmodel"}:
        return "gptq_v2"
    awq = ", which is AWQ's layout" if any("awq" in word for word in words) else ""
    raise settings.refuse(f"packing_format is {short(packing)}{awq}", HINT)


def _check_arithmetic(settings: _Settings) -> None:
    """Refuse settings with which the same tensors mean something else."""
    pack_dtype = settings.text("int32", "pack_dtype").removeprefix("torch.")
    if pack_dtype != "int32":
        raise settings.refuse(f"pack_dtype is {short(pack_dtype)}", "Only int32 words can be read")
    data_type = settings.text("int", "data_type")
    if data_type not in ("int", "int_sym", "int_asym"):
        raise settings.refuse(f"data_type is {short(data_type)}", "Only integers can be read")
    if settings.whole(_MOST_BITS, "act_bits") < _MOST_BITS:
        raise settings.refuse(
            f"activations are quantized (act_bits is {short(settings.data['act_bits'])})",
            "Use a version with 16-bit activations",
        )
    for name in ("rotation", "rotation_config", "spinquant_config"):
        if settings.data.get(name):
            raise settings.refuse(
                f"the weights are rotated ({name})", "Use a version without rotation, or convert the original"
            )


def _dynamic(settings: _Settings, default: LinearFormat) -> Iterator[FormatException]:
    """GPTQModel's `dynamic`: "-:regex" leaves linears in 16 bits, "+:regex" or "regex" overrides settings."""
    for key, value in settings.objects("dynamic"):
        pattern = key[2:] if key.startswith(("+:", "-:")) else key
        if key.startswith("-:"):
            yield FormatException(pattern, None)
        else:
            yield _override(settings, "dynamic", pattern, value, default)


def _extra_config(settings: _Settings, default: LinearFormat) -> Iterator[FormatException]:
    """AutoRound's `extra_config`: names of linears come first, then regular expressions, found anywhere."""
    names: list[FormatException] = []
    patterns: list[FormatException] = []
    for key, value in settings.objects("extra_config"):
        if re.fullmatch(r"[\w.-]+", key, re.ASCII):
            names.append(_override(settings, "extra_config", re.escape(key) + "$", value, default))
        pattern = key[1:] if key.startswith("^") else f".*{key}"
        patterns.append(_override(settings, "extra_config", pattern, value, default))
    yield from (*names, *patterns)


def _override(
    settings: _Settings, entry: str, pattern: str, value: Mapping[str, Any], default: LinearFormat
) -> FormatException:
    own = _Settings(value, f"{settings.origin}: {entry} {short(pattern)}")
    if own.whole(default.bits, "bits", "wbits", "w_bit") >= _MOST_BITS:
        return FormatException(pattern, None)
    exception = FormatException(pattern, _linear_format(own, default))
    if not exception.is_supported:  # which linears it means is unknown
        raise settings.refuse(
            f"the pattern {short(pattern)} in {entry} is not evaluated, since it may take forever",
            "Write it with literals, classes, plain groups of alternatives and .* alone",
        )
    return exception


def _quantizer(settings: _Settings, auto_round: bool) -> tuple[str, ...]:
    meta = settings.data.get("meta")
    names = meta.get("quantizer") if isinstance(meta, Mapping) else None
    found = [str(name) for name in (names if isinstance(names, list) else [names]) if name]
    if auto_round or settings.text("", "provider") == "auto-round":
        found.append(f"auto-round:{settings.first('autoround_version') or ''}")
    return tuple(found)


def short(value: object) -> str:
    """A value from a file, shortened for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
