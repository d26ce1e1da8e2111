"""A checkpoint's own chat template, rendered where it can do no harm.

transformers renders it in jinja2's ImmutableSandboxedEnvironment, which lets nothing of Python's own be
reached. What that cannot bound is bounded here: a template is a program, and may run for ever or ask for all
memory there is. So its lines and its time are counted while it runs, it may not make powers or products of
what it has computed (one of them could take hours without ending a line), and its text is made once on trial
with the address space limited.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from lowmem.text.tokenizing import panics_told

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TEMPLATE = 2**20
"""Characters of a template; long ones have some ten thousand."""
MAX_LINES = 1_000_000
"""Lines that a template may run through; a dialogue of a hundred turns takes some thousand."""
SECONDS = 5.0
"""Of this thread's work; some filters walk through a hundred thousand values in one line."""
MAX_TEXT = 2**22
"""Characters that it may add to what the messages say."""
MEMORY = 2**30
"""Bytes that rendering may take."""
_COUNTS = ("index", "index0", "revindex", "revindex0", "length")
_LIMITING = threading.Lock()  # the limit is the process's: two at once would restore each other's
_FILE = "<template>"  # what jinja2 calls the code that it makes of a template


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], **options: Any
) -> list[int]:
    """The token ids of messages in the tokenizer's own chat template.

    messages: of "role" and "content". options: further arguments of transformers' apply_chat_template.
    Raises whatever the template raises; ValueError or MemoryError where it goes beyond the limits above;
    InvalidRequestError where the tokenizer gives up.
    """
    check_template(tokenizer.chat_template)
    with _limited_memory(), _counted_lines():
        plain = {name: value for name, value in options.items() if name == "add_generation_prompt"}
        text: Any = tokenizer.apply_chat_template(list(messages), tokenize=False, **plain)
    if len(text) > MAX_TEXT + sum(len(message["content"]) for message in messages):
        raise ValueError(f"it makes {len(text)} characters of the messages")
    with _counted_lines(), panics_told():
        ids: Any = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False, **options)
    return list(ids)


@functools.lru_cache(maxsize=16)
def check_template(template: str) -> None:
    """ValueError for a template that is too long or makes products of what it computes; jinja2's own errors
    where it is none."""
    from jinja2 import Environment, nodes

    if not isinstance(template, str):
        raise ValueError("it is not text")
    if len(template) > MAX_TEMPLATE:
        raise ValueError(f"it is {len(template)} characters long")
    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_without_generation(template))
    for power in tree.find_all(nodes.Pow):
        raise ValueError(f"it raises to a power in line {power.lineno}")
    # The counters of a jinja2 loop do not exceed the number of messages, unless `loop` is reassigned.
    counts = all(name.ctx == "load" for name in tree.find_all(nodes.Name) if name.name == "loop")
    for product in tree.find_all(nodes.Mul):
        sides = (product.left, product.right)
        if not any(_is_small(side, counts) for side in sides):
            raise ValueError(f"it multiplies what it has computed in line {product.lineno}")


def _without_generation(template: str) -> str:
    """transformers' own tag, which says what an assistant wrote and renders what is between."""
    for mark in ("{%- generation", "{% generation", "{%- endgeneration", "{% endgeneration"):
        kind = "endif" if "end" in mark else "if true"
        template = template.replace(mark, mark.split(" ")[0] + " " + kind)
    return template


def _is_small(side: Any, counts: bool) -> bool:
    """Whether a factor is written in the template, or counts a loop (`counts`: that is what `loop` does)."""
    from jinja2 import nodes

    if isinstance(side, nodes.Getattr) and isinstance(side.node, nodes.Name) and side.node.name == "loop":
        return counts and side.attr in _COUNTS
    if not isinstance(side, nodes.Const):
        return False
    return abs(side.value) <= 1000 if isinstance(side.value, (int, float)) else isinstance(side.value, str)


@contextlib.contextmanager
def _counted_lines() -> Iterator[None]:
    """ValueError in this thread once a template has gone through `MAX_LINES`, or worked for `SECONDS`."""
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


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """`MEMORY` bytes of address space more than now, for the moment; nothing where a system has no limits."""
    if sys.platform != "linux":
        yield
        return
    import resource

    with _LIMITING:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm") as stream:
            most = int(stream.read().split()[0]) * resource.getpagesize() + MEMORY
        if soft != resource.RLIM_INFINITY:
            most = min(most, soft)
        try:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
