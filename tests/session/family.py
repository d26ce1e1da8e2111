"""Small replicas of StarChat's family: each in the layout that its repository publishes, with random weights.

`source` says where the settings were read. "page" is a page of the hub that shows the file (owner/name and
file); gated repositories were read through an unchanged copy or a fine-tune, which is then named. What was
not found is named there, too, and is then written as the family's other repositories have it.

Kept as published: every setting of config.json that changes the computation, special tokens and their order,
generation settings, whether a chat template is there, and where known the kind, dtype and number of weight
files. Smaller: widths, layers, and the vocabulary, whose ordinary tokens are the 256 bytes. The number of
heads is smaller where `heads` says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.helpers import embedding_name, write_weights

STARCODER = [
    *("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<filename>"),
    *("<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>"),
    *("<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>", "<commit_before>"),
    *("<commit_msg>", "<commit_after>", "<reponame>"),
]
"""Page bigcode/tiny_starcoder_py, special_tokens_map.json; its order is that of the ids."""
STARCODER2 = [
    *("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<repo_name>"),
    *("<file_sep>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>"),
    *("<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>"),
    *("<code_to_intermediate>", "<intermediate_to_code>", "<pr>", "<pr_status>", "<pr_is_merged>"),
    *("<pr_base>", "<pr_file>", "<pr_base_code>", "<pr_diff>", "<pr_diff_hunk>", "<pr_comment>"),
    *("<pr_event_id>", "<pr_review>", "<pr_review_state>", "<pr_review_comment>"),
    *("<pr_in_reply_to_review_id>", "<pr_in_reply_to_comment_id>", "<pr_diff_hunk_comment_line>"),
    *("<NAME>", "<EMAIL>", "<KEY>", "<PASSWORD>"),
]
"""Page bigcode/starcoder2-7b, special_tokens_map.json."""
SANTACODER = ["<|endoftext|>", "<fim-prefix>", "<fim-middle>", "<fim-suffix>", "<fim-pad>"]
"""Pages bigcode/santacoder and bigcode/gpt_bigcode-santacoder, special_tokens_map.json; ids from 49152 on."""
CHAT = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
"""Page michaelfeil/ct2fast-starchat-beta, added_tokens.json: ids 49152 to 49155; Alpha's are the same."""
NAMED = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
END_0 = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 0, "transformers_version": "4.28.1"}
"""Pages michaelfeil/ct2fast-starchat-alpha and bigcode/tiny_starcoder_py, generation_config.json."""
END_50256 = {**END_0, "bos_token_id": 50256, "eos_token_id": 50256}
"""Page bigcode/starcoder2-15b, generation_config.json as first published: ids beyond its vocabulary."""

_TRAINING: dict[str, Any] = {
    **{"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.02},
    **{"layer_norm_epsilon": 1e-05, "scale_attn_weights": True, "summary_activation": None},
    **{"summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index"},
    **{"summary_use_proj": True, "use_cache": True},
}
_BIGCODE: dict[str, Any] = {
    **_TRAINING,
    "model_type": "gpt_bigcode",
    "architectures": ["GPTBigCodeForCausalLM"],
    "multi_query": True,
    "attention_softmax_in_fp32": True,
    "scale_attention_softmax_in_fp32": True,
}
_RUNNER: dict[str, Any] = {
    **{"inference_runner": 0, "max_batch_size": None, "max_sequence_length": None},
    **{"pad_key_length": True, "pre_allocate_kv_cache": False, "validate_runner_input": True},
}
GELU: dict[str, Any] = {**_BIGCODE, **_RUNNER, "activation_function": "gelu", "n_positions": 8192}
TANH: dict[str, Any] = {**GELU, "activation_function": "gelu_pytorch_tanh"}
SECOND: dict[str, Any] = {
    **{"model_type": "starcoder2", "architectures": ["Starcoder2ForCausalLM"], "use_cache": True},
    **{"hidden_act": "gelu_pytorch_tanh", "use_bias": True, "norm_type": "layer_norm", "mlp_type": "default"},
    **{"norm_epsilon": 1e-05, "sliding_window": 4096, "max_position_embeddings": 16384},
}


@dataclass(frozen=True)
class Published:
    """What a model's repository holds, at small widths."""

    source: str
    config: Mapping[str, Any]
    tokens: Sequence[str]
    """Special tokens at the start of the vocabulary."""
    added: Sequence[str] = ()
    """Special tokens behind it."""
    extra: Sequence[str] = ()
    """`additional_special_tokens` of special_tokens_map.json, where they are not all of the above."""
    declared: Mapping[str, str] | None = None
    """`bos_token` and its like, in tokenizer_config.json and special_tokens_map.json; None: as `NAMED`."""
    generation: Mapping[str, Any] | None = None
    """generation_config.json; None: the repository has none."""
    weights: tuple[str, int] = ("safetensors", 1)
    """Kind and number of the weight files."""
    dtype: torch.dtype = torch.float32
    heads: int = 4
    """Published: 48 of the 15B models, 16 of 1b and of SantaCoder, 32 of 7b; the others' are their own."""
    head_dim: int = 16
    kv_heads: int = 1
    padding: int = 0
    """Rows of the embedding without a token."""
    first_layout: bool = False
    """SantaCoder's first: queries apart from keys and values, weights [in, out], and GPT-2's masks."""


FAMILY = {
    "starchat-alpha": Published(
        "page HuggingFaceH4/starchat-alpha, config.json and the list of files; generation_config.json: page "
        "michaelfeil/ct2fast-starchat-alpha. special_tokens_map.json not found: taken as Beta's.",
        {**GELU, "torch_dtype": "float16"},
        STARCODER,
        CHAT,
        extra=CHAT,
        generation=END_0,
        weights=("bin", 4),
        dtype=torch.float16,
        heads=6,
    ),
    "starchat-beta": Published(
        "page tina1111/starchat-beta-sharded-bf16, config.json (a copy in bfloat16); list of files: page "
        "HuggingFaceH4/starchat-beta; special_tokens_map.json: page TheBloke/starchat-beta-GPTQ. Which "
        "16-bit dtype the original's 4 files have was not found.",
        {**GELU, "torch_dtype": "bfloat16"},
        STARCODER,
        CHAT,
        extra=CHAT,
        generation=END_0,
        weights=("safetensors", 4),
        dtype=torch.bfloat16,
        heads=6,
    ),
    "starcoder": Published(
        "page bigcode/starcoder-co-format, config.json (a fine-tune by its makers); weight files not found.",
        GELU,
        STARCODER,
        generation=END_0,
        heads=6,
    ),
    "starcoderbase": Published(
        "page seyyedaliayati/starcoder-solidity, config.json (a fine-tune); weight files: 7 .bin files, "
        "README.md of bigcode-project/octopack.",
        GELU,
        STARCODER,
        generation=END_0,
        weights=("bin", 7),
        heads=6,
    ),
    "starcoderbase-1b": Published(
        "page Xenova/starcoderbase-1b, config.json (a copy); weight files not found.",
        TANH,
        STARCODER,
        generation=END_0,
    ),
    "starcoderbase-3b": Published(
        "page refactai/starcoderbase-3b, config.json (a copy): float32, n_head 22, n_embd 2816; weight files "
        "not found.",
        {**TANH, "torch_dtype": "float32"},
        STARCODER,
        generation=END_0,
        heads=22,
    ),
    "starcoderbase-7b": Published(
        "page tina1111/starcoderbase-7b-sharded-bf16, config.json (a copy in bfloat16); weight files not "
        "found.",
        GELU,
        STARCODER,
        generation=END_0,
    ),
    "starcoderplus": Published(
        "page openaccess-ai-collective/minotaur-15b, config.json (a fine-tune that kept it); weight files "
        "not found.",
        {**GELU, "torch_dtype": "float32"},
        STARCODER,
        generation=END_0,
        heads=6,
    ),
    "tiny_starcoder_py": Published(
        "page bigcode/tiny_starcoder_py, config.json, generation_config.json, special_tokens_map.json and "
        "the commit that added pytorch_model.bin.",
        {**TANH, "torch_dtype": "float32"},
        STARCODER,
        generation=END_0,
        weights=("bin", 1),
        heads=12,
    ),
    "gpt_bigcode-santacoder": Published(
        "page bigcode/gpt_bigcode-santacoder, config.json and special_tokens_map.json.",
        {
            **_BIGCODE,
            "activation_function": "gelu_pytorch_tanh",
            "n_positions": 2048,
            "runner_max_sequence_length": None,
        },
        (),
        SANTACODER,
        declared={},
        padding=123,
    ),
    "santacoder": Published(
        "page Vipitis/santacoder-finetuned-the-stack-glsl, config.json (a fine-tune that kept it); page "
        "bigcode/santacoder, special_tokens_map.json, modeling_gpt2_mq.py and the list of files, which has "
        "no generation_config.json.",
        {
            **_TRAINING,
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadCustomModel"],
            "activation_function": "gelu_fast",
            "attention_head_type": "multiquery",
            "auto_map": {
                "AutoConfig": "configuration_gpt2_mq.GPT2CustomConfig",
                "AutoModelForCausalLM": "modeling_gpt2_mq.GPT2LMHeadCustomModel",
            },
            "n_positions": 2048,
            "reorder_and_upcast_attn": False,
            "scale_attn_by_inverse_layer_idx": False,
            "torch_dtype": "float32",
        },
        (),
        SANTACODER,
        declared={},
        weights=("bin", 1),
        padding=123,
        first_layout=True,
    ),
    "starcoder2-3b": Published(
        "page bigcode/starcoder2-3b, config.json; 24 heads of which 2 keep keys and values.",
        {**SECOND, "rope_theta": 999999.4420358813},
        STARCODER2,
        generation=END_0,
        heads=24,
        kv_heads=2,
    ),
    "starcoder2-7b": Published(
        "page bigcode/starcoder2-7b, config.json, with keys of gpt_bigcode that nothing reads; 36 heads, 4.",
        {
            **SECOND,
            **{"activation_function": "gelu", "attention_softmax_in_fp32": True, "layer_norm_epsilon": 1e-05},
            **{"scale_attention_softmax_in_fp32": True, "scale_attn_weights": True},
            **{"rope_theta": 1000000, "torch_dtype": "bfloat16"},
        },
        STARCODER2,
        generation=END_0,
        dtype=torch.bfloat16,
        heads=36,
        head_dim=8,
        kv_heads=4,
    ),
    "starcoder2-15b": Published(
        "page bigcode/starcoder2-15b, config.json (with rms_norm_eps) and generation_config.json as first "
        "published; 48 heads, 4; the head is not tied.",
        {
            **SECOND,
            **{"rope_theta": 100000, "rms_norm_eps": 1e-05, "tie_word_embeddings": False},
            "torch_dtype": "float32",
        },
        STARCODER2,
        generation=END_50256,
        heads=48,
        head_dim=8,
        kv_heads=4,
    ),
}


def replica(name: str, folder: Path, always: str | None = None) -> Path:
    """Write a small random checkpoint in the layout of a published one.

    always: the token that the model gives after every other; otherwise its tokens depend on the text.
    """
    published = FAMILY[name]
    folder.mkdir()
    tokenizer = _write_tokenizer(published, folder)
    config = _config(published, tokenizer)
    model = _random_model(config, published, always and tokenizer.convert_tokens_to_ids(always))
    tensors = {key: value.detach().to(published.dtype) for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
        if name == "starchat-alpha":
            tensors["lm_head.weight"] = tensors[embedding_name(model)].clone()
    if published.first_layout:
        tensors = in_first_layout(tensors, config["n_positions"])
    kind, shards = published.weights
    write_weights(tensors, folder, format=kind, shards=shards)
    _write(folder / "config.json", config)
    if published.generation is not None:
        _write(folder / "generation_config.json", published.generation)
    return folder


def transformers_model(folder: Path) -> Any:
    """The replica in transformers, in float32; of the first layout the model that it was made from."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "gpt2":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    second = FAMILY["gpt_bigcode-santacoder"].config
    sizes = {key: config[key] for key in ("n_embd", "n_inner", "n_layer", "n_head", "vocab_size")}
    auto: Any = AutoModelForCausalLM
    made = auto.from_config(AutoConfig.for_model(**{**second, **sizes}), dtype=torch.float32)
    made.load_state_dict(_in_second_layout(torch.load(folder / "pytorch_model.bin")), strict=False)
    return made.eval()


def in_first_layout(tensors: Mapping[str, torch.Tensor], positions: int) -> dict[str, torch.Tensor]:
    """gpt_bigcode's tensors as bigcode/santacoder stores them."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        base, _, part = name.rpartition(".")
        if base.endswith("attn.c_attn"):
            width = tensors[f"{base.removesuffix('c_attn')}c_proj.bias"].shape[0]
            halves = tensor[:width], tensor[width:]
            for half, own in zip(halves, ("q_attn", "kv_attn"), strict=True):
                key = f"{base.removesuffix('c_attn')}{own}.{part}"
                stored[key] = half.t().contiguous() if part == "weight" else half.clone()
        elif base.endswith(("c_proj", "c_fc")) and part == "weight":
            stored[name] = tensor.t().contiguous()
        else:
            stored[name] = tensor
        if base.endswith("ln_1") and part == "bias":
            mask = torch.ones(positions, positions, dtype=torch.uint8).tril()
            stored[f"{base.removesuffix('ln_1')}attn.bias"] = mask.view(1, 1, positions, positions)
            stored[f"{base.removesuffix('ln_1')}attn.masked_bias"] = torch.tensor(-1e4)
    return stored


def _in_second_layout(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {k: v.t() if k.endswith(("c_proj.weight", "c_fc.weight")) else v for k, v in stored.items()}
    for name in [name for name in stored if ".q_attn." in name]:
        both = [tensors.pop(name), tensors.pop(name.replace("q_attn", "kv_attn"))]
        joined = torch.cat([half.t() for half in both]) if name.endswith("weight") else torch.cat(both)
        tensors[name.replace("q_attn", "c_attn")] = joined
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    return tensors


def _config(published: Published, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    width = published.heads * published.head_dim
    if published.config["model_type"] == "starcoder2":
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": published.heads, "num_key_value_heads": published.kv_heads}
    else:
        sizes = {"n_embd": width, "n_inner": 4 * width, "n_layer": 2, "n_head": published.heads}
    eos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = {"vocab_size": len(tokenizer) + published.padding, "bos_token_id": eos, "eos_token_id": eos}
    return {**published.config, **sizes, **ids}


def _random_model(config: Mapping[str, Any], published: Published, always: int | None) -> Any:
    settings = dict(config)
    if published.first_layout:
        settings |= FAMILY["gpt_bigcode-santacoder"].config
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 * min(1.0, 8 * parameter.shape[-1] ** -0.5) if parameter.dim() == 2 else 0.1
            parameter.copy_(torch.randn(parameter.shape) * scale)
        if always is not None:
            second = config["model_type"] == "starcoder2"
            norm = model.model.norm if second else model.transformer.ln_f
            model.get_output_embeddings().weight[always] += 10
            norm.bias.fill_(10)
    return model


def _write_tokenizer(published: Published, folder: Path) -> PreTrainedTokenizerFast:
    vocabulary = [*published.tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: at for at, token in enumerate(vocabulary)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*published.tokens, *published.added])
    backend.save(str(folder / "tokenizer.json"))
    declared = dict(NAMED if published.declared is None else published.declared)
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    length = {"model_max_length": 2048 if published.added == SANTACODER else 8192}
    _write(folder / "tokenizer_config.json", settings | length | declared)
    special = list(published.extra or [*published.tokens, *published.added])
    _write(folder / "special_tokens_map.json", {"additional_special_tokens": special, **declared})
    if published.added == CHAT:
        first = len(vocabulary)
        _write(folder / "added_tokens.json", {token: first + at for at, token in enumerate(CHAT)})
    found: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
    return found


def _write(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2))
