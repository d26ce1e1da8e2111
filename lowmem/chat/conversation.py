"""The conversation so far, as immutable values."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lowmem.config import SamplingParams
from lowmem.models.dialogue import Message


@dataclass(frozen=True)
class Exchange:
    """A question and the model's answer."""

    question: str
    answer: str
    stopped: bool = False
    """Ctrl-C ended the answer."""


@dataclass(frozen=True)
class Conversation:
    """The system text and the exchanges, oldest first."""

    system: str | None = None
    exchanges: tuple[Exchange, ...] = ()

    def messages(self, question: str | None = None) -> list[Message]:
        """All messages but the system text, followed by `question` if given."""
        found = []
        for exchange in self.exchanges:
            found += [Message("user", exchange.question), Message("assistant", exchange.answer)]
        return found if question is None else [*found, Message("user", question)]

    def with_exchange(self, exchange: Exchange) -> Conversation:
        """A copy with one more exchange."""
        return replace(self, exchanges=(*self.exchanges, exchange))

    def without_last(self) -> Conversation:
        """A copy without the last exchange. Raises IndexError if the conversation is empty."""
        if not self.exchanges:
            raise IndexError("the conversation is empty")
        return replace(self, exchanges=self.exchanges[:-1])


@dataclass(frozen=True)
class ChatState:
    """What a chat starts from, and what /save writes."""

    conversation: Conversation = field(default_factory=Conversation)
    params: SamplingParams = field(default_factory=SamplingParams)
    model: str = ""
    """The model as the user named it."""
