"""SantaCoder's first layout, read as the gpt_bigcode model that it is: its config, and its tensors' headers.

bigcode/santacoder and its fine-tunes name model type gpt2 and a class of their own. Keys and values have one
head, in `attn.kv_attn` beside the queries' `attn.q_attn`, and every linear is a Conv1D, which stores its
weight [in, out]. The same weights were published again as bigcode/gpt_bigcode-santacoder: queries, keys and
values in one `attn.c_attn`, and weights [out, in]. Text Generation Inference maps the one to the other in the
same way (flash_santacoder_modeling.py). The class beside the weights is never run. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lowmem.errors import ArchitectureError

if TYPE_CHECKING:
    from lowmem.checkpoint.headers.folder import TensorHeader

QUERIES, KEYS_AND_VALUES, JOINED = "attn.q_attn", "attn.kv_attn", "attn.c_attn"
TRANSPOSED = ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")
"""Linears that have the same name in both layouts."""
_TANH = ("gelu_fast", "gelu_new", "gelu_pytorch_tanh")
"""Spellings of one function; it is also the default of both config classes."""
_OWN_KEYS = frozenset(
    ("attention_head_type", "auto_map", "reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx")
)
"""Keys that gpt_bigcode does not have."""


def is_first_layout(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of SantaCoder's first layout."""
    return config.get("model_type") == "gpt2" and config.get("attention_head_type") == "multiquery"


def as_gpt_bigcode(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the first layout with the keys of bigcode/gpt_bigcode-santacoder.

    Raises ArchitectureError for a setting that gpt_bigcode does not compute, and no published model has.
    """
    if config.get("scale_attn_by_inverse_layer_idx") is True:
        raise ArchitectureError(
            "config.json sets scale_attn_by_inverse_layer_idx, which only the code beside its weights does",
            "Use bigcode/santacoder or bigcode/gpt_bigcode-santacoder",
        )
    kept = {key: value for key, value in config.items() if key not in _OWN_KEYS}
    activation = config.get("activation_function", _TANH[0])
    return {
        **kept,
        "model_type": "gpt_bigcode",
        "architectures": ["GPTBigCodeForCausalLM"],
        "activation_function": "gelu_pytorch_tanh" if activation in _TANH else activation,
        "multi_query": True,
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
    }


def has_first_names(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether tensors of these names are of the first layout. config: as `read_config` returns it."""
    return config.get("model_type") == "gpt_bigcode" and any(f"{KEYS_AND_VALUES}." in name for name in names)


def joined_headers(headers: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """The headers of the first layout's tensors under the names, and in the shapes, of gpt_bigcode.

    A tensor whose other half is not there keeps its name, as one that the model does not know.
    """
    joined: dict[str, TensorHeader] = {}
    for name, header in headers.items():
        base, _, part = name.rpartition(".")
        if base.endswith(QUERIES) and part in ("weight", "bias"):
            own = base.removesuffix(QUERIES) + JOINED
            other = headers.get(f"{base.removesuffix(QUERIES)}{KEYS_AND_VALUES}.{part}")
            if other is not None:
                joined[f"{own}.{part}"] = _join(f"{own}.{part}", header, other)
                continue
        elif base.endswith(KEYS_AND_VALUES) and part in ("weight", "bias"):
            if f"{base.removesuffix(KEYS_AND_VALUES)}{QUERIES}.{part}" in headers:
                continue
        elif part == "weight" and base.endswith(TRANSPOSED):
            joined[name] = replace(header, shape=header.shape[::-1], begin=None)
            continue
        joined[name] = header
    return joined


def _join(name: str, queries: TensorHeader, others: TensorHeader) -> TensorHeader:
    """A weight [in, a] and a weight [in, b] as one [a + b, in]; biases one after the other."""
    outputs = (queries.shape[-1:] or (0,))[0] + (others.shape[-1:] or (0,))[0]
    nbytes = queries.nbytes + others.nbytes
    return replace(queries, name=name, shape=(outputs, *queries.shape[:-1]), nbytes=nbytes, begin=None)
