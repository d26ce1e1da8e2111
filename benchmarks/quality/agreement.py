"""How long a version's greedy answer stays equal to the unquantized model's.

The version answers some prompts. Then one streamed pass of the unquantized model over prompts and answers
(teacher forcing) gives the token that it would have chosen at every position. Up to the first difference the
two answers are equal: this is exact, although the unquantized model generates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lowmem.benchmarks.common.records import GreedyAgreement

from lowmem.config import SamplingParams
from lowmem.streaming.forward import Progress, StreamedModel

if TYPE_CHECKING:
    from lowmem.loading.loader import LoadedModel

NEW_TOKENS = 64
INSTRUCTIONS = (
    "How do I sort a list in Python?",
    "Write a Python function that counts the words of a text.",
    "What is the difference between a list and a tuple?",
    "Write a function get_name. Return the name of this object.",
    "Explain what a dictionary comprehension is, with an example.",
    "How can I read a file line by line?",
    "Write a SQL query that finds the ten largest orders of last month.",
    "Return the sum of the squares of all even numbers in a list.",
)
BEGINNINGS = (
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "import os\nimport sys\n\n\ndef main():\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "def read_lines(path):\n    with open(path) as",
    "for i in range(10):\n    if i % 2 == 0:\n",
    "function add(a, b) {\n",
    "SELECT name, price FROM products WHERE",
    "# Sort a list of dictionaries by a key\n",
)


def encode_prompts(loaded: LoadedModel) -> list[list[int]]:
    """Encode the built-in prompts to token ids: instructions for a chat model, else beginnings of code."""
    from lowmem.session import Session

    chat = loaded.dialogue is not None or bool(loaded.tokenizer.chat_template)
    session = Session(loaded, context=1, speculate=False)  # only for its templates
    return [session.encode(text) for text in (INSTRUCTIONS if chat else BEGINNINGS)]


def greedy_answers(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], new_tokens: int = NEW_TOKENS
) -> list[list[int]]:
    """Generate the greedy continuation of each prompt: token ids, including the end token."""
    from lowmem.generate.engine import Engine

    context = max(map(len, prompts)) + new_tokens
    engine = Engine(loaded.model, context=context, stop_ids=loaded.stop_ids, speculate=False)
    params = SamplingParams(max_new_tokens=new_tokens, temperature=0.0)
    return [[token.id for token in engine.generate(list(prompt), params)] for prompt in prompts]


def equal_tokens(
    reference: StreamedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    folder: Path,
    progress: Progress | None = None,
) -> tuple[int, ...]:
    """Count, for each answer, the tokens before the first one that the reference would not have chosen.

    Rows are padded on the right, which does not change the results of a causal model. folder: for the hidden
    states of the pass.
    """
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    rows = torch.zeros((len(texts), max(map(len, texts))), dtype=torch.int64)
    for row, ids in enumerate(texts):
        rows[row, : len(ids)] = torch.tensor(ids)
    found = []
    with reference.passed(rows, folder, progress) as states, reference.head() as logits:
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            # The token at position i is chosen at position i - 1.
            places = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
            best = logits(states.read(row, row + 1)[0, places]).argmax(-1).tolist()
            found.append(_common(best, answer))
    return tuple(found)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((place for place, (a, b) in pairs if a != b), len(other))


def agreement(
    reference: StreamedModel,
    loaded: LoadedModel,
    folder: Path,
    progress: Progress | None = None,
    new_tokens: int = NEW_TOKENS,
) -> GreedyAgreement | None:
    """Measure one loaded version; None if the prompts exceed the model's positions."""
    config: Any = loaded.model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 1 << 30
    prompts = [ids for ids in encode_prompts(loaded) if len(ids) + new_tokens <= positions]
    if not prompts:
        return None
    answers = greedy_answers(loaded, prompts, new_tokens)
    equal = equal_tokens(reference, prompts, answers, folder, progress)
    return GreedyAgreement(new_tokens, tuple(map(len, answers)), equal)
