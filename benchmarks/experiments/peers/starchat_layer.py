"""One decoder layer at StarChat Alpha's dimensions, converted by lowmem and by GPTQModel in one run.

    python -m lowmem.benchmarks.experiments.peers.starchat_layer             both converters; writes results/starchat_layer.json
    python -m lowmem.benchmarks.experiments.peers.starchat_layer --scale 8   the same with an eighth of the width: seconds, not minutes
    python -m lowmem.benchmarks.experiments.peers.starchat_layer --show      the committed measurement as a table

The weights are made up, since the real ones are 32 GB: normal, with heavy-tailed input columns, and with
channels that the layer norms and the embedding make louder, as trained models have them. Times and memory
hardly depend on that; the errors do, so they compare the two converters and say nothing of StarChat itself.

Each converter runs in a process of its own on the same checkpoint and the same token rows. What it wrote is
measured from its packed tensors, dequantized by lowmem.kernels.reference, on text that it has not seen.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.benchmarks.common.processes import ROOT, Usage, hardware, run_process

if TYPE_CHECKING:
    import torch

RESULTS = ROOT / "benchmarks" / "results" / "starchat_layer.json"
TINY = ROOT / "lowmem" / "data" / "tiny-starchat"
CONVERTERS = ("ours", "gptqmodel")
TITLES = {"ours": "lowmem", "gptqmodel": "GPTQModel"}

N_EMBD, N_HEAD, N_INNER, POSITIONS = 6144, 48, 24576, 1024
BITS, GROUP_SIZE = 4, 128
ROWS, ROW_LENGTH = 16, 512
ROWS_AT_A_TIME = 4  # what lowmem chooses for rows of 512; GPTQModel is given the same batch
HELDOUT_ROWS = 4


# --- the checkpoint ---------------------------------------------------------------------------------------


def layer_config(scale: int, layers: int) -> dict[str, Any]:
    """tiny-starchat's config.json at StarChat Alpha's dimensions over `scale`; its heads stay 128 wide."""
    config = json.loads((TINY / "config.json").read_bytes())
    return dict(config) | {
        "n_embd": N_EMBD // scale,
        "n_head": N_HEAD // scale,
        "n_inner": N_INNER // scale,
        "n_layer": layers,
        "n_positions": POSITIONS,
        "dtype": "float16",
    }


def make_weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """One plausible float16 tensor: [out, in] of a linear, [rows, hidden] of an embedding, or a vector."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    width = shape[-1]
    few = torch.randperm(width, generator=generator)
    if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
        noise.mul_(0.3).exp_()
        noise[few[: max(1, width // 100)]] *= 6  # the outlier channels
    elif name.endswith(("wte.weight", "wpe.weight")):
        # Correlated channels: a few hundred directions of falling strength, and noise of their own.
        directions = width // 8
        strength = torch.arange(1, directions + 1).rsqrt()
        rows = torch.randn(shape[0], directions, generator=generator) * strength
        noise.mul_(0.3).addmm_(rows, torch.randn(directions, width, generator=generator))
        noise[:, few[: max(1, width // 200)]] *= 8
        noise *= 0.2  # as loud as what a layer adds, so that the residual stream counts
    else:
        # 0.02 at the full width; wider for a smaller scale, so that activations stay as large.
        noise *= 0.02 * math.sqrt(N_EMBD / min(width, N_EMBD))
        if len(shape) == 2:  # a few per cent of the input columns from Student's t, 3 degrees of freedom
            tail = few[: width // 32]
            chi = torch.randn(3, shape[0], len(tail), generator=generator).square_().sum(0).div_(3)
            noise[:, tail] /= chi.sqrt_()
    return noise.clamp_(-1000, 1000).to(torch.float16)


def make_checkpoint(folder: Path, scale: int, layers: int) -> None:
    """Write the float16 checkpoint, one tensor in memory at a time, and its token rows beside it."""
    import torch
    from lowmem.benchmarks.quality.texts import read_texts
    from lowmem.convert.calibration import CalibrationSpec, load_rows
    from transformers import AutoConfig, AutoTokenizer

    from lowmem.checkpoint.files.writer import TensorPlan, write_json, write_tensors
    from lowmem.checkpoint.source.open import open_source
    from lowmem.models.architecture import inspect
    from lowmem.models.dialogue import Dialogue

    folder.mkdir()
    write_json(folder / "config.json", layer_config(scale, layers))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY / name, folder)
    arch = inspect(AutoConfig.from_pretrained(folder, local_files_only=True))
    shapes = {name: shape for name, shape in arch.shapes.items() if name != arch.head}
    seeds = {name: seed for seed, name in enumerate(shapes)}
    plans = [TensorPlan(name, torch.float16, shape) for name, shape in shapes.items()]
    write_tensors(
        folder / "model.safetensors", plans, lambda name: make_weight(name, shapes[name], seeds[name])
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    vocabulary = arch.shapes[arch.embedding][0]
    spec = CalibrationSpec("builtin", ROWS, ROW_LENGTH)
    rows = load_rows(spec, tokenizer, Dialogue.detect(tokenizer), vocabulary)
    (code,) = read_texts(("code",), (), tokenizer, vocabulary, rows=HELDOUT_ROWS, row_length=ROW_LENGTH)
    data = {
        "calibration": rows.tokens.tolist(),
        "digest": rows.digest,
        "description": rows.description,
        "heldout": code.rows.tolist(),
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "source_bytes": sum(info.nbytes for info in open_source(str(folder)).infos.values()),
    }
    (folder.parent / "tokens.json").write_text(json.dumps(data))


# --- the converters ---------------------------------------------------------------------------------------


def run_gptqmodel(work: Path, report: Path) -> None:
    """Convert with GPTQModel: its own defaults, but for what both share. Phases and settings to `report`."""
    started = time.perf_counter()
    from gptqmodel import GPTQModel, QuantizeConfig

    marks = {"import": time.perf_counter()}
    rows = json.loads((work / "tokens.json").read_bytes())["calibration"]
    config = QuantizeConfig(bits=BITS, group_size=GROUP_SIZE, desc_act=False)
    model = GPTQModel.load(str(work / "source"), config)
    marks["load"] = time.perf_counter()
    dtype = str(getattr(model.model, "dtype", None)).removeprefix("torch.")
    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    model.quantize(calibration, batch_size=ROWS_AT_A_TIME)
    marks["quantize"] = time.perf_counter()
    model.save(str(work / "gptqmodel"))
    marks["save"] = time.perf_counter()
    times = [started, *marks.values()]
    settings = ("bits", "group_size", "sym", "desc_act", "act_group_aware", "static_groups", "damp_percent",
                "damp_auto_increment", "mse", "true_sequential", "offload_to_disk")  # fmt: skip
    data = {
        "seconds": {
            n: round(end - begin, 3) for n, begin, end in zip(marks, times[:-1], times[1:], strict=True)
        },
        "settings": {name: getattr(config, name) for name in settings if hasattr(config, name)}
        | {"compute_dtype": dtype, "rows_at_a_time": ROWS_AT_A_TIME},
    }
    report.write_text(json.dumps(data))


def read_our_report(work: Path, log: Path) -> dict[str, Any]:
    """What `lowmem convert --json` told; checks that its token rows were the ones that GPTQModel got."""
    events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"event"')]
    started = next(event for event in events if event["event"] == "started")
    finished = next(event for event in events if event["event"] == "finished")
    recipe = json.loads((work / "ours" / "lowmem-report.json").read_bytes())["recipe"]
    digest = json.loads((work / "tokens.json").read_bytes())["digest"]
    if recipe["calibration tokens"] != digest:
        raise SystemExit("the two converters were not given the same tokens")
    kept = ("bits", "group_size", "sym", "desc_act", "damp_percent", "true_sequential")
    plan = started["plan"]
    return {
        "seconds": {name: round(value, 3) for name, value in finished["seconds"].items()},
        "settings": {name: recipe[name] for name in kept}
        | {"compute_dtype": recipe["compute dtype"], "rows_at_a_time": plan["rows_at_a_time"]},
        "predicted_bytes": plan["host_peak"],
        "predicted_stage": max(plan["stages"], key=lambda stage: stage["nbytes"])["name"],
        "calibration_errors": [e["error"] for e in events if e["event"] == "linear"],
    }


# --- what the result is worth -----------------------------------------------------------------------------


def measure(work: Path, names: Sequence[str], report: Path) -> None:
    """Errors of each result on held-out text, in float32, against the unquantized layers.

    linears: ||x (W - Q)||^2 / ||x W||^2 with the unquantized model's x, the same for all. layers: squared
    error of a layer's output, each result fed with its own outputs of the layer before, over the energy of
    the unquantized output, and over the energy of what the layer adds to its input.
    """
    import torch
    from torch import nn

    from lowmem.checkpoint.dequantize import PackedWeight, dequantize
    from lowmem.checkpoint.files.shards import read_shards
    from lowmem.checkpoint.manifest import read_quantization
    from lowmem.checkpoint.source.open import open_source
    from lowmem.models.architecture import build_model, decoder_layers, inspect
    from lowmem.streaming.layer_calls import catch_calls, embed
    from lowmem.streaming.weights import ModelWeights, empty, put

    tokens = torch.tensor(json.loads((work / "tokens.json").read_bytes())["heldout"])
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
    result = {name: {"linears": linears[name], "layers": found[name]} for name in names}
    report.write_text(json.dumps(result))


# --- processes --------------------------------------------------------------------------------------------


def run_step(work: Path, *arguments: str) -> Usage:
    """One of this module's own steps, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "lowmem.benchmarks.experiments.peers.starchat_layer",
        *arguments,
        "--work",
        str(work),
    ]
    return run_process(command, work / f"{arguments[1]}.log")


def compare(
    work: Path, scale: int, layers: int, chosen: Sequence[str], ours: Sequence[str]
) -> dict[str, Any]:
    """Make the checkpoint in `work`, run the converters, measure what they wrote: all raw figures.

    ours: further options of `lowmem convert`.
    """

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    say(f"making {layers} layer{'s' * (layers > 1)} of n_embd {N_EMBD // scale} …")
    run_step(work, "--step", "make", "--scale", str(scale), "--layers", str(layers))
    converters: dict[str, dict[str, Any]] = {}
    for name in chosen:
        say(f"{TITLES[name]} …")
        if name == "ours":
            command = [sys.executable, "-m", "lowmem", "convert", str(work / "source"), str(work / "ours"),
                       "--bits", str(BITS), "--group-size", str(GROUP_SIZE), "--rows", str(ROWS),
                       "--row-length", str(ROW_LENGTH), "--device", "cpu", "--json", *ours]  # fmt: skip
            usage = run_process(command, work / "ours.log")
            report = read_our_report(work, work / "ours.log")
        else:
            usage = run_step(work, "--step", "gptqmodel")
            report = json.loads((work / "gptqmodel.json").read_bytes())
        weights = sum(file.stat().st_size for file in (work / name).glob("*.safetensors"))
        converters[name] = {"usage": asdict(usage), **report, "result_bytes": weights}
        say(f"  {usage.wall_seconds:.1f} s, peak {usage.peak_bytes / 2**30:.2f} GiB")
    say("measuring the errors …")
    run_step(work, "--step", "measure", *(arg for name in chosen for arg in ("--only", name)))
    for name, errors in json.loads((work / "errors.json").read_bytes()).items():
        converters[name]["errors"] = errors
    tokens = json.loads((work / "tokens.json").read_bytes())
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "transformers", "gptqmodel")},
        "dimensions": {"n_embd": N_EMBD // scale, "n_head": N_HEAD // scale, "n_inner": N_INNER // scale}
        | {"layers": layers, "parameters": tokens["parameters"], "source_bytes": tokens["source_bytes"]},
        "calibration": {"rows": ROWS, "row_length": ROW_LENGTH, "description": tokens["description"]},
        "heldout_tokens": HELDOUT_ROWS * ROW_LENGTH,
        "converters": converters,
    }


# --- the report -------------------------------------------------------------------------------------------


def render(data: Mapping[str, Any]) -> str:
    """The measurement as Markdown."""
    size, versions, converters = data["dimensions"], data["versions"], data["converters"]

    def row(title: str, cells: Sequence[str]) -> str:
        return f"| {title} | {' | '.join(cells)} |"

    def usage(key: str, form: str, divisor: int = 1) -> list[str]:
        return [form.format(c["usage"][key] / divisor) for c in converters.values()]

    def last(key: str) -> list[str]:
        return [f"{c['errors']['layers'][-1][key]:.3e}" for c in converters.values()]

    titles = [f"GPTQModel {versions['gptqmodel']}" if n == "gptqmodel" else TITLES[n] for n in converters]
    predicted = [f"{c['predicted_bytes'] / 2**30:.2f} GiB" if "predicted_bytes" in c else "—"
                 for c in converters.values()]  # fmt: skip
    lines = [
        row("", titles),
        row("---", ["---:"] * len(titles)),
        row("wall time", usage("wall_seconds", "{:.0f} s")),
        row("CPU time", usage("cpu_seconds", "{:.0f} s")),
        row("peak memory", usage("peak_bytes", "{:.2f} GiB", 2**30)),
        row("of it not backed by files", usage("peak_anonymous_bytes", "{:.2f} GiB", 2**30)),
        row("peak memory that the plan promised", predicted),
        row("error of the output", last("output")),
        row("error of what the layers add", last("added")),
    ]
    for linear in next(iter(converters.values()))["errors"]["linears"]:
        cells = [f"{c['errors']['linears'][linear]:.3e}" for c in converters.values()]
        lines.append(row(f"error of `{linear.removeprefix('transformer.h.')}`", cells))
    lines.append(row("result", [f"{c['result_bytes'] / 2**20:.0f} MiB" for c in converters.values()]))
    machine = data["hardware"]
    notes = [
        f"{size['layers']} gpt_bigcode layer(s), n_embd {size['n_embd']}, n_inner {size['n_inner']}, "
        f"{size['n_head']} heads, multi-query, {size['source_bytes'] / 2**30:.2f} GiB in float16, made-up "
        f"weights; {BITS} bits, groups of {GROUP_SIZE}; {data['calibration']['rows']} × "
        f"{data['calibration']['row_length']} calibration tokens. Errors: squared error over energy on "
        f"{data['heldout_tokens']} held-out tokens, float32.",
        "",
    ]
    for title, converter in zip(titles, converters.values(), strict=True):
        settings = ", ".join(f"{key} {value}" for key, value in converter["settings"].items())
        seconds = ", ".join(f"{key} {value:.1f}" for key, value in converter["seconds"].items())
        notes.append(f"- {title}: {settings}. Seconds: {seconds}.")
    notes += [
        f"- {data['date'][:10]}, {machine['cpu']}, {machine['cores']} cores "
        f"({', '.join(machine['flags'])}), {machine['memory_bytes'] / 2**30:.0f} GiB; "
        + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".",
        f"- `{data['command']}`",
    ]  # fmt: skip
    return "\n".join([*lines, "", *notes])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="lowmem.benchmarks.experiments.peers.starchat_layer", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--layers", type=int, default=1, metavar="N", help="decoder layers (%(default)s)")
    parser.add_argument("--scale", type=int, default=1, metavar="N", help="divide all dimensions by N")
    parser.add_argument("--only", choices=CONVERTERS, action="append", help="one converter instead of both")
    parser.add_argument("--plain", action="store_true", help="lowmem convert --plain: GPTQ alone")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to write (both at scale 1: results/)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="empty folder to work in, and keep")
    parser.add_argument("--show", action="store_true", help="print the committed measurement as a table")
    parser.add_argument("--step", choices=("make", "gptqmodel", "measure"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.show:
        print(render(json.loads((args.out or RESULTS).read_bytes())))
        return 0
    if args.layers < 1 or args.scale < 1 or N_HEAD % args.scale:
        parser.error(f"--layers must be positive, and --scale divide {N_HEAD} heads")
    chosen = tuple(name for name in CONVERTERS if args.only is None or name in args.only)
    if args.step == "make":
        make_checkpoint(args.work / "source", args.scale, args.layers)
    elif args.step == "gptqmodel":
        run_gptqmodel(args.work, args.work / "gptqmodel.json")
    elif args.step == "measure":
        measure(args.work, chosen, args.work / "errors.json")
    if args.step:
        return 0
    options = [f"--layers {args.layers}", *([f"--scale {args.scale}"] if args.scale > 1 else [])]
    options += [f"--only {name}" for name in chosen if len(chosen) == 1]
    options += ["--plain"] * args.plain
    command = " ".join(["python -m lowmem.benchmarks.experiments.peers.starchat_layer", *options])
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
        if any(args.work.iterdir()):
            parser.error(f"{args.work} is not empty")
    with tempfile.TemporaryDirectory(prefix="starchat-layer-") as temporary:
        work = (args.work or Path(temporary)).resolve()
        data = {
            "command": command,
            **compare(work, args.scale, args.layers, chosen, ("--plain",) if args.plain else ()),
        }
    print(render(data))
    out = args.out or (RESULTS if args.scale == 1 and len(chosen) == 2 else None)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(data, indent=2) + "\n")
        print(f"wrote {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
