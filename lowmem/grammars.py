"""A grammar → the tokens that an answer may continue with, by llguidance."""

from __future__ import annotations

import codecs
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from lowmem.config import Grammar
from lowmem.errors import InvalidRequestError
from lowmem.generate.constraint import Constraint
from lowmem.loading.loader import LoadedModel
from lowmem.models.embedding import token_table
from lowmem.text.grammar_process import compile_grammar, limits, refused
from lowmem.text.tokenizing import panics_told

_KEPT = 64
"""Compiled grammars that are kept."""
_END = "<|end of the grammar|>"
"""A token that stands for the end where the model has no stop token; it is never chosen."""


class Grammars:
    """The grammars of one model: compiles each once. All methods may be called from any thread."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._rows = token_table(loaded.model).vocabulary
        self._stop_ids = tuple(token for token in loaded.stop_ids if 0 <= token < self._rows)
        self._lock = threading.Lock()
        self._compiling = threading.Lock()
        self._tokens: _Tokens | None = None
        self._matchers: OrderedDict[Grammar, Any] = OrderedDict()  # each at its start

    def check(self, grammar: Grammar, tokenizer: Any) -> None:
        """Compile a grammar. Raises InvalidRequestError for one that cannot be used.

        tokenizer: the model's, of the calling thread: threads cannot share one.
        """
        self._matcher(grammar, tokenizer)

    def constraint(self, grammar: Grammar, tokenizer: Any) -> GrammarConstraint:
        """The constraint for a new answer; see `check`."""
        matcher = self._matcher(grammar, tokenizer).deep_copy()
        assert self._tokens is not None
        return GrammarConstraint(grammar, matcher, self._tokens)

    def _matcher(self, grammar: Grammar, tokenizer: Any) -> Any:
        with self._lock:  # not held while a grammar is compiled: answers go on
            if grammar in self._matchers:
                self._matchers.move_to_end(grammar)
                return self._matchers[grammar]
        with self._compiling:
            source = compile_grammar(grammar.kind, grammar.text)
            if self._tokens is None:
                self._tokens = _Tokens(tokenizer, self._rows, self._stop_ids)
            from llguidance import LLMatcher

            matcher = LLMatcher(self._tokens.tokenizer, source, log_level=0, limits=limits())
            if matcher.is_error():
                raise refused(grammar.kind, matcher.get_error())
        with self._lock:
            self._matchers[grammar] = matcher
            while len(self._matchers) > _KEPT:
                self._matchers.popitem(last=False)
        return matcher


class GrammarConstraint(Constraint):
    """A `Constraint` that follows one answer through a grammar.

    Special tokens are never allowed, but for a stop token where the text may end.
    """

    def __init__(self, grammar: Grammar, matcher: Any, tokens: _Tokens) -> None:
        self._grammar, self._matcher, self._tokens = grammar, matcher, tokens
        self._next: torch.Tensor | None = None
        self._stopped = False

    @property
    def ended(self) -> bool:
        return self._stopped or (
            self._matcher.is_stopped() and self._matcher.is_accepting() and not self._matcher.is_error()
        )

    def allowed(self) -> torch.Tensor:
        if self._next is None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            if self._matcher.is_error():
                raise refused(self._grammar.kind, self._matcher.get_error())
            kept = self._tokens.ends if self._matcher.is_accepting() else self._tokens.texts
            ids = np.flatnonzero(np.unpackbits(bits, bitorder="little")[: len(kept)] & kept)
            if not len(ids):
                raise refused(self._grammar.kind, "the model has no token for the text that must come next")
            self._next = torch.from_numpy(ids)
        return self._next

    def accept(self, token: int) -> None:
        self._next = None
        if token in self._tokens.stop_ids:
            self._stopped = True
        elif not self._matcher.consume_token(token):
            raise refused(self._grammar.kind, self._matcher.get_error())

    def text_stream(self) -> MatchedText:
        """Decodes the answer's tokens to the text that the grammar matched."""
        return MatchedText(self._tokens.tokenizer)


class MatchedText:
    """Token ids → text in whole characters, as `TextStream`, by the bytes that a grammar sees.

    A tokenizer may decode the first token of a text differently, without the space that it begins with.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Add a token; returns the text that it completes, which may be empty."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """Return the remaining text, with U+FFFD for incomplete characters."""
        return self._decoder.decode(b"", final=True)


class _Tokens:
    """The bytes of a model's tokens, for llguidance, and which of them are text.

    rows: the model's vocabulary, which may have more ids than the tokenizer, or fewer.
    """

    def __init__(self, tokenizer: Any, rows: int, stop_ids: tuple[int, ...]) -> None:
        self.stop_ids = frozenset(stop_ids)
        self.tokenizer = _wrapped(tokenizer, rows, stop_ids)
        self.texts = np.ones(rows, dtype=np.uint8)
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        barred = special.union(stop_ids, self.tokenizer.eos_tokens)
        self.texts[[token for token in barred if token < rows]] = 0
        self.ends = self.texts.copy()
        self.ends[list(stop_ids)] = 1


def _wrapped(tokenizer: Any, rows: int, stop_ids: tuple[int, ...]) -> Any:
    """llguidance's own form of a tokenizer; takes about half a second for 49,152 tokens."""
    from llguidance import LLTokenizer
    from tokenizers import Tokenizer

    try:
        with panics_told():
            own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            own.no_truncation()
            own.no_padding()
            ends = [token for token in stop_ids if own.id_to_token(token) is not None]
            if not ends:
                own.add_special_tokens([_END])
                ends = [token for token in (own.token_to_id(_END),) if token is not None]
            size = max(rows, max(own.get_vocab(with_added_tokens=True).values()) + 1)
            return LLTokenizer(own.to_str(), n_vocab=size, eos_token=ends)
    except Exception as error:  # of tokenizers or of llguidance
        raise InvalidRequestError(
            f"this model's tokenizer cannot follow a grammar: {error}", "Answer without one"
        ) from error
