"""Chat templates as families publish them: which one is meant, and at which token an answer ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowmem.checkpoint.source.read_tokenizer import read_folder_tokenizer
from lowmem.errors import SourceError
from lowmem.models.dialogue import end_token_ids
from lowmem.models.template import apply_template, check_template, chosen_template
from lowmem.models.turn_end import turn_end_ids

LOOP = "{%% for m in messages %%}%s{%% endfor %%}{%% if add_generation_prompt %%}%s{%% endif %%}"
CHATML = LOOP % (
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}",
    "{{ '<|im_start|>assistant\n' }}",
)
ALTERNATE = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
# family: (special tokens, eos of its config, template in its published form, the token that ends a turn)
FAMILIES: dict[str, tuple[list[str], str, str, str]] = {
    "chatml": (["<|im_start|>", "<|im_end|>"], "<|endoftext|>", CHATML, "<|im_end|>"),
    "llama 3": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
        "<|end_of_text|>",
        "{% set loop_messages = messages %}{% for m in loop_messages %}"
        "{% set content = '<|start_header_id|>' + m['role']"
        " + '<|end_header_id|>\n\n'+ m['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|eot_id|>",
    ),
    "gemma": (
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "<eos>",
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        + LOOP
        % (
            "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
            "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}",
            "{{'<start_of_turn>model\n'}}",
        ),
        "<end_of_turn>",
    ),
    "phi 3": (
        ["<|user|>", "<|assistant|>", "<|end|>"],
        "<|endoftext|>",
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
    ),
    "command r": (
        ["<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"],
        "<|endoftext|>",
        "{{ bos_token }}"
        + LOOP
        % (
            "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + m['content'].strip() + '<|END_OF_TURN_TOKEN|>'"
            " }}",
            "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}",
        ),
        "<|END_OF_TURN_TOKEN|>",
    ),
    "command r 7b": (  # two tokens: the first closes the response, the second the turn
        ["<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"],
        "<|endoftext|>",
        LOOP % ("{{ '<|START_RESPONSE|>' + m['content'] + '<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' }}", ""),
        "<|END_OF_TURN_TOKEN|>",
    ),
    "mistral": (
        ["<s>", "</s>", "[INST]", "[/INST]"],
        "</s>",
        ALTERNATE + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "deepseek": (
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
        "<｜end▁of▁sentence｜>",
        LOOP
        % (
            "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% else %}"
            "{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1]"
            " + '<｜end▁of▁sentence｜>' }}{% endif %}",
            "{{ '<｜Assistant｜>' }}",
        ),
        "<｜end▁of▁sentence｜>",
    ),
    "harmony": (  # <|end|> ends the analysis inside an answer, <|return|> the answer
        ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"],
        "<|return|>",
        LOOP
        % (
            "{% if m['role'] == 'user' %}{{ '<|start|>user<|message|>' + m['content'] + '<|end|>' }}"
            "{% elif loop.last %}{{ '<|start|>assistant<|channel|>final<|message|>'"
            " + m['content'] + '<|return|>' }}"
            "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>'"
            " + m['content'] + '<|end|>' }}{% endif %}",
            "{{ '<|start|>assistant' }}",
        ),
        "<|return|>",
    ),
    "glm": (  # a turn ends where the next begins
        ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>"],
        "<|endoftext|>",
        "[gMASK]<sop>" + LOOP % ("{{ '<|' + m['role'] + '|>\n' + m['content'] }}", "{{ '<|assistant|>' }}"),
        "<|user|>",
    ),
    "parts only": (  # of vision models, whose templates select the text parts of a list
        ["<|im_start|>", "<end_of_utterance>"],
        "<|endoftext|>",
        LOOP
        % (
            "<|im_start|>{{ m.role }}:{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
            "{{ part.text }}{% endfor %}<end_of_utterance>\n",
            "assistant:",
        ),
        "<end_of_utterance>",
    ),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def make_tokenizer(specials: list[str], eos: str, template: Any = None) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, with special tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(dict.fromkeys(["<|endoftext|>", eos, *specials])))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=specials[0])
    tokenizer.chat_template = template
    return tokenizer


def of_family(family: str) -> tuple[PreTrainedTokenizerFast, str]:
    specials, eos, template, end = FAMILIES[family]
    return make_tokenizer(specials, eos, template), end


@each_family
def test_an_answer_ends_at_the_token_that_the_template_puts_after_it(family: str) -> None:
    tokenizer, end = of_family(family)
    number = tokenizer.convert_tokens_to_ids(end)
    assert turn_end_ids(tokenizer) == (number,)
    assert end_token_ids(tokenizer, None, {"eos_token_id": [256]}) == tuple(
        dict.fromkeys([number, tokenizer.eos_token_id, 256])
    )


@each_family
def test_prompts_are_those_of_transformers(family: str) -> None:
    tokenizer, _ = of_family(family)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "  x<|im_end|>"},
    ]
    given = messages
    if family == "parts only":
        given = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    theirs = tokenizer.apply_chat_template(
        given, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    ours = apply_template(tokenizer, messages, add_generation_prompt=True, sanitize_control_tokens=True)
    assert ours == theirs
    assert "hi" in tokenizer.decode(ours)


def test_a_template_without_control_tokens_or_that_fails_ends_nothing() -> None:
    plain = make_tokenizer(["<s>"], "</s>", LOOP % ("{{ m['role'] + ': ' + m['content'] + '\n' }}", ""))
    assert turn_end_ids(plain) == ()
    assert turn_end_ids(make_tokenizer(["<s>"], "</s>", "{{ raise_exception('no') }}")) == ()
    assert turn_end_ids(make_tokenizer(["<s>"], "</s>", "{% if %}")) == ()
    assert turn_end_ids(make_tokenizer(["<s>"], "</s>")) == ()


def test_named_templates_are_chosen_as_transformers_does() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    named = {"default": LOOP % ("d:{{ m.content }}", ""), "tool_use": "t:{{ tools[0].function.name }}"}
    tokenizer = make_tokenizer(["<s>"], "</s>", named)
    message = [{"role": "user", "content": "x"}]
    for given, text in ((None, "d:x"), (tools, "t:f")):
        assert chosen_template(tokenizer, given) == tokenizer.get_chat_template(None, given)
        assert tokenizer.decode(apply_template(tokenizer, message, tools=given)) == text
    tokenizer.chat_template = {"rag": "r", "tool_use": "t"}
    with pytest.raises(ValueError, match="named 'rag', 'tool_use', and none of them 'default'"):
        chosen_template(tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{%- for m in messages %}{%- if m.role == 'x' %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}{%-generation-%}{{ m.content }}{%-endgeneration-%}{% endfor %}",
        "{{ strftime_now('%Y') | length }}{{ messages | tojson(indent=2) }}",
        "{% if enable_thinking is defined and enable_thinking is false %}no{% endif %}{{ messages[0] }}",
    ],
    ids=["break", "generation", "tight generation", "tojson", "thinking"],
)
def test_what_templates_may_use(template: str) -> None:
    check_template(template)
    tokenizer = make_tokenizer(["<s>"], "</s>", template)
    messages = [{"role": "user", "content": "hello"}]
    for options in ({}, {"enable_thinking": False}):
        theirs = tokenizer.apply_chat_template(messages, return_dict=False, **options)
        assert apply_template(tokenizer, messages, **options) == theirs


# ---- the files that hold templates

LIST = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
PLACES: dict[str, tuple[dict[str, Any], Any]] = {
    "a text": ({"tokenizer_config.json": "C"}, "C"),
    "a list": ({"tokenizer_config.json": LIST}, {"default": "D", "tool_use": "T"}),
    "an object": ({"tokenizer_config.json": {"default": "D"}}, {"default": "D"}),
    "a file before the config": ({"tokenizer_config.json": LIST, "chat_template.jinja": "J"}, "J"),
    "named files": (
        {"chat_template.jinja": "J", "additional_chat_templates/tool_use.jinja": "T"},
        {"default": "J", "tool_use": "T"},
    ),
    "the processor's older file": ({"chat_template.json": "P"}, "P"),
    "the processor's config": ({"processor_config.json": "Q", "chat_template.json": "P"}, "Q"),
    "the tokenizer's before the processor's": (
        {"tokenizer_config.json": "C", "processor_config.json": "Q", "chat_template.json": "P"},
        "C",
    ),
    "a file before the processor's": ({"chat_template.jinja": "J", "processor_config.json": "Q"}, "J"),
    "none": ({}, None),
}


def folder_with(tmp_path: Path, files: dict[str, Any]) -> Path:
    folder = tmp_path / "model"
    make_tokenizer(["<s>"], "</s>").save_pretrained(folder)
    for name, value in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        if name.endswith(".jinja"):
            file.write_text(value)
        else:
            data = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps(data | {"chat_template": value}))
    return folder


@pytest.mark.parametrize("place", PLACES)
def test_templates_are_found_where_transformers_looks(tmp_path: Path, place: str) -> None:
    files, expected = PLACES[place]
    folder = folder_with(tmp_path, files)
    assert read_folder_tokenizer(folder).chat_template == expected
    theirs = AutoTokenizer.from_pretrained(folder).chat_template
    assert theirs is None or theirs == expected


@pytest.mark.parametrize("place", PLACES)
def test_templates_travel_with_a_conversion(tmp_path: Path, place: str) -> None:
    """The folder of a conversion is flat; transformers reads the same templates in it."""
    from lowmem.convert.result.templates import store_templates

    files, expected = PLACES[place]
    folder = folder_with(tmp_path, files)
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    (folder / "processor_config.json").unlink(missing_ok=True)
    digests: dict[str, Any] = {path.name: None for path in folder.iterdir()}
    store_templates(folder, expected, digests)
    assert AutoTokenizer.from_pretrained(folder).chat_template == expected
    assert set(digests) == {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("value", [[{"name": "default"}], ["x"], 3, {"default": 1}], ids=repr)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "processor_config.json", "chat_template.json"])
def test_a_malformed_setting_is_named(tmp_path: Path, name: str, value: Any) -> None:
    folder = folder_with(tmp_path, {name: value})
    with pytest.raises(SourceError, match=rf"chat_template in .*{name} is neither"):
        read_folder_tokenizer(folder)


def test_files_of_templates_are_checked_first(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"additional_chat_templates/a.jinja": "A"})
    (tmp_path / "secret").write_text("S")
    link = folder / "additional_chat_templates" / "b.jinja"
    link.symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match="leads out of its folder"):
        read_folder_tokenizer(folder)
    link.unlink()
    link.write_text("x" * (2**22 + 1))
    with pytest.raises(SourceError, match="larger than any chat template"):
        read_folder_tokenizer(folder)
