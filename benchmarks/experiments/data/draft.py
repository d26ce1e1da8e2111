"""Train `lowmem/data/tiny-starchat-draft/`, the draft model of tiny-starchat, from the standard library.

    python -m lowmem.benchmarks.experiments.data.draft [--steps 1200] [--out DIR]

Two Llama-like layers of width 64 learn the large model's distribution of the next token (distillation: Hinton
et al. 2015), since a draft is accepted as often as the two distributions overlap. The text is this Python's
standard library, and questions and answers made from its docstrings; what shares lines or sentences with
the held-out evaluation text is left out (`HeldOut`). Every draw comes from one seed.
"""

from __future__ import annotations

import argparse
import ast
import math
import random
import shutil
import sysconfig
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lowmem.benchmarks.experiments.common import say
from lowmem.benchmarks.experiments.data.calibration import DATA, HeldOut
from transformers import LlamaConfig, LlamaForCausalLM

from lowmem.loading.loader import LoadedModel, LoadOptions, load
from lowmem.models.dialogue import Message

LARGE, DRAFT = DATA / "tiny-starchat", DATA / "tiny-starchat-draft"
ROWS, LENGTH = 8, 256
PEAK, WARM = 5e-3, 60
"""The learning rate, reached after WARM steps; then it falls along a cosine."""
BLOCK = 40
"""Lines of a file that are judged together: a block that shares text with the evaluation is left out."""
LONGEST = 1500
"""Characters of an answer, at most."""


def build() -> LlamaForCausalLM:
    """The draft model before training; fewer than 400,000 parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def library_files() -> list[Path]:
    """The modules of this Python's standard library, without its tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "test", "tests", "idle_test", "lib2to3"}
    return sorted(p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts))


def source_ids(large: LoadedModel, text: str, held_out: HeldOut) -> list[int]:
    """A file's token ids, without the blocks that share text with the evaluation."""
    lines = text.splitlines(keepends=True)
    blocks = ("".join(lines[start : start + BLOCK]) for start in range(0, len(lines), BLOCK))
    kept = "".join(block for block in blocks if not held_out.shares(block))
    return [*large.tokenizer(kept, add_special_tokens=False).input_ids, 0]


def dialogues(text: str, module: str) -> Iterator[tuple[str, str]]:
    """Questions and answers made from a module's docstrings."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or not (doc := ast.get_docstring(node)):
            continue
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        first = doc.split("\n\n")[0].rstrip(".")
        yield f"What does the {kind} {node.name} in {module} do?", first
        code = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
        if kind == "function" and len(code) < LONGEST:
            yield f"Write a Python function {node.name}. {first}", f"```python\n{code.rstrip()}\n```"


def corpus(large: LoadedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids of all source, token ids of all dialogues)."""
    held_out = HeldOut(LARGE)
    code: list[int] = []
    spoken: list[int] = []
    root = Path(sysconfig.get_path("stdlib"))
    assert large.dialogue is not None
    for path in library_files():
        try:
            text = path.read_text("utf-8")
            pairs = list(dialogues(text, ".".join(path.relative_to(root).with_suffix("").parts)))
        except (UnicodeDecodeError, SyntaxError):
            continue
        code += source_ids(large, text, held_out)
        for question, answer in pairs:
            if not held_out.shares(question) and not held_out.shares(answer):
                turns = [Message("user", question), Message("assistant", answer)]
                spoken += large.dialogue.encode(large.tokenizer, turns, False)
    return torch.tensor(code), torch.tensor(spoken)


def rows_of(code: torch.Tensor, spoken: torch.Tensor, choice: random.Random) -> torch.Tensor:
    """ROWS stretches [ROWS, LENGTH] of the corpus, three of four from source."""
    rows = []
    for row in range(ROWS):
        ids = spoken if row % 4 == 0 else code
        start = choice.randrange(len(ids) - LENGTH)
        rows.append(ids[start : start + LENGTH])
    return torch.stack(rows)


def rate(step: int, steps: int) -> float:
    """The learning rate as a share of PEAK."""
    if step < WARM:
        return (step + 1) / WARM
    return 0.02 + 0.98 * (1 + math.cos(math.pi * (step - WARM) / max(1, steps - WARM))) / 2


def train(large: LoadedModel, small: LlamaForCausalLM, steps: int) -> None:
    """Distil in place."""
    code, spoken = corpus(large)
    say(f"{len(code)} tokens of source, {len(spoken)} of dialogues")
    choice, model = random.Random(0), large.model
    optimizer = torch.optim.AdamW(small.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    started, seen = time.perf_counter(), 0.0
    for step in range(steps):
        ids = rows_of(code, spoken, choice)
        with torch.inference_mode():
            target = model(input_ids=ids).logits.float().log_softmax(-1)
        target = target.clone()
        guess = small(input_ids=ids).logits.float().log_softmax(-1)
        divergence = torch.nn.functional.kl_div(guess, target, log_target=True, reduction="sum")
        loss = divergence / ids.numel()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(small.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen = 0.98 * seen + 0.02 * loss.item() if step else loss.item()
        if step % 50 == 49:
            say(f"step {step + 1}: KL divergence {seen:.3f}, {time.perf_counter() - started:.0f} s")


def save(small: Any, out: Path) -> int:
    """Write the checkpoint in bfloat16, with the large model's tokenizer; returns its bytes."""
    small.to(torch.bfloat16).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(LARGE / name, out / name)
    return sum(file.stat().st_size for file in out.iterdir())


def main(argv: list[str] | None = None) -> int:
    """Train and save. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--out", type=Path, default=DRAFT)
    args = parser.parse_args(argv)
    small = build()
    say(f"{sum(p.numel() for p in small.parameters())} parameters")
    train(load(LARGE, LoadOptions(dtype=torch.float32)), small, args.steps)
    say(f"{save(small, args.out)} bytes in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
