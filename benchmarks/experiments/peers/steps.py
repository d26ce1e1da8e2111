"""What `lowmem.benchmarks.experiments.peers.command` does in lowmem's own interpreter, each in a process of its own.

prepare     token rows for every converter, texts, the reference's logits, llama.cpp's importance matrix
gptqmodel   one conversion with GPTQModel, its own defaults
gguf        the source as GGUF
shape       StarChat Alpha's dimensions with made-up weights, in lowmem's forms and as GGUF's source
measure     one form against the reference's logits: statistics, stored bits and bytes
serve       one form, timed in turns with the others (see peers_worker)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.benchmarks.experiments.peers.worker import Round, Started, prompt_of, serve, timed

from lowmem.errors import LowmemError

if TYPE_CHECKING:
    import torch

TEXTS = ("code", "dialogues")
ROWS_AT_A_TIME = 4
GPTQMODEL_SETTINGS = (
    "bits", "group_size", "sym", "desc_act", "act_group_aware", "static_groups", "damp_percent",
    "damp_auto_increment", "mse", "true_sequential",
)  # fmt: skip


# --- once for all forms -------------------------------------------------------------------------------------


def prepare(source: str, work: Path, importance: bool) -> None:
    """Write what all forms share into `work`, and prepared.json, which says what it is."""
    import numpy as np
    import torch
    from lowmem.benchmarks.experiments.peers.to_gguf import ARCHITECTURES
    from lowmem.benchmarks.quality.texts import read_texts
    from lowmem.convert.calibration import CalibrationSpec, load_rows

    from lowmem.checkpoint.source.open import open_source
    from lowmem.loading.loader import load
    from lowmem.models.dialogue import Dialogue

    opened = open_source(source)
    tokenizer = opened.tokenizer()
    loaded = load(source, dtype=torch.float32)
    vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])
    calibration = load_rows(CalibrationSpec(), tokenizer, Dialogue.detect(tokenizer), vocabulary)
    (work / "tokens.json").write_text(json.dumps(calibration.tokens.tolist()))
    texts = read_texts(TEXTS, (), tokenizer, vocabulary)
    for text in texts:
        np.save(work / f"rows-{text.name}.npy", text.rows.numpy().astype(np.int32))
        _save_logits(work / f"reference-{text.name}.npy", loaded.model, text.rows, vocabulary)
    if importance:
        known = loaded.model.config.model_type in ARCHITECTURES
        values = mean_square_inputs(loaded.model, calibration.tokens) if known else {}
        np.savez(work / "importance.npz", **values)  # type: ignore[arg-type]
    data = {
        "texts": [text.name for text in texts],
        "vocabulary": vocabulary,
        "calibration": calibration.description,
        "digest": calibration.digest,
        "fingerprint": opened.fingerprint(),
        "dtype": str(stored_dtype(source)).removeprefix("torch."),
    }
    (work / "prepared.json").write_text(json.dumps(data))


def make_shaped(layers: int, work: Path) -> None:
    """StarChat Alpha's dimensions: source/ and packed-BITS/ in `work`, and prepared.json (without texts)."""
    from lowmem.benchmarks.experiments.full_size.shaped import Dimensions, write_packed, write_source
    from lowmem.benchmarks.experiments.peers.forms import WIDTHS

    dimensions = Dimensions(layers)
    write_source(work / "source", dimensions)
    for bits, group_size in WIDTHS:
        write_packed(work / f"packed-{bits}", dimensions, bits, group_size)
    data = {"texts": [], "calibration": "", "fingerprint": "", "dtype": "float16"}
    (work / "prepared.json").write_text(json.dumps(data))


def stored_dtype(source: str) -> torch.dtype:
    """The dtype of the source's linears."""
    from lowmem.checkpoint.source.open import open_source
    from lowmem.models.architecture import inspect
    from lowmem.streaming.weights import ModelWeights

    opened = open_source(source)
    return ModelWeights(opened, inspect(opened.config())).dtype


def logits_of(model: Any, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """float32 [some rows, length, vocabulary], a few rows at a time."""
    import torch

    for part in rows.split(ROWS_AT_A_TIME):
        with torch.inference_mode():
            yield model(input_ids=part, use_cache=False).logits.float()


def _save_logits(file: Path, model: Any, rows: torch.Tensor, vocabulary: int) -> None:
    import numpy as np

    out = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(*rows.shape, vocabulary))
    for number, part in enumerate(logits_of(model, rows)):
        out[number * ROWS_AT_A_TIME : number * ROWS_AT_A_TIME + len(part)] = part.numpy()
    out.flush()


def mean_square_inputs(model: Any, rows: torch.Tensor) -> dict[str, Any]:
    """float32 [inputs] of each linear of the decoder layers, by llama.cpp's name of its weight: the mean over
    all tokens of the squared input, which is what llama.cpp's own tool (llama-imatrix) collects."""
    import gguf
    from lowmem.benchmarks.experiments.peers.to_gguf import ARCHITECTURES
    from torch import nn

    from lowmem.models.architecture import decoder_layers

    architecture = ARCHITECTURES[model.config.model_type]
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    layers_name, layers = decoder_layers(model, model.config)
    sums: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in layers.named_modules():
        if type(module) is not nn.Linear:
            continue
        stored = names.get_name(f"{layers_name}.{name}.weight", try_suffixes=(".weight",))

        def add(_module: nn.Module, args: tuple[torch.Tensor, ...], key: str = stored) -> None:
            square = args[0].detach().double().square().flatten(0, -2).sum(0)
            sums[key] = sums.get(key, 0) + square

        handles.append(module.register_forward_pre_hook(add))
    for _ in logits_of(model, rows):
        pass
    for handle in handles:
        handle.remove()
    return {name: (total / rows.numel()).float().numpy() for name, total in sums.items()}


# --- one form -----------------------------------------------------------------------------------------------


def convert_with_gptqmodel(
    source: str, tokens: Path, out: Path, bits: int, group_size: int
) -> dict[str, object]:
    """Convert with GPTQModel, its own defaults, on the token rows in `tokens`; its settings."""
    from importlib.metadata import version

    from gptqmodel import GPTQModel, QuantizeConfig

    rows = json.loads(tokens.read_bytes())
    config = QuantizeConfig(bits=bits, group_size=group_size)
    model = GPTQModel.load(source, config)
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=4)
    model.save(str(out))
    settings = {name: _plain(getattr(config, name)) for name in GPTQMODEL_SETTINGS if hasattr(config, name)}
    return {"settings": settings, "versions": {"gptqmodel": version("gptqmodel")}}


def measure(work: Path, method: str, path: Path, source: str) -> dict[str, Any]:
    """One form on every text, and its size. method: dense, gptq, int8, nf4 (all computed in float32, but for
    dense: in the dtype that the source stores), or gguf (whose logits lie beside it already)."""
    import numpy as np
    import torch
    from lowmem.benchmarks.common.record_file import to_json
    from lowmem.benchmarks.quality.divergence import compare, summarize

    from lowmem.loading.loader import load

    prepared = json.loads((work / "prepared.json").read_bytes())
    model: Any = None
    if method != "gguf":
        on_the_fly: Any = method if method in ("int8", "nf4") else None
        dtype = getattr(torch, prepared["dtype"]) if method == "dense" else torch.float32
        model = load(path, dtype=dtype, on_the_fly=on_the_fly).model
    texts = []
    for name in prepared["texts"]:
        rows = torch.from_numpy(np.load(work / f"rows-{name}.npy")).long()
        reference = _parts(np.load(work / f"reference-{name}.npy", mmap_mode="r"))
        if method == "gguf":
            found = _parts(np.load(path.with_name(f"{path.stem}-{name}.npy"), mmap_mode="r"))
        else:
            found = logits_of(model, rows)
        pairs = ((r.flatten(0, 1), f.flatten(0, 1)) for r, f in zip(reference, found, strict=True))
        texts.append(to_json(summarize(name, compare(rows, pairs))))
    bits, nbytes = stored_size(method, path, source, model)
    return {"texts": texts, "bits_per_weight": bits, "weight_bytes": nbytes}


def _parts(logits: Any) -> Iterator[torch.Tensor]:
    import numpy as np
    import torch

    for first in range(0, len(logits), ROWS_AT_A_TIME):
        yield torch.from_numpy(np.array(logits[first : first + ROWS_AT_A_TIME]))


def packed_bits_per_weight(folder: Path) -> float:
    """All stored bits of the packed linears over their weights, off the headers."""
    from lowmem.checkpoint.headers.safetensors import read_header

    config = json.loads((folder / "config.json").read_bytes())["quantization_config"]
    stored, weights = 0, 0
    for file in folder.glob("*.safetensors"):
        for name, tensor in read_header(file).tensors.items():
            if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx")):
                stored += 8 * (tensor.end - tensor.begin)
            if name.endswith(".qweight"):
                weights += tensor.shape[0] * tensor.shape[1] * 32 // int(config["bits"])
    return stored / weights


def stored_size(method: str, path: Path, source: str, model: Any = None) -> tuple[float, int]:
    """(all stored bits of the decoder layers' linears over their weights, stored bytes of the whole model).

    Off headers; of int8 and nf4, which are stored nowhere, off the loaded `model`.
    """
    from lowmem.checkpoint.headers.gguf import read_gguf_header
    from lowmem.checkpoint.headers.safetensors import read_header
    from lowmem.checkpoint.source.open import open_source
    from lowmem.kernels.bitsandbytes import scale_bytes
    from lowmem.models.architecture import inspect

    if method == "gguf":
        tensors = read_gguf_header(path).tensors
        linears = [t for name, t in tensors.items() if name.startswith("blk.") and len(t.shape) == 2]
        weights = sum(t.shape[0] * t.shape[1] for t in linears)
        return 8 * sum(t.nbytes for t in linears) / weights, sum(t.nbytes for t in tensors.values())
    if method == "gptq":
        stored = (tensor for f in path.glob("*.safetensors") for tensor in read_header(f).tensors.values())
        return packed_bits_per_weight(path), sum(tensor.end - tensor.begin for tensor in stored)
    opened = open_source(source)
    arch = inspect(opened.config())
    names = opened.resolve(arch.shapes)
    dense = [opened.infos[names[f"{name}.weight"]] for name in arch.linear_names()]
    weights, before = sum(info.numel for info in dense), sum(info.nbytes for info in dense)
    whole = sum(opened.infos[stored].nbytes for stored in names.values())
    if method == "dense":
        return 8 * before / weights, whole
    modules = [model.get_submodule(name) for name in arch.linear_names()]
    after = sum(m.weight.nbytes + scale_bytes(m) for m in modules)
    return 8 * after / weights, whole - before + after


# --- speed --------------------------------------------------------------------------------------------------


def open_runtime(
    method: str, path: Path, threads: int, prompt_tokens: int, new_tokens: int, most_seconds: float
) -> tuple[Started, Callable[[], Round]]:
    """For `serve`. method: dense, gptq (lowmem's own kernels), gptqmodel (its kernels), int8 or nf4."""
    import torch

    from lowmem.config import SamplingParams
    from lowmem.generate.engine import Engine
    from lowmem.kernels import dispatch
    from lowmem.kernels.registry import gptqmodel_kernels
    from lowmem.loading.loader import load

    torch.set_num_threads(threads)
    start = time.perf_counter()
    context = prompt_tokens + new_tokens + 1
    on_the_fly: Any = method if method in ("int8", "nf4") else None
    loaded = load(path, on_the_fly=on_the_fly, context=context)
    kernel = loaded.kernel
    if method == "gptqmodel":
        if loaded.format is None:
            raise LowmemError(f"{path} is not quantized")
        specs = dispatch.linear_specs(loaded.model, "cpu")
        kernels = gptqmodel_kernels(list(specs.values()), torch.device("cpu"))
        kernel = dispatch.replace_linears(loaded.model, specs, kernels, loaded.dtype).name
    seconds = time.perf_counter() - start
    engine = Engine(loaded.model, context=context, speculate=False)
    prompt = prompt_of(prompt_tokens, int(loaded.model.get_input_embeddings().weight.shape[0]))
    params = SamplingParams(max_new_tokens=new_tokens + 1, temperature=0)

    def run_round() -> Round:
        engine.reset()
        return timed(engine.generate(prompt, params), most_seconds)

    return Started(f"{kernel}, {str(loaded.dtype).removeprefix('torch.')}", seconds), run_round


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """One step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=("prepare", "gguf", "shape", "gptqmodel", "measure", "serve"))
    parser.add_argument("source", help="a model's folder, or for shape the number of layers")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--path", type=Path)
    parser.add_argument("--method")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--importance", action="store_true")
    parser.add_argument("--bits", type=int)
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--most-seconds", type=float, default=20)
    args = parser.parse_args(argv)
    if args.step == "prepare":
        prepare(args.source, args.work, args.importance)
    elif args.step == "gguf":
        from lowmem.benchmarks.experiments.peers.to_gguf import write_gguf

        write_gguf(args.source, args.path)
    elif args.step == "shape":
        make_shaped(int(args.source), args.work)
    elif args.step == "gptqmodel":
        tokens = args.work / "tokens.json"
        report = convert_with_gptqmodel(args.source, tokens, args.path, args.bits, args.group_size)
        args.report.write_text(json.dumps(report))
    elif args.step == "measure":
        args.report.write_text(json.dumps(measure(args.work, args.method, args.path, args.source)))
    else:
        return serve(
            lambda: open_runtime(
                args.method, args.path, args.threads, args.prompt_tokens, args.new_tokens, args.most_seconds
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
