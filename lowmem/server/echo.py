"""The prompt before its answer, with log-probabilities: `echo` of /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from lowmem.generate.scoring import score
from lowmem.session import Response, TokenLogprob
from lowmem.text.stream import token_text

if TYPE_CHECKING:
    from lowmem.server.worker import Continuation
    from lowmem.session import Session


def echo_prompt(
    session: Session,
    work: Continuation,
    on_prefill: Callable[[int, int], None],
    on_token: Callable[[], None],
) -> Iterator[Response]:
    """The responses to a prompt whose log-probabilities are asked for, or whose answer is not.

    Responses without text come first: the prompt's tokens, if they are scored. The text of the prompt is left
    to the caller. There are as many log-probabilities as tokens of prompt and answer, the end token included.
    """
    start = time.perf_counter()
    last = Response("", None, len(work.ids), 0, 0, 0.0, 0.0)
    if work.scored:
        for tokens in score(session.engine, work.ids, work.params.logprobs or 0, on_prefill):
            entries = tuple(
                TokenLogprob(
                    token_text(session.loaded.tokenizer, token.id),
                    token.logprob,
                    tuple((token_text(session.loaded.tokenizer, name), value) for name, value in token.top),
                )
                for token in tokens
            )
            last = replace(last, logprobs=entries)
            yield last
    if not work.answered:
        logprobs = None if work.params.logprobs is None else ()
        yield replace(
            last, logprobs=logprobs, finish_reason="length", ttft_seconds=time.perf_counter() - start
        )
        return
    answer = session.continue_ids(
        work.ids, work.params, on_prefill=on_prefill, on_token=on_token, end_logprob=True
    )
    with closing(answer):
        for response in answer:
            yield replace(response, cached_tokens=0)
