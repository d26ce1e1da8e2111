"""How models write calls of tools in their answers, recognized by the text of their chat templates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CallFormat:
    """One way to write calls: JSON objects with a name and arguments, between markers."""

    sign: str
    """A text of the chat templates that show this format."""
    opening: str = ""
    """What precedes calls; "" if a call is the whole answer."""
    closing: str = ""
    """What follows them."""
    arguments: str = "arguments"
    """The key of the arguments."""
    listed: bool = False
    """Calls are elements of a JSON list."""
    others: tuple[str, ...] = ()
    """More markers: openings that some answers have, or what separates a name from its arguments."""

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers; many are special tokens."""
        return tuple(marker for marker in (self.opening, self.closing, *self.others) if marker)


FORMATS = (
    CallFormat("[TOOL_CALLS]", "[TOOL_CALLS]", listed=True, others=("[ARGS]", "[CALL_ID]")),  # Mistral
    CallFormat("<|tool_call|>", "<|tool_call|>", "<|/tool_call|>", listed=True),  # Granite 3, Phi-4
    CallFormat("<tool_call>", "<tool_call>", "</tool_call>"),  # Hermes, Qwen, SmolLM, Granite 4
    CallFormat('{"name": function name, "parameters":', arguments="parameters", others=("<|python_tag|>",)),
)
"""The last one is that of Llama 3.1, 3.2 and 3.3."""
_OTHERS = ("<function=", "<arg_key>")
"""What templates show that write no JSON between these markers: Qwen3-Coder's, GLM's."""


def call_format(template: str) -> CallFormat | None:
    """The format that a chat template shows to the model, or None if it is not one of FORMATS."""
    if any(other in template for other in _OTHERS):
        return None
    return next((format for format in FORMATS if format.sign in template), None)
