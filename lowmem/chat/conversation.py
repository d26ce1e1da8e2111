"""What was said so far, as values: every command makes a new conversation out of the old."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowmem.models.dialogue import Message


@dataclass(frozen=True)
class Exchange:
    """A question and its answer as the model gave it; stopped: Ctrl-C ended it, not the model."""

    question: str
    answer: str
    stopped: bool = False


@dataclass(frozen=True)
class Conversation:
    """The system text and the exchanges, oldest first."""

    system: str | None = None
    exchanges: tuple[Exchange, ...] = ()

    def messages(self, question: str | None = None) -> list[Message]:
        """The turns without the system text; `question` is one more, to be answered."""
        found = []
        for exchange in self.exchanges:
            found += [Message("user", exchange.question), Message("assistant", exchange.answer)]
        return found if question is None else [*found, Message("user", question)]

    def with_exchange(self, exchange: Exchange) -> Conversation:
        """One exchange more."""
        return replace(self, exchanges=(*self.exchanges, exchange))

    def without_last(self) -> Conversation:
        """One exchange less; IndexError where there is none."""
        if not self.exchanges:
            raise IndexError("the conversation is empty")
        return replace(self, exchanges=self.exchanges[:-1])
