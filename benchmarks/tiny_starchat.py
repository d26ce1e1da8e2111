"""The embedded model's quality after conversion, beside GPTQModel on the same rows in the same run.

    python -m benchmarks.tiny_starchat            8, 4, 3 and 2 bits; writes results/tiny_starchat.json
    python -m benchmarks.tiny_starchat --show     the committed measurement as a table

Everything is measured in float32 against the float32 reference, over held-out code and held-out
dialogues; the first line is the noise of bfloat16 arithmetic alone, without any quantization.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.processes import hardware, run_process
from benchmarks.demo import embedded_model
from lowmem import __version__

if TYPE_CHECKING:
    from benchmarks.quality import Quality

RESULTS = Path(__file__).parent / "results" / "tiny_starchat.json"
WIDTHS = ((8, 128), (4, 128), (3, 64), (2, 32))
TITLES = {"ours": "lowmem", "gptqmodel": "GPTQModel", "bf16": "bf16 arithmetic alone"}


def gptqmodel_step(tokens: Path, out: Path, bits: int, group_size: int) -> None:
    """Convert with GPTQModel, its own defaults, on the token rows in `tokens` (JSON)."""
    from gptqmodel import GPTQModel, QuantizeConfig

    rows = json.loads(tokens.read_bytes())
    model = GPTQModel.load(str(embedded_model()), QuantizeConfig(bits=bits, group_size=group_size))
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=4)
    model.save(str(out))


def bits_per_weight(folder: Path) -> float:
    """All stored bits of the packed linears over their weights, off the headers."""
    from lowmem.checkpoint.safetensors_file import read_header

    config = json.loads((folder / "config.json").read_bytes())["quantization_config"]
    stored, weights = 0, 0
    for file in folder.glob("*.safetensors"):
        for name, tensor in read_header(file).tensors.items():
            if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx")):
                stored += 8 * (tensor.end - tensor.begin)
            if name.endswith(".qweight"):
                weights += tensor.shape[0] * tensor.shape[1] * 32 // int(config["bits"])
    return stored / weights


def texts(tokenizer: Any) -> Iterator[tuple[str, Any]]:
    """Held-out code, and held-out dialogues in StarChat's template: token rows [24, 512]."""
    from benchmarks.quality import text_rows
    from lowmem.models.dialogue import Dialogue, Message

    folder = embedded_model()
    yield "code", text_rows(tokenizer, (folder / "heldout.txt").read_text(encoding="utf-8"))
    dialogue = Dialogue.detect(tokenizer)
    assert dialogue is not None
    pairs = json.loads((folder / "dialogues_heldout.json").read_bytes())
    turns = ([Message("user", p["prompt"]), Message("assistant", p["response"])] for p in pairs)
    yield "dialogues", text_rows(tokenizer, "".join(dialogue.render(t, False) for t in turns))


def measure(folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Quality of every folder, by name and text; and of bfloat16 arithmetic alone."""
    import torch

    from benchmarks.quality import Comparison, log_probabilities
    from lowmem.loader import load

    reference = load(embedded_model(), dtype=torch.float32)
    comparisons = {
        name: Comparison(log_probabilities(reference.model, rows), rows)
        for name, rows in texts(reference.tokenizer)
    }

    def of(model: Any) -> dict[str, Any]:
        found: dict[str, Quality] = {
            name: c.measure(log_probabilities(model, c.rows)) for name, c in comparisons.items()
        }
        return {name: asdict(quality) for name, quality in found.items()}

    results = {
        "reference": of(reference.model),
        "bf16": of(load(embedded_model(), dtype=torch.bfloat16).model),
    }
    for name, folder in folders.items():
        results[name] = of(load(folder, dtype=torch.float32).model)
        results[name]["bits_per_weight"] = bits_per_weight(folder)
    return results


def run(work: Path, peer: bool) -> dict[str, Any]:
    """Convert with both at every width, and measure: all raw figures."""
    from convert.calibration import CalibrationSpec, load_rows
    from lowmem.checkpoint.source import open_source
    from lowmem.models.dialogue import Dialogue

    tokenizer = open_source(str(embedded_model())).tokenizer()
    rows = load_rows(CalibrationSpec(), tokenizer, Dialogue.detect(tokenizer), len(tokenizer))
    (work / "tokens.json").write_text(json.dumps(rows.tokens.tolist()))
    folders, usages = {}, {}
    for bits, group in WIDTHS:
        width = ["--bits", str(bits), "--group-size", str(group)]
        name = f"ours {bits} g{group}"
        folders[name] = work / f"ours-{bits}"
        command = ["-m", "lowmem", "convert", str(embedded_model()), str(folders[name]), *width]
        print(f"{name} …", file=sys.stderr, flush=True)
        usages[name] = run_process([sys.executable, *command], work / "ours.log")
        if peer:
            name = f"gptqmodel {bits} g{group}"
            folders[name] = work / f"gptqmodel-{bits}"
            step = ["-m", "benchmarks.tiny_starchat", "--step", str(folders[name]), *width]
            print(f"{name} …", file=sys.stderr, flush=True)
            usages[name] = run_process(
                [sys.executable, *step, "--tokens", str(work / "tokens.json")], work / "gptqmodel.log"
            )
    print("measuring …", file=sys.stderr, flush=True)
    return {
        "command": "python -m benchmarks.tiny_starchat",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": {"lowmem": __version__, "python": platform.python_version()}
        | {package: version(package) for package in ("torch", "transformers", "gptqmodel")},
        "calibration": rows.description,
        "heldout_tokens": {name: int(ids.numel()) for name, ids in texts(tokenizer)},
        "quality": measure(folders),
        "usage": {name: asdict(usage) for name, usage in usages.items()},
    }


def render(data: Mapping[str, Any]) -> str:
    """The Markdown table, and what it was measured with."""
    lines = [
        "| | bits a weight | KL divergence: code | same top-1 | perplexity | KL divergence: dialogues |",
        "|---|---|---|---|---|---|",
    ]
    for name, q in data["quality"].items():
        if name == "reference":
            continue
        kind, *width = name.split(" ")
        title = f"{TITLES[kind]}{', ' + width[0] + '-bit ' + width[1] if width else ''}"
        bits = f"{q['bits_per_weight']:.2f}" if "bits_per_weight" in q else "16"
        code, dialogues = q["code"], q["dialogues"]
        lines.append(
            f"| {title} | {bits} | {code['kld']:.6f} | {code['same_top1']:.2%} "
            f"| {code['ppl']:.3f} | {dialogues['kld']:.6f} |"
        )
    machine, versions = data["hardware"], data["versions"]
    tokens = data["heldout_tokens"]
    lines += [
        "",
        f"`{data['command']}`, {data['date'][:10]}, {machine['cpu']}, {machine['cores']} cores; "
        + ", ".join(f"{name} {v}" for name, v in versions.items())
        + f". {tokens['code']:,} tokens of code, {tokens['dialogues']:,} of dialogues; unquantized "
        f"perplexity {data['quality']['reference']['code']['ppl']:.3f}. Bits a weight count all that is "
        "stored of a linear: integers, scales, zero-points and the group index.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write, or show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--show", action="store_true", help="print the committed measurement")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the raw figures go")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="lowmem alone")
    parser.add_argument("--step", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bits", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--group-size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step:
        gptqmodel_step(args.tokens, args.step, args.bits, args.group_size)
        return 0
    if not args.show:
        with tempfile.TemporaryDirectory() as work:
            data = run(Path(work), args.peer)
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps(data, indent=1) + "\n")
    print(render(json.loads(args.out.read_bytes())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
