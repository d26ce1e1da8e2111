"""One decoder layer at StarChat Alpha's dimensions, converted by lowmem and by GPTQModel in one run.

    python -m lowmem.benchmarks.experiments.peers.layer             both; writes results/starchat_layer.json
    python -m lowmem.benchmarks.experiments.peers.layer --scale 8   an eighth of the width: seconds
    python -m lowmem.benchmarks.experiments.peers.layer --show      the committed measurement as a table

The weights are made up (`starchat/plausible.py`), since the real ones are 32 GB. Times and memory hardly
depend on them; the errors do, so they compare the two converters and say nothing about StarChat itself.

Each converter runs in a process of its own on the same checkpoint and the same token rows. The errors of its
result are measured on held-out text, with exactly dequantized linears.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.benchmarks.common.record_file import from_json
from lowmem.benchmarks.common.records import Origin
from lowmem.benchmarks.demo import embedded_model
from lowmem.benchmarks.experiments.common import RESULTS, Experiment, made_with, origin_here, say, table
from lowmem.benchmarks.experiments.peers.run import STEPS
from lowmem.benchmarks.experiments.processes import Usage, run_process
from lowmem.benchmarks.experiments.starchat.dimensions import Dimensions, nbytes_of

if TYPE_CHECKING:
    import torch

CONVERTERS = ("lowmem", "GPTQModel")
FULL = Dimensions(n_positions=1024)
BITS, GROUP_SIZE = 4, 128
ROWS, ROW_LENGTH = 16, 512
HELDOUT_ROWS = 4


@dataclass(frozen=True)
class Plan:
    """The memory that a converter promised."""

    host_peak: int
    stage: str
    """The stage that needs it."""


@dataclass(frozen=True)
class LayerError:
    """Squared error of a decoder layer's output, after the converter's own layers before it."""

    output: float
    """Over the energy of the unquantized output."""
    added: float
    """Over the energy of what the layer adds to its input."""


@dataclass(frozen=True)
class Converted:
    """What a converter did."""

    converter: str
    usage: Usage
    seconds: tuple[tuple[str, float], ...]
    """By phase."""
    recipe: str
    """Its settings, as JSON."""
    plan: Plan | None
    """None where the converter makes none."""
    calibration_errors: tuple[float, ...]
    """Relative output error of each linear on the calibration rows, where the converter reports it."""
    result_bytes: int
    linears: tuple[tuple[str, float], ...]
    """||x (W - Q)||² / ||x W||² of each linear, with the unquantized model's x."""
    layers: tuple[LayerError, ...]


@dataclass(frozen=True)
class LayerRecord:
    """`starchat_layer.json`."""

    origin: Origin
    dimensions: tuple[tuple[str, int], ...]
    calibration: str
    rows: int
    row_length: int
    heldout_tokens: int
    converters: tuple[Converted, ...]


def dimensions_of(scale: int, layers: int, vocab: int) -> Dimensions:
    """StarChat Alpha's over `scale`; heads stay 128 wide."""
    return Dimensions(layers, FULL.n_embd // scale, FULL.heads // scale, FULL.n_positions, vocab)


def make_checkpoint(folder: Path, scale: int, layers: int) -> Dimensions:
    """Write the float16 checkpoint, with tiny-starchat's vocabulary, and its token rows beside it."""
    from lowmem.benchmarks.experiments.starchat.plausible import write_plausible
    from lowmem.benchmarks.quality.texts import read_texts
    from lowmem.convert.calibration import CalibrationSpec, load_rows
    from transformers import AutoTokenizer

    from lowmem.models.dialogue import Dialogue

    tokenizer = AutoTokenizer.from_pretrained(embedded_model(), local_files_only=True)
    dimensions = dimensions_of(
        scale, layers, json.loads((embedded_model() / "config.json").read_bytes())["vocab_size"]
    )
    write_plausible(folder, dimensions)
    spec = CalibrationSpec("builtin", ROWS, ROW_LENGTH)
    rows = load_rows(spec, tokenizer, Dialogue.detect(tokenizer), dimensions.vocab)
    count = {"rows": HELDOUT_ROWS, "row_length": ROW_LENGTH}
    (code,) = read_texts(("code",), (), tokenizer, dimensions.vocab, **count)
    (folder.parent / "tokens.json").write_text(json.dumps(rows.tokens.tolist()))
    data = {
        "digest": rows.digest,
        "description": rows.description,
        "heldout": code.rows.tolist(),
    }
    (folder.parent / "about.json").write_text(json.dumps(data))
    return dimensions


def convert(converter: str, work: Path, options: Sequence[str]) -> dict[str, Any]:
    """Convert the checkpoint in `work` to `work/converter`: the fields of Converted, without the errors.

    options: further ones of `lowmem convert`.
    """
    source, out, log = work / "source", work / converter, work / f"{converter}.log"
    width = ["--bits", str(BITS), "--group-size", str(GROUP_SIZE)]
    data: dict[str, Any] = {"converter": converter, "plan": None, "calibration_errors": []}
    if converter == "lowmem":
        command = [
            sys.executable,
            "-m",
            "lowmem",
            "convert",
            str(source),
            str(out),
            *width,
            "--rows",
            str(ROWS),
        ]
        command += ["--row-length", str(ROW_LENGTH), "--device", "cpu", "--json", *options]
        usage = run_process(command, log)
        data |= _our_report(work, log)
    else:
        report = work / "report.json"
        command = [*STEPS, "gptqmodel", str(source), "--path", str(out), "--work", str(work), *width]
        usage = run_process([*command, "--report", str(report)], log)
        told = json.loads(report.read_bytes())
        data |= {"seconds": list(map(list, told["seconds"].items())), "recipe": json.dumps(told["settings"])}
    weights = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return data | {"usage": asdict(usage), "result_bytes": weights}


def _our_report(work: Path, log: Path) -> dict[str, Any]:
    """What `lowmem convert --json` printed. SystemExit unless its token rows were GPTQModel's."""
    events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"event"')]
    started = next(event for event in events if event["event"] == "started")
    finished = next(event for event in events if event["event"] == "finished")
    recipe = json.loads((work / "lowmem" / "lowmem-report.json").read_bytes())["recipe"]
    if recipe["calibration tokens"] != json.loads((work / "about.json").read_bytes())["digest"]:
        raise SystemExit("the two converters were not given the same tokens")
    kept = ("bits", "group_size", "sym", "desc_act", "damp_percent", "true_sequential")
    plan = started["plan"]
    return {
        "seconds": [[name, round(value, 3)] for name, value in finished["seconds"].items()],
        "recipe": json.dumps(
            {name: recipe[name] for name in kept}
            | {"compute_dtype": recipe["compute dtype"], "rows_at_a_time": plan["rows_at_a_time"]}
        ),
        "plan": {
            "host_peak": plan["host_peak"],
            "stage": max(plan["stages"], key=lambda stage: stage["nbytes"])["name"],
        },
        "calibration_errors": [e["error"] for e in events if e["event"] == "linear"],
    }


def errors(work: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Errors of each result on held-out text, in float32: the fields `linears` and `layers` of Converted."""
    import torch
    from torch import nn

    from lowmem.checkpoint.dequantize import PackedWeight, dequantize
    from lowmem.checkpoint.files.shards import read_shards
    from lowmem.checkpoint.manifest import read_quantization
    from lowmem.checkpoint.source.open import open_source
    from lowmem.models.architecture import build_model, decoder_layers, inspect
    from lowmem.streaming.layer_calls import catch_calls, embed
    from lowmem.streaming.weights import ModelWeights, empty, put

    tokens = torch.tensor(json.loads((work / "about.json").read_bytes())["heldout"])
    source = open_source(str(work / "source"))
    arch = inspect(source.config())
    weights = ModelWeights(source, arch)
    cpu = torch.device("cpu")
    model = build_model(source.config(), torch.float32, buffers=True)
    weights.fill(model, "", arch.outside_before_layers(), torch.float32, cpu)
    calls = catch_calls(model, arch, tokens)
    hidden = embed(model, tokens)
    empty(model)
    _, layers = decoder_layers(model, source.config())
    shards = {name: read_shards(work / name) for name in names}
    formats = {name: read_quantization(work / name) for name in names}
    states = dict.fromkeys(names, hidden)
    linears: dict[str, dict[str, float]] = {name: {} for name in names}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}

    def energy(x: torch.Tensor) -> float:
        return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2

    def packed(name: str, linear: str) -> torch.Tensor:
        format = formats[name].of_packed(linear)
        parts = (shards[name].read(f"{linear}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx"))
        return dequantize(PackedWeight(format, *parts))

    for index, spec in enumerate(arch.layers):
        layer = layers[index]
        weights.fill_layer(layer, spec, torch.float32, cpu)

        def hook(module: nn.Linear, args: tuple[torch.Tensor], output: torch.Tensor, linear: str) -> None:
            plain = energy(output if module.bias is None else output - module.bias)
            for name in names:
                difference = packed(name, linear).sub_(module.weight)
                missed = args[0].reshape(-1, args[0].shape[-1]) @ difference.T
                linears[name][linear] = energy(missed) / plain

        handles = [
            layer.get_submodule(linear.name).register_forward_hook(
                lambda m, a, o, full=f"{spec.name}.{linear.name}": hook(m, a, o, full)
            )
            for linear in spec.linears
        ]
        output = calls[index].run(layer, hidden)
        for handle in handles:
            handle.remove()
        for name in names:
            for linear in spec.linears:
                put(layer, f"{linear.name}.weight", packed(name, f"{spec.name}.{linear.name}"))
            states[name] = calls[index].run(layer, states[name])
            missed = energy(states[name] - output)
            found[name].append({"output": missed / energy(output), "added": missed / energy(output - hidden)})
        hidden = output
        empty(layer)
    return {
        name: {"linears": list(map(list, linears[name].items())), "layers": found[name]} for name in names
    }


def measure(args: argparse.Namespace, words: Sequence[str], work: Path) -> LayerRecord:
    """Make the checkpoint in `work`, run the converters, measure their results."""
    origin = origin_here(
        "peers.layer", words, f"StarChat Alpha's dimensions over {args.scale}, made-up weights"
    )
    say(f"making {args.layers} layer{'s' * (args.layers > 1)} of n_embd {FULL.n_embd // args.scale} …")
    dimensions = make_checkpoint(work / "source", args.scale, args.layers)
    converters = {}
    for name in args.only or CONVERTERS:
        say(f"{name} …")
        converters[name] = convert(name, work, ("--plain",) if args.plain else ())
        usage = converters[name]["usage"]
        say(f"  {usage['wall_seconds']:.1f} s, peak {usage['peak_bytes'] / 2**30:.2f} GiB")
    say("measuring the errors …")
    for name, found in errors(work, list(converters)).items():
        converters[name] |= found
    source = {name: stored for name, stored in dimensions.tensors().items() if name != "lm_head.weight"}
    nbytes = nbytes_of(source)
    return LayerRecord(
        origin,
        (*asdict(dimensions).items(), ("parameters", nbytes // 2), ("source_bytes", nbytes)),
        json.loads((work / "about.json").read_bytes())["description"],
        ROWS,
        ROW_LENGTH,
        HELDOUT_ROWS * ROW_LENGTH,
        tuple(from_json(Converted, data) for data in converters.values()),
    )


def render(record: LayerRecord) -> str:
    """The measurement as Markdown."""
    found, size = record.converters, dict(record.dimensions)

    def gib(nbytes: int) -> str:
        return f"{nbytes / 2**30:.2f} GiB"

    rows = [
        ["wall time", *(f"{c.usage.wall_seconds:.0f} s" for c in found)],
        ["CPU time", *(f"{c.usage.cpu_seconds:.0f} s" for c in found)],
        ["peak memory", *(gib(c.usage.peak_bytes) for c in found)],
        ["of it anonymous", *(gib(c.usage.peak_anonymous_bytes) for c in found)],
        ["peak memory that the plan promised", *(gib(c.plan.host_peak) if c.plan else "—" for c in found)],
        ["error of the output", *(f"{c.layers[-1].output:.3e}" for c in found)],
        ["error of what the layers add", *(f"{c.layers[-1].added:.3e}" for c in found)],
    ]
    for linear in dict(found[0].linears):
        title = f"error of `{linear.removeprefix('transformer.h.')}`"
        rows.append([title, *(f"{dict(c.linears)[linear]:.3e}" for c in found)])
    rows.append(["result", *(f"{c.result_bytes / 2**20:.0f} MiB" for c in found)])
    notes = [
        f"{size['layers']} gpt_bigcode layer(s), n_embd {size['n_embd']}, n_inner {4 * size['n_embd']}, "
        f"{size['heads']} heads, multi-query, {gib(size['source_bytes'])} in float16, made-up weights; "
        f"{BITS} bits, groups of {GROUP_SIZE}; {record.rows} × {record.row_length} calibration tokens. "
        f"Errors: squared error over energy on {record.heldout_tokens} held-out tokens, float32.",
        "",
    ]
    for c in found:
        settings = ", ".join(f"{key} {value}" for key, value in json.loads(c.recipe).items())
        seconds = ", ".join(f"{key} {value:.1f}" for key, value in c.seconds)
        notes.append(f"- {c.converter}: {settings}. Seconds: {seconds}.")
    notes.append(f"- {made_with(record.origin)}")
    return "\n".join([table(["", *(c.converter for c in found)], rows), "", *notes])


LAYER = Experiment("peers.layer", LayerRecord, RESULTS / "starchat_layer.json", render)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    parser = LAYER.parser(__doc__)
    parser.add_argument("--layers", type=int, default=1, metavar="N", help="decoder layers (%(default)s)")
    parser.add_argument("--scale", type=int, default=1, metavar="N", help="divide all dimensions by N")
    parser.add_argument("--only", choices=CONVERTERS, action="append", help="one converter instead of both")
    parser.add_argument("--plain", action="store_true", help="lowmem convert --plain: GPTQ alone")
    parser.add_argument("--work", type=Path, metavar="DIR", help="an empty folder to work in, and to keep")
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    if args.layers < 1 or args.scale < 1 or FULL.heads % args.scale:
        parser.error(f"--layers must be positive, and --scale divide {FULL.heads} heads")
    if args.work is not None and args.work.exists() and any(args.work.iterdir()):
        parser.error(f"{args.work} is not empty")
    work = args.work or Path(tempfile.mkdtemp(prefix="starchat-layer-"))
    work.mkdir(parents=True, exist_ok=True)
    # Only the whole comparison replaces the committed record.
    keep = args.out != LAYER.out or (args.scale == 1 and not args.only)
    try:
        return LAYER.run(args, lambda: measure(args, words, work.resolve()), keep)
    finally:
        if args.work is None:
            shutil.rmtree(work)


if __name__ == "__main__":
    raise SystemExit(main())
