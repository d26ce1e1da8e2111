"""Every request field of OpenAI, vLLM, llama.cpp and other local servers that lowmem does not use.

A field that would change the answer is refused by name, with the next step; a value that asks for nothing
passes. A field that changes no answer is accepted. A field that is in neither table is refused as unknown, as
in OpenAI's API, because nobody can say that it would change nothing; `--ignore-field` lets it pass.

`protocol` has the fields that are used. `python -m tests.docs.fields` writes the tables in docs/serve.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem.server.api_errors import ApiError, invalid, short

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_BOTH = (CHAT, TEXT)
_EMPTY: tuple[object, ...] = (None, "", [], {})


@dataclass(frozen=True)
class Refused:
    """Fields that would change the answer."""

    names: tuple[str, ...]
    what: str
    """What they ask for."""
    advice: str = "Leave it out"
    """The next step."""
    neutral: tuple[object, ...] = ()
    """Values that change nothing, besides null and empty ones."""
    routes: tuple[str, ...] = _BOTH

    def asks_nothing(self, value: object) -> bool:
        """Whether a value changes nothing."""
        return any(_same(value, other) for other in (*_EMPTY, *self.neutral))

    def error(self, name: str) -> ApiError:
        """The refusal of the field."""
        return invalid(
            f"{name} is not supported by this server. {self.advice}", name, "unsupported_parameter"
        )


@dataclass(frozen=True)
class Accepted:
    """Fields that change no answer."""

    names: tuple[str, ...]
    why: str
    routes: tuple[str, ...] = _BOTH


_STRUCTURED = "Use response_format or structured_outputs"
_TEMPLATE = "Use chat_template_kwargs if the model's chat template has such an argument"

REFUSED = (
    Refused(
        (
            "guided_whitespace_pattern",
            "structural_tag",
            "grammar_triggers",
            "regex",
            "ebnf",
            "format",
        ),
        "structured output",
        _STRUCTURED,
    ),
    Refused(
        ("function_call",),
        "a forced tool",
        "Use tools and tool_choice",
        ("auto", "none"),
        (CHAT,),
    ),
    Refused(("parse_tool_calls",), "tool calls as text", 'Use tool_choice: "none"', (True,)),
    Refused(("grammar_lazy",), "a grammar for a part of the answer", neutral=(False,)),
    Refused(
        ("custom_token_bans", "banned_tokens", "banned_strings"),
        "forbidden tokens",
        "Use logit_bias with -100",
    ),
    Refused(("bad_words",), "forbidden words", "Use logit_bias with -100 for the ids of tokens"),
    Refused(("allowed_token_ids",), "an answer of given tokens"),
    Refused(
        ("repeat_penalty",),
        "a repetition penalty on the last `repeat_last_n` tokens",
        "Use repetition_penalty, which applies to all tokens",
        (1,),
    ),
    Refused(("repetition_penalty_range", "no_repeat_ngram_size"), "other repetition penalties", neutral=(0,)),
    Refused(("encoder_repetition_penalty",), "other repetition penalties", neutral=(1,)),
    Refused(("penalize_nl", "penalty_prompt"), "other repetition penalties", neutral=(False,)),
    Refused(
        ("stop_token_ids",),
        "token ids that end the answer",
        "Use stop with the texts of the tokens; special tokens may be spelled",
    ),
    Refused(("ignore_eos", "ban_eos_token"), "answers beyond their end", neutral=(False,)),
    Refused(("min_tokens", "min_length", "min_new_tokens"), "a least length", neutral=(0,)),
    Refused(("include_stop_str_in_output", "no_stop_trim"), "the stop text in the answer", neutral=(False,)),
    Refused(("skip_special_tokens",), "special tokens in the answer", neutral=(True,)),
    Refused(
        ("continue_final_message",),
        "an answer that the request begins",
        "Write the dialogue as text, and send it to /v1/completions",
        (False,),
        (CHAT,),
    ),
    Refused(
        ("add_generation_prompt",),
        "a prompt without the opening of the answer",
        "Write the dialogue as text, and send it to /v1/completions",
        (True,),
        (CHAT,),
    ),
    Refused(("echo",), "the last message before the answer", neutral=(False,), routes=(CHAT,)),
    Refused(("suffix",), "infilling", "Use /v1/completions", routes=(CHAT,)),
    Refused(("chat_template", "documents"), "another chat template or its documents", routes=(CHAT,)),
    Refused(("template", "system", "system_prompt"), "another prompt", "Send it in messages or prompt"),
    Refused(("raw",), "another prompt", "Use /v1/completions", (False,)),
    Refused(("context",), "Ollama's state of a dialogue", "Send the messages"),
    Refused(
        ("add_special_tokens", "add_bos_token"),
        "special tokens around the prompt",
        "Send token ids to /v1/completions",
        (False,),
        (CHAT,),
    ),
    Refused(
        ("add_special_tokens", "add_bos_token"),
        "a prompt without its special tokens",
        "Send token ids",
        (True,),
        (TEXT,),
    ),
    Refused(
        ("reasoning_effort", "reasoning", "thinking", "think", "enable_thinking", "thinking_token_budget"),
        "a length of reasoning",
        _TEMPLATE,
    ),
    Refused(("thinking_budget_tokens", "reasoning_budget"), "a length of reasoning", neutral=(-1,)),
    Refused(("thinking_forced_open", "reasoning_in_content"), "a reading of reasoning", neutral=(False,)),
    Refused(("include_reasoning", "separate_reasoning"), "answers without reasoning", neutral=(True,)),
    Refused(("reasoning_format",), "a reading of reasoning", neutral=("none", "auto")),
    Refused(("verbosity",), "a length of the answer", "Ask for it in the prompt", ("medium",)),
    Refused(("modalities",), "sound or pictures", "Send and expect text", (["text"],)),
    Refused(("audio", "images", "image_data", "multimodal_data"), "sound or pictures", "Send text"),
    Refused(("mm_processor_kwargs", "media_io_kwargs", "prompt_embeds"), "sound or pictures", "Send text"),
    Refused(("web_search_options", "plugins", "moderation"), "services of a provider"),
    Refused(("transforms",), "a shortened prompt", "Shorten the messages"),
    Refused(("truncate_prompt_tokens", "truncate"), "a shortened prompt", "Shorten the prompt"),
    Refused(
        ("prompt_logprobs",), "log-probabilities of the prompt", "Use echo and logprobs of /v1/completions"
    ),
    Refused(("n_probs",), "log-probabilities", "Use logprobs", (0,)),
    Refused(("post_sampling_probs",), "probabilities after the filters", "Use logprobs", (False,)),
    Refused(("logprob_token_ids",), "log-probabilities of given tokens"),
    Refused(
        ("return_token_ids", "return_tokens_as_token_ids", "return_tokens", "return_token_offsets"),
        "token ids in the response",
        neutral=(False,),
    ),
    Refused(("return_prompt_text", "details", "return_full_text"), "more in the response", neutral=(False,)),
    Refused(("top_logprobs",), "log-probabilities", "Use logprobs: N", (0,), (TEXT,)),
    Refused(("max_completion_tokens",), "a limit of the answer", "Use max_tokens", routes=(TEXT,)),
    Refused(("messages",), "a dialogue", "Send it to /v1/chat/completions", routes=(TEXT,)),
    Refused(("prompt",), "a text to continue", "Send it to /v1/completions", routes=(CHAT,)),
    Refused(("max_new_tokens", "num_predict"), "a limit of the answer", "Use max_tokens", (-1,)),
    Refused(
        ("t_max_predict_ms", "t_max_prompt_ms"), "a time limit", "Start the server with --time-limit", (0, -1)
    ),
    Refused(("n_indent",), "a limit by indentation", neutral=(0,)),
    Refused(("num_ctx",), "another context", "Start the server with --context"),
    Refused(("options", "vllm_xargs", "extra_body"), "fields inside a field", "Send them beside the others"),
    Refused(("best_of",), "the best of several answers", "Use n", (1,), (CHAT,)),
    Refused(("use_beam_search", "early_stopping"), "beam search", neutral=(False,)),
    Refused(("num_beams", "length_penalty"), "beam search", neutral=(1,)),
    Refused(("do_sample",), "greedy answers", "Use temperature: 0", (True,)),
    Refused(("typical_p", "typical", "typ_p", "tfs_z", "tfs"), "other filters", "Use top_p or min_p", (1,)),
    Refused(
        (
            "xtc_probability",
            "dry_multiplier",
            "mirostat",
            "mirostat_mode",
            "dynatemp_range",
            "top_a",
            "min_keep",
        ),
        "other samplers",
        "Use top_p or min_p",
        (0,),
    ),
    Refused(
        ("smoothing_factor", "penalty_alpha", "epsilon_cutoff", "eta_cutoff"), "other samplers", neutral=(0,)
    ),
    Refused(("top_n_sigma", "nsigma", "adaptive_target"), "other samplers", "Use top_p or min_p", (0, -1)),
    Refused(("samplers", "sampler_priority", "sampler_order"), "another order of samplers"),
    Refused(
        ("dynamic_temperature", "temperature_last", "watermark", "watermarking"),
        "other samplers",
        neutral=(False,),
    ),
    Refused(("guidance_scale", "cfg_scale"), "guidance by a second prompt", neutral=(1,)),
    Refused(("negative_prompt", "repetition_detection"), "guidance by a second prompt"),
    Refused(("lora", "lora_request", "adapter", "adapter_id"), "another version of the weights"),
    Refused(("kv_transfer_params", "ec_transfer_params"), "another server's cache"),
)

ACCEPTED = (
    Accepted(
        ("user", "metadata", "store", "service_tier", "safety_identifier", "request_id", "session_id"),
        "names of the request and its user",
    ),
    Accepted(
        ("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "cache_prompt", "cache_salt"),
        "the prefix cache changes no answer",
    ),
    Accepted(("n_cache_reuse", "n_keep", "n_discard", "id_slot", "slot_id"), "the cache changes no answer"),
    Accepted(
        ("priority", "keep_alive", "ttl", "provider", "models", "route"), "where and when the model runs"
    ),
    Accepted(("prediction", "draft_model", "backend_sampling"), "speculation changes no answer"),
    Accepted(
        ("speculative.n_max", "speculative.n_min", "speculative.p_min"), "speculation changes no answer"
    ),
    Accepted(
        ("timings_per_token", "return_progress", "usage", "stream_interval", "response_fields", "verbose"),
        "figures and chunks; `usage` is always there",
    ),
    Accepted(("guided_decoding_backend",), "llguidance follows grammars"),
    Accepted(("spaces_between_special_tokens",), "special tokens are not in the answer"),
    Accepted(("truncation_side",), "belongs to `truncate_prompt_tokens`"),
    Accepted(("repeat_last_n", "xtc_threshold", "dynatemp_exponent"), "belong to fields that are refused"),
    Accepted(
        ("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"),
        "belong to `dry_multiplier`",
    ),
    Accepted(
        (
            "mirostat_tau",
            "mirostat_eta",
            "adaptive_decay",
            "dynatemp_low",
            "dynatemp_high",
            "smoothing_curve",
        ),
        "belong to samplers that are refused",
    ),
    Accepted(("preserved_tokens", "chat_format"), "belong to `grammar`"),
)


_ROWS: Mapping[tuple[str, str], Refused | Accepted] = {
    (route, name): row for row in (*REFUSED, *ACCEPTED) for name in row.names for route in row.routes
}


def check_others(
    fields: Mapping[str, Any],
    route: str,
    ignored: Collection[str] = (),
    *,
    first: Sequence[Refused | Accepted] = (),
) -> None:
    """Raise ApiError for the first field that asks for something that lowmem does not do.

    fields: those of a request to `route` that its schema does not have. ignored: names that pass. first: rows
    that take the place of the route's.
    """
    own = {name: row for row in first for name in row.names}
    for name, value in fields.items():
        row = own.get(name) or _ROWS.get((route, name))
        if name in ignored or isinstance(row, Accepted):
            continue
        if row is None:
            if not any(_same(value, other) for other in _EMPTY):
                raise _unknown(name)
        elif not row.asks_nothing(value):
            raise row.error(name)


def _unknown(name: str) -> ApiError:
    return invalid(
        f"{short(name)!r} is not a field of this API. Leave it out, or start the server with "
        "--ignore-field NAME if it changes no answer",
        short(name),
        "unknown_parameter",
    )


def _same(value: object, other: object) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)
