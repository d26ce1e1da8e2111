"""Check that auto-gptq 0.7.1 reads checkpoints of `lowmem convert`. It is still in use, but unmaintained.

Run by hand: auto-gptq needs its own environment with transformers 4.

    python3.11 -m venv old
    old/bin/pip install torch==2.13.0 transformers==4.40.2 accelerate==0.29.3 peft==0.10.0 "numpy<2" \\
        "pyarrow<17" "datasets<2.20" rouge gekko sentencepiece
    old/bin/pip install --no-deps auto-gptq==0.7.1

    lowmem convert lowmem/data/tiny-starchat out --bits 4 --store-head
    python tests/compat/autogptq.py expect out expected.safetensors     # where lowmem is installed
    old/bin/python tests/compat/autogptq.py check out expected.safetensors

`expect` writes tokens and lowmem's float32 logits. `check` compares auto-gptq's float32 logits with them,
prints one line, and exits with code 1 if they differ by more than `TOLERANCE`.
Convert with --store-head: auto-gptq does not support tied heads. --bits may be any width.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

ROWS, LENGTH = 4, 128
TOLERANCE = 1e-5
"""Relative to the largest logit. Both sides compute in float32 and differ only in the order of additions."""


def expect(checkpoint: Path, file: Path) -> int:
    """Write `file`: "tokens" int64 [rows, length], this script's own text, and lowmem's "logits"."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from safetensors.torch import save_file

    from lowmem.loading.loader import LoadOptions, load

    loaded = load(checkpoint, LoadOptions(dtype=torch.float32))
    ids = loaded.tokenizer(Path(__file__).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    tokens = torch.tensor(ids[: ROWS * LENGTH]).view(ROWS, LENGTH)
    with torch.inference_mode():
        logits = loaded.model(tokens).logits
    save_file({"tokens": tokens, "logits": logits.contiguous()}, file)
    print(f"{file}: logits {list(logits.shape)}, the largest {logits.abs().max():.3f}")
    return 0


def check(checkpoint: Path, file: Path) -> int:
    """Compare auto-gptq's logits with those in `file`. Returns 0 if they agree, else 1."""
    import auto_gptq
    from auto_gptq import AutoGPTQForCausalLM
    from safetensors.torch import load_file

    expected = load_file(file)
    model = AutoGPTQForCausalLM.from_quantized(
        str(checkpoint),
        device="cpu",
        use_triton=False,
        disable_exllama=True,
        disable_exllamav2=True,
        inject_fused_attention=False,
        torch_dtype=torch.float32,
    )
    with torch.inference_mode():
        got = model.model(expected["tokens"]).logits.float()
    want = expected["logits"]
    difference = float((got - want).abs().max())
    logp, logq = want.double().log_softmax(-1), got.double().log_softmax(-1)
    kld = float((logp.exp() * (logp - logq)).sum(-1).mean())
    top1 = float((got.argmax(-1) == want.argmax(-1)).float().mean())
    largest = float(want.abs().max())
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    agree = difference <= TOLERANCE * largest
    print(
        f"auto-gptq {getattr(auto_gptq, '__version__', '?')}: {config['bits']} bits, "
        f"group size {config['group_size']}, sym {config['sym']}: max abs difference {difference:.2e} "
        f"(largest logit {largest:.2f}), mean KL divergence {kld:.2e}, same top-1 {top1:.4f}: "
        f"{'agrees' if agree else 'DIFFERS'}"
    )
    return 0 if agree else 1


def main() -> int:
    """`autogptq.py expect|check CHECKPOINT FILE`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=("expect", "check"))
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("file", type=Path, metavar="FILE")
    args = parser.parse_args()
    return (expect if args.step == "expect" else check)(args.checkpoint, args.file)


if __name__ == "__main__":
    sys.exit(main())
