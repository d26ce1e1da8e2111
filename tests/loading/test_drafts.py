"""A draft model from its name on: planned, checked, loaded, and used by a session."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lowmem
from lowmem.cli import main
from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError, MemoryBudgetError, SourceError
from lowmem.models.vocabulary import check_draft, stand_in
from lowmem.plan.drafts import KNOWN, suggestion
from lowmem.plan.planner import planned_bytes, room_for_slots
from lowmem.plan.request import ModelRequest, plan_for
from lowmem.plan.shape import read_shape
from lowmem.session import Session
from tests.generate.decoding import drafting
from tests.helpers import TINY_STARCHAT, save_source, tiny_model

GREEDY = SamplingParams(temperature=0, max_new_tokens=24)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tiny_model("llama", layers=3), tmp_path_factory.mktemp("large") / "m")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("gpt_bigcode_mqa", layers=1, positions=64, seed=3)
    return save_source(model, tmp_path_factory.mktemp("small") / "draft")


def with_token(folder: Path, to: Path, old: str, new: str) -> Path:
    """A copy whose tokenizer spells one token differently."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    data = json.loads((to / "tokenizer.json").read_text("utf-8"))
    data["model"]["vocab"][new] = data["model"]["vocab"].pop(old)
    data["model"]["merges"] = [m for m in data["model"]["merges"] if old not in (*m, "".join(m))]
    (to / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    return to


def test_the_plan_counts_its_memory(large: Path, small: Path) -> None:
    ram = 4 << 30
    plain = plan_for(ModelRequest(large, device="cpu", ram=ram))
    plan = plan_for(ModelRequest(large, device="cpu", ram=ram, draft=small))
    assert plain.draft is None and plan.draft is not None
    need = plan.draft.need
    assert need.weights > 0 and need.kv_cache > 0
    assert plan.budget.host == ram - need.total and plan.chosen.need == plain.chosen.need
    assert "draft (bfloat16)" in plan.reason and "draft" not in plain.reason
    assert room_for_slots(plan) < room_for_slots(plain)
    option = plain.chosen
    assert planned_bytes(plain, option, 1) == option.need.total
    assert planned_bytes(plain, option, 3) == option.need.total + 2 * option.need.kv_cache
    whole = option.need.total + need.total
    assert planned_bytes(plan, plan.chosen, 3) == whole + 2 * (option.need.kv_cache + need.kv_cache)
    least = plain.chosen.need.total
    smallest = min(option.need.total for option in plain.options)
    fits = plan_for(ModelRequest(large, device="cpu", ram=least + need.total, draft=small))
    assert fits.chosen.candidate.label == plain.chosen.candidate.label
    with pytest.raises(MemoryBudgetError):
        plan_for(ModelRequest(large, device="cpu", ram=smallest + need.total - 1, draft=small))


def test_on_a_card_it_takes_memory_of_the_card(large: Path, small: Path) -> None:
    request = ModelRequest(large, vram=2 << 30, ram=8 << 30)
    plain = plan_for(request, named_card=True)
    plan = plan_for(replace(request, draft=small), named_card=True)
    assert plan.draft is not None and plain.budget.card is not None
    assert plan.budget.card == plain.budget.card - plan.draft.need.total


def test_a_session_drafts_and_says_the_same(large: Path, small: Path) -> None:
    plain = Session(lowmem.open_model(large, device="cpu"))
    loaded = lowmem.open_model(large, device="cpu", draft=small)
    session = Session(loaded)
    assert loaded.draft is not None and session.engine.drafting.model is not None
    for params in (GREEDY, replace(GREEDY, temperature=0.9, seed=5)):
        text = "def f(x):\n    return x\n" * 4  # longer than the draft's positions in the end
        assert session.complete(text, params).text == plain.complete(text, params).text
    assert Session(loaded, speculate=False).engine.drafting.model is None
    with pytest.raises(InvalidRequestError, match="open_model"):
        lowmem.load(large, device="cpu", draft=small)


def test_another_vocabulary_is_refused(large: Path, small: Path, tmp_path: Path) -> None:
    other = with_token(small, tmp_path / "other", "return", "Return")
    with pytest.raises(SourceError, match=r"another vocabulary: token .*'return' here and 'Return' there"):
        lowmem.open_model(large, device="cpu", draft=other)


class Words:
    """A tokenizer of some words."""

    eos_token_id = 1

    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words) if word}

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        return type("Encoded", (), {"input_ids": [self.words.index(text)] if text in self.words else [0, 0]})


def test_a_vocabulary_may_end_sooner_and_have_gaps() -> None:
    check_draft(Words("a", "b", "", "d", "<user>"), Words("a", "b", "c", "d"))  # type: ignore[arg-type]
    check_draft(Words("a", "b"), Words("a", "b", "c"))  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="token 1 is 'b' here and 'c' there"):
        check_draft(Words("a", "b"), Words("a", "c"))  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="another vocabulary: none"):
        check_draft(Words(), Words("a"))  # type: ignore[arg-type]
    assert stand_in(Words("a", "b", "\n")) == 2  # type: ignore[arg-type]
    assert stand_in(Words("a", "b")) == 1  # type: ignore[arg-type]


def test_suggestions_are_for_models_that_they_fit(large: Path) -> None:
    shape = read_shape(large)
    tensors = tuple(replace(tensor, shape=(1 << 20, 1 << 14)) for tensor in shape.tensors[:1])
    starchat = replace(shape, model_type="gpt_bigcode", vocab=49156, tensors=tensors)
    room = 1 << 30
    assert "--draft bigcode/tiny_starcoder_py" in suggestion(starchat, 8192, room)
    assert suggestion(starchat, 8192, 400 << 20) == ""  # no room
    assert suggestion(shape, 8192, room) == ""  # another vocabulary
    assert suggestion(replace(starchat, tensors=shape.tensors), 8192, room) == ""  # it is small itself
    assert len({draft.repository for draft in KNOWN}) == len(KNOWN)


def test_the_command_line(large: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", str(large), "--prompt", "def f(", "--max-new-tokens", "12", "--temperature", "0"]
    assert main([*words, "--device", "cpu", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main([*words, "--device", "cpu", "--draft", str(small), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == plain["text"]
    assert main(["plan", str(large), "--device", "cpu", "--draft", str(small), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert "draft model draft" in record["reason"]
    parts = record["draft"]["weights"] + record["draft"]["kv_cache"] + record["draft"]["workspace"]
    assert record["draft"]["need"] == parts > 0
    assert main(["plan", str(large), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["draft"] is None


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--draft", "nowhere"], "'nowhere' does not exist"),
        (["--draft", "{small}", "--no-speculation"], "contradict"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], why: str, large: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.format(small=small) for word in words]
    assert main(["run", str(large), "--prompt", "a", "--device", "cpu", *given]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and why in lines[0]


def test_the_embedded_draft_is_small_and_often_right() -> None:
    """Of held-out code, at the greedy choices of the large model: 0.35 there, 0.43 in its own answers."""
    folder = TINY_STARCHAT.parent / "tiny-starchat-draft"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000
    loaded = lowmem.open_model(TINY_STARCHAT, device="cpu", dtype="float32", draft=folder)
    assert loaded.draft is not None
    text = (TINY_STARCHAT / "heldout.txt").read_text("utf-8")[200_000:202_000]
    ids = torch.tensor([loaded.tokenizer(text).input_ids])
    with torch.inference_mode():
        large, small = (model(ids).logits[0].argmax(-1) for model in (loaded.model, loaded.draft.model))
    assert float((large == small).float().mean()) > 0.3


def test_the_embedded_pair_answers_as_without() -> None:
    """In sampling too, with drafts of many tokens that were right."""
    folder = TINY_STARCHAT.parent / "tiny-starchat-draft"
    loaded = lowmem.open_model(TINY_STARCHAT, device="cpu", dtype="float32", draft=folder)
    session, plain = Session(loaded), Session(replace(loaded, draft=None))
    session.engine.drafting.paces = drafting()
    accepted = 0
    for seed, question in enumerate(("What does the function close do?", "Write a Python function mean.")):
        params = SamplingParams(temperature=0.7 * seed, seed=seed, max_new_tokens=64)
        answer = session.complete(question, params)
        assert answer.text == plain.complete(question, params).text
        accepted += answer.accepted_tokens
    assert accepted > 20
