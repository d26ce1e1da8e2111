"""Render a checkpoint's own chat template safely.

transformers renders it in jinja2's ImmutableSandboxedEnvironment, which gives no access to Python. But a
template is a program, which may loop forever or use up all memory. So its lines and its time are limited
while it runs, powers and products of computed values are refused (a single one could take hours within one
line), and its text is first rendered with a limited address space.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from lowmem.platform import system
from lowmem.text.tokenizing import panics_told

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TEMPLATE = 2**20
"""Characters of a template; long ones have about ten thousand."""
MAX_LINES = 1_000_000
"""Lines that a template may execute; a dialogue of a hundred turns takes about a thousand."""
SECONDS = 5.0
"""CPU time of this thread; some filters process a hundred thousand values in one line."""
MAX_TEXT = 2**22
"""Characters that it may add to those of the messages."""
MEMORY = 2**30
"""Bytes that rendering may take."""
_COUNTS = ("index", "index0", "revindex", "revindex0", "length")
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\b")
_FILE = "<template>"  # the file name of the code that jinja2 compiles a template to


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **options: Any
) -> list[int]:
    """The token ids of messages in the tokenizer's own chat template.

    messages: with "role", "content" and whatever else the template knows. options: further arguments of
    transformers' apply_chat_template; `tools` choose the template named "tool_use" if there is one. Content
    is given as a list of parts to a template that reads nothing else, as those of vision models do. Raises
    whatever the template raises; ValueError or MemoryError when it exceeds the limits above;
    InvalidRequestError when the tokenizer fails.
    """
    shown = {name: options[name] for name in options if name != "sanitize_control_tokens"}
    try:
        text = render_template(tokenizer, messages, **shown)
        whole = all(_shows(text, message) for message in messages)
    except Exception:
        if not _needs_parts(tokenizer, options.get("tools")):
            raise
        whole = False
    if not whole and _needs_parts(tokenizer, options.get("tools")):
        messages = [_in_parts(message) for message in messages]
        render_template(tokenizer, messages, **shown)
    template = chosen_template(tokenizer, options.get("tools"))
    with _counted_lines(), panics_told():
        ids: Any = tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=True, return_dict=False, **options
        )
    return list(ids)


def render_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **options: Any
) -> str:
    """The text of messages in the tokenizer's own chat template; see `apply_template`."""
    template = chosen_template(tokenizer, options.get("tools"))
    check_template(template)
    with system.allow_more_memory(MEMORY), _counted_lines():
        text: Any = tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, **options
        )
    if len(text) > MAX_TEXT + len(repr(messages)) + len(repr(options)):
        raise ValueError(f"it renders the messages to {len(text)} characters")
    return str(text)


def chosen_template(tokenizer: PreTrainedTokenizerBase, tools: Any = None) -> str:
    """The chat template for messages with these tools, as transformers chooses among named ones.

    That is the one named "tool_use" where tools are given and it exists, else "default". Raises ValueError if
    there is none of that name.
    """
    templates: Any = tokenizer.chat_template
    if not isinstance(templates, Mapping):
        return templates  # type: ignore[no-any-return]
    if tools is not None and "tool_use" in templates:
        return templates["tool_use"]  # type: ignore[no-any-return]
    if "default" not in templates:
        names = ", ".join(sorted(map(repr, templates)))[:100]
        raise ValueError(f"the templates are named {names}, and none of them 'default'")
    return templates["default"]  # type: ignore[no-any-return]


def _shows(text: str, message: Mapping[str, Any]) -> bool:
    """Whether a rendered text holds a message's content, if that is a string."""
    content = message.get("content")
    return not isinstance(content, str) or content.strip() in text


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {**message, "content": parts}


def _needs_parts(tokenizer: PreTrainedTokenizerBase, tools: Any) -> bool:
    """Whether the template drops or refuses a text, and writes the same text if it is a list of parts."""
    probe = {"role": "user", "content": "probe"}

    def rendered(message: Mapping[str, Any]) -> str:
        try:
            return render_template(tokenizer, [message], **({} if tools is None else {"tools": tools}))
        except Exception:  # the template may raise anything
            return ""

    if "probe" in rendered(probe):
        return False
    text = rendered(_in_parts(probe))
    return "probe" in text and "'probe'" not in text  # in quotes: the list itself was written out


@functools.lru_cache(maxsize=16)
def check_template(template: str) -> None:
    """Raise ValueError for a template that is too long or multiplies computed values, and jinja2's own errors
    for a syntax error."""
    from jinja2 import Environment, nodes

    if not isinstance(template, str):
        raise ValueError("it is not a string")
    if len(template) > MAX_TEMPLATE:
        raise ValueError(f"it is {len(template)} characters long")
    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_without_generation(template))
    for power in tree.find_all(nodes.Pow):
        raise ValueError(f"line {power.lineno} uses the ** operator, which is not allowed")
    # jinja2's loop counters are at most the number of messages, unless the template assigns to `loop`.
    counts = all(name.ctx == "load" for name in tree.find_all(nodes.Name) if name.name == "loop")
    for product in tree.find_all(nodes.Mul):
        sides = (product.left, product.right)
        if not any(_is_small(side, counts) for side in sides):
            raise ValueError(f"it multiplies computed values in line {product.lineno}")


def _without_generation(template: str) -> str:
    """Replace transformers' own `generation` tag, which marks an assistant's text and renders it."""
    return _GENERATION.sub(lambda found: f"{{%{found[1]} {'endif' if found[2] else 'if true'}", template)


def _is_small(side: Any, counts: bool) -> bool:
    """Whether a factor is a constant, or a counter of `loop` (counts: `loop` is jinja2's own)."""
    from jinja2 import nodes

    if isinstance(side, nodes.Getattr) and isinstance(side.node, nodes.Name) and side.node.name == "loop":
        return counts and side.attr in _COUNTS
    if not isinstance(side, nodes.Const):
        return False
    return abs(side.value) <= 1000 if isinstance(side.value, (int, float)) else isinstance(side.value, str)


@contextlib.contextmanager
def _counted_lines() -> Iterator[None]:
    """Raise ValueError in this thread once a template has executed MAX_LINES, or run for SECONDS."""
    left, end = MAX_LINES, time.thread_time() + SECONDS

    def call(frame: FrameType, _event: str, _argument: Any) -> Any:
        return line if frame.f_code.co_filename == _FILE else None

    def line(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal left
        left -= event == "line"
        if left < 0:
            raise ValueError(f"it takes more than {MAX_LINES} steps")
        if time.thread_time() > end:
            raise ValueError(f"it takes longer than {SECONDS:.0f} seconds")
        return line

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)
