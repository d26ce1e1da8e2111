"""What every decoder must do, for one sequence and for several. transformers' generate is the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lowmem.generate.cache import dense
from lowmem.generate.cache.contract import KVCache, Slot
from lowmem.generate.cache.dense import DenseKVCache
from lowmem.generate.decoders import capture
from lowmem.generate.decoders.contract import Decoder, Feed
from lowmem.generate.decoders.eager import EagerDecoder
from lowmem.generate.decoders.graph import GraphDecoder
from lowmem.generate.decoders.native import NativeDecoder
from lowmem.generate.decoders.selection import SelectedDecoder
from lowmem.kernels.native import library as native
from tests.generate.native_helpers import LLAMA_LIKE
from tests.generate.recorded_graphs import RecordedGraphs
from tests.helpers import tiny_model

CAPACITY = 64
Make = Callable[[Any, KVCache], Decoder]
# Of each decoder: the model kinds and the dtype to try it with.
DECODERS: dict[str, tuple[Make, tuple[str, ...], torch.dtype]] = {
    "eager": (lambda model, _: EagerDecoder(model), ("gpt_bigcode_mqa", "llama"), torch.float32),
    "eager bfloat16": (lambda model, _: EagerDecoder(model), ("gpt_bigcode_mha", "qwen2"), torch.bfloat16),
    "native": (
        lambda model, cache: NativeDecoder(EagerDecoder(model), cache.capacity),
        ("gpt_bigcode_mqa", "gpt_bigcode_mha", "llama", "qwen3", "starcoder2"),
        torch.bfloat16,
    ),
    "graph": (
        lambda model, cache: GraphDecoder(EagerDecoder(model), cache, graphs=RecordedGraphs()),
        ("gpt_bigcode_mqa", "llama"),
        torch.float32,
    ),
    "selected": (SelectedDecoder, ("gpt_bigcode_mqa",), torch.bfloat16),
}
CASES = [(name, kind) for name, (_, kinds, _) in DECODERS.items() for kind in kinds]


class Case:
    """A decoder of a random model, and a cache of three slots."""

    def __init__(self, name: str, kind: str) -> None:
        make, _, dtype = DECODERS[name]
        self.model = tiny_model(kind, vocab=512, dtype=dtype)
        # A copy: a decoder may change how its model attends.
        self.oracle = tiny_model(kind, vocab=512, dtype=dtype)
        if name == "native" and kind in LLAMA_LIKE:
            # It rounds keys and values only. A bfloat16 oracle rounds logits too, and then has ties.
            self.oracle = self.oracle.float()
        self.cache = DenseKVCache(2, CAPACITY, slots=3)
        self.decoder = make(self.model, self.cache)
        self.tolerance = 1e-4 if dtype is torch.float32 else 0.1

    def prefill(self, slot: Slot, prompt: list[int]) -> torch.Tensor:
        return self.decoder.prefill([Feed(slot, prompt)])[0]

    def greedy(self, slot: Slot, prompt: list[int], count: int) -> list[int]:
        """Prefill, and decode `count` tokens."""
        tokens = [int(self.prefill(slot, prompt).argmax())]
        while len(tokens) < count:
            tokens.append(int(self.decoder.step([Feed(slot, tokens[-1:])]).logits[0].argmax()))
        return tokens

    def logits(self, ids: list[int]) -> torch.Tensor:
        """transformers' logits [len(ids), vocab], without a cache."""
        with torch.inference_mode():
            logits: torch.Tensor = self.oracle(input_ids=torch.tensor([ids])).logits[0]
        return logits.float()

    def assert_close(self, got: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(got.float(), expected, rtol=self.tolerance, atol=self.tolerance)


@pytest.fixture(params=CASES, ids=[f"{name}-{kind}" for name, kind in CASES])
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    name, kind = request.param
    if name == "native" and not native.available():
        pytest.skip("the library is not compiled")
    monkeypatch.setattr(capture, "FIRST_WINDOW", 16)
    yield Case(name, kind)


def prompt_of(length: int, seed: int = 2) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(1, 512, (length,), generator=generator)]


def test_greedy_tokens_are_those_of_transformers_generate(case: Case) -> None:
    """In every slot, one after the other, across the windows of a graph."""
    for seed, slot in enumerate(case.cache.slots):
        prompt = prompt_of(9, seed)
        with torch.inference_mode():
            expected = case.oracle.generate(
                torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0].tolist()
        answer = case.greedy(slot, prompt, 30)
        assert [*prompt, *answer] == expected
        assert slot.tokens == expected[:-1] and slot.length == len(slot.tokens)


def test_chunked_prefill_gives_the_logits_of_one_forward(case: Case) -> None:
    prompt = prompt_of(40)
    expected = case.logits(prompt)[-1:]
    for slot, chunk in zip(case.cache.slots, (7, 39, 40), strict=True):
        for start in range(0, 40, chunk):
            logits = case.prefill(slot, prompt[start : start + chunk])
        assert logits.shape == (1, 512)
        case.assert_close(logits, expected)
        assert slot.tokens == prompt


def test_a_prefill_gives_as_many_logits_as_asked_for(case: Case) -> None:
    slot, prompt = case.cache.slots[0], prompt_of(20)
    (first,) = case.decoder.prefill([Feed(slot, prompt[:12], 20, keep=12)])
    (rest,) = case.decoder.prefill([Feed(slot, prompt[12:], 20, keep=3)])
    expected = case.logits(prompt)
    case.assert_close(first, expected[:12])
    case.assert_close(rest, expected[-3:])


def test_a_step_behind_a_cut_continues_the_shorter_sequence(case: Case) -> None:
    slot, prompt = case.cache.slots[1], prompt_of(20)
    case.greedy(slot, prompt, 5)
    slot.cut(12)
    logits = case.decoder.step([Feed(slot, [77])]).logits[0]
    case.assert_close(logits, case.logits([*prompt[:12], 77])[-1:])
    assert slot.tokens == [*prompt[:12], 77]


def test_a_draft_gives_the_logits_after_each_token(case: Case) -> None:
    slot, prompt, draft = case.cache.slots[0], prompt_of(12), [5, 6, 7, 8]
    case.prefill(slot, prompt)
    if len(draft) > case.decoder.max_rows:
        with pytest.raises(ValueError):
            case.decoder.step([Feed(slot, draft)])
        assert slot.tokens == prompt
        return
    logits = case.decoder.step([Feed(slot, draft)]).logits[0]
    case.assert_close(logits, case.logits([*prompt, *draft])[-4:])


@torch.inference_mode()
def test_a_sequence_does_not_depend_on_what_shares_its_step(case: Case) -> None:
    """The same bits, of logits and of rows, alone and beside others of any length and in any order.

    Graphs say that a batch rounds, and give them within that.
    """
    slots, alone = case.cache.slots, Case.__new__(Case)
    alone.__dict__.update(case.__dict__)
    prompts = [prompt_of(length, seed=length) for length in (5, 14, 23)]
    rows = [1, 3, 2] if case.decoder.max_rows >= 3 else [1, 1, 1]
    rounds = isinstance(case.decoder, GraphDecoder)
    turns = [[prompt_of(count, seed=10 * turn + count) for count in rows] for turn in range(3)]

    def run(groups: list[tuple[int, ...]]) -> tuple[list[list[torch.Tensor]], list[tuple[torch.Tensor, ...]]]:
        found: list[list[torch.Tensor]] = [[], [], []]
        case.cache.reset()
        for group in groups:
            logits = case.decoder.prefill([Feed(slots[i], prompts[i]) for i in group])
            for i, part in zip(group, logits, strict=True):
                found[i].append(part)
        for turn in turns:
            for group in groups:
                output = case.decoder.step([Feed(slots[i], turn[i]) for i in group])
                assert not rounds or bool(output.rounding) == (len(group) > 1)
                for i, part in zip(group, output.logits, strict=True):
                    assert part.shape == (rows[i], 512)
                    found[i].append(part)
        return found, [slot.save(slot.length) for slot in slots]

    run([(0, 1, 2)])  # the first steps of a slot may be compared with eager ones
    expected, kept = run([(0,), (1,), (2,)])
    for groups in ([(0, 1, 2)], [(2, 0), (1,)], [(2, 1, 0)]):
        found, saved = run(groups)
        for one, other in zip([*found, *saved], [*expected, *kept], strict=True):
            if rounds:
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
            else:
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_step_commits_nothing(
    case: Case, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second sequence is interrupted between two layers; all go on right from where they were."""
    slots, prompts = case.cache.slots[:2], [prompt_of(6), prompt_of(17)]
    expected = [case.greedy(slot, prompt, 8) for slot, prompt in zip(slots, prompts, strict=True)]
    case.cache.reset()
    case.decoder.prefill([Feed(slot, prompt) for slot, prompt in zip(slots, prompts, strict=True)])
    calls = {"update": 0, "advance": 0}
    update, advance = dense._Layer.update, dense.DenseSlot.advance

    def interrupted_update(layer: Any, *args: Any, **options: Any) -> Any:
        calls["update"] += 1
        if calls["update"] == 4:
            raise error
        return update(layer, *args, **options)

    def interrupted_advance(slot: Any, count: int) -> None:
        calls["advance"] += 1
        if calls["advance"] == 2:
            slot.layers[0].length += count
            raise error
        advance(slot, count)

    with monkeypatch.context() as patch:
        patch.setattr(dense._Layer, "update", interrupted_update)
        patch.setattr(dense.DenseSlot, "advance", interrupted_advance)
        feeds = [Feed(slot, answer[:1]) for slot, answer in zip(slots, expected, strict=True)]
        try:
            case.decoder.step(feeds)
        except BaseException:
            assert [slot.tokens for slot in slots] == prompts
        else:  # a decoder with a fallback has used it
            assert isinstance(case.decoder, SelectedDecoder) and error is RuntimeError
            assert case.decoder.fast is None and case.decoder.why_eager
            return
    for at in range(7):
        output = case.decoder.step([Feed(s, [a[at]]) for s, a in zip(slots, expected, strict=True)])
        assert [int(logits.argmax()) for logits in output.logits] == [a[at + 1] for a in expected]
    assert [s.tokens for s in slots] == [[*p, *a[:7]] for p, a in zip(prompts, expected, strict=True)]


def test_a_full_slot_is_an_error_and_keeps_its_tokens(case: Case) -> None:
    slot, prompt = case.cache.slots[0], prompt_of(CAPACITY)
    case.prefill(slot, prompt)
    for feed in (lambda: case.prefill(slot, [1]), lambda: case.decoder.step([Feed(slot, [1])])):
        with pytest.raises(ValueError):
            feed()
        slot.rewind()
        assert slot.tokens == prompt and slot.length == CAPACITY


def test_inference_mode_does_not_leak(case: Case) -> None:
    case.greedy(case.cache.slots[0], prompt_of(4), 3)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
