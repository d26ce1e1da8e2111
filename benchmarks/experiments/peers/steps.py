"""The steps of `peers` that run in lowmem's own interpreter, each in a process of its own.

prepare     token rows for every converter, texts, the reference's logits, llama.cpp's importance matrix
gptqmodel   one conversion with GPTQModel, with its defaults
gguf        the source as GGUF
measure     one version against the reference's logits: statistics, stored bits and bytes
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TEXTS = ("code", "dialogues")
ROWS_AT_A_TIME = 4
GPTQMODEL_SETTINGS = (
    "bits", "group_size", "sym", "desc_act", "act_group_aware", "static_groups", "damp_percent",
    "damp_auto_increment", "mse", "true_sequential",
)  # fmt: skip


# --- once for all versions ----------------------------------------------------------------------------------


def prepare(source: str, work: Path, importance: bool) -> None:
    """Write what all versions share to `work`; prepared.json describes it."""
    import numpy as np
    import torch
    from lowmem.benchmarks.quality.texts import read_texts
    from lowmem.convert.calibration import CalibrationSpec, load_rows

    from lowmem.checkpoint.source.open import open_source
    from lowmem.export.families import FAMILIES
    from lowmem.loading.loader import LoadOptions, load
    from lowmem.models.dialogue import Dialogue

    opened = open_source(source)
    tokenizer = opened.tokenizer()
    loaded = load(source, LoadOptions(dtype=torch.float32))
    vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])
    calibration = load_rows(CalibrationSpec(), tokenizer, Dialogue.detect(tokenizer), vocabulary)
    (work / "tokens.json").write_text(json.dumps(calibration.tokens.tolist()))
    texts = read_texts(TEXTS, (), tokenizer, vocabulary)
    for text in texts:
        np.save(work / f"rows-{text.name}.npy", text.rows.numpy().astype(np.int32))
        _save_logits(work / f"reference-{text.name}.npy", loaded.model, text.rows, vocabulary)
    if importance:
        known = loaded.model.config.model_type in FAMILIES
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
    """The mean squared input of each linear, as llama.cpp's own tool (llama-imatrix) collects it.

    Returns float32 [inputs] by llama.cpp's name of the linear's weight; the mean is over all tokens.
    """
    from torch import nn

    from lowmem.export.tensors import name_map
    from lowmem.models.architecture import decoder_layers

    names = name_map(model.config)
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


# --- one version --------------------------------------------------------------------------------------------


def convert_with_gptqmodel(args: argparse.Namespace) -> dict[str, object]:
    """Convert with GPTQModel, its own defaults, on the token rows of tokens.json: settings and seconds."""
    from importlib.metadata import version

    marks = {"": time.perf_counter()}

    def mark(phase: str) -> None:
        marks[phase] = time.perf_counter()

    from gptqmodel import GPTQModel, QuantizeConfig

    mark("import")
    rows = json.loads((args.work / "tokens.json").read_bytes())
    config = QuantizeConfig(bits=args.bits, group_size=args.group_size)
    model = GPTQModel.load(args.source, config)
    mark("load")
    dtype = str(getattr(model.model, "dtype", None)).removeprefix("torch.")
    model.quantize(
        [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=ROWS_AT_A_TIME
    )
    mark("quantize")
    model.save(str(args.path))
    mark("save")
    settings = {name: _plain(getattr(config, name)) for name in GPTQMODEL_SETTINGS if hasattr(config, name)}
    settings |= {"compute_dtype": dtype, "rows_at_a_time": ROWS_AT_A_TIME}
    seconds = {n: round(end - begin, 3) for (n, end), begin in zip([*marks.items()][1:], marks.values())}  # noqa: B905
    return {"settings": settings, "seconds": seconds, "versions": {"gptqmodel": version("gptqmodel")}}


def measure(work: Path, method: str, path: Path, source: str) -> dict[str, Any]:
    """One version on every text, and its size.

    method: dense (computed in the source's dtype), gptq, int8, nf4, unpacked (computed in float32), or gguf
    (whose logits are in files beside it).
    """
    import numpy as np
    import torch
    from lowmem.benchmarks.common.record_file import to_json
    from lowmem.benchmarks.quality.divergence import compare, summarize

    from lowmem.loading.loader import LoadOptions, load

    prepared = json.loads((work / "prepared.json").read_bytes())
    model: Any = None
    if method != "gguf":
        on_the_fly: Any = method if method in ("int8", "nf4") else None
        dtype = getattr(torch, prepared["dtype"]) if method == "dense" else torch.float32
        place = source if method == "unpacked" else path
        model = load(place, LoadOptions(dtype=dtype, on_the_fly=on_the_fly)).model
        if method == "unpacked":
            fill_from_gguf(model, path)
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


def fill_from_gguf(model: Any, file: Path) -> None:
    """Replace every parameter by the one in a GGUF file, dequantized by the gguf package."""
    import gguf
    import numpy as np
    import torch

    from lowmem.export.families import row_order
    from lowmem.export.tensors import name_map

    names = name_map(model.config)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, parameter in model.named_parameters():
        stored = tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        values = torch.from_numpy(np.array(gguf.dequantize(stored.data, stored.tensor_type)))
        order = row_order(name, parameter.shape[0], model.config)
        own = torch.arange(parameter.shape[0]) if order is None else order.argsort()
        parameter.data = values.view(parameter.shape)[own].to(parameter.dtype)


def _parts(logits: Any) -> Iterator[torch.Tensor]:
    import numpy as np
    import torch

    for first in range(0, len(logits), ROWS_AT_A_TIME):
        yield torch.from_numpy(np.array(logits[first : first + ROWS_AT_A_TIME]))


def packed_bits_per_weight(folder: Path) -> float:
    """Stored bits per weight of the packed linears, from headers."""
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
    """(stored bits per weight of the decoder layers' linears, stored bytes of the whole model).

    From headers; for int8 and nf4, which are not stored, from the loaded `model`.
    """
    from lowmem.checkpoint.headers.gguf import read_gguf_header
    from lowmem.checkpoint.headers.safetensors import read_header
    from lowmem.checkpoint.source.open import open_source
    from lowmem.kernels.bitsandbytes import scale_bytes
    from lowmem.models.architecture import inspect

    if method in ("gguf", "unpacked"):
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


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def main() -> int:
    """One step; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("prepare", "gguf", "gptqmodel", "measure"))
    parser.add_argument("source", help="a model's folder")
    for option in ("--work", "--path", "--report"):
        parser.add_argument(option, type=Path)
    parser.add_argument("--method")
    parser.add_argument("--importance", action="store_true")
    parser.add_argument("--bits", type=int)
    parser.add_argument("--group-size", type=int)
    args = parser.parse_args()
    if args.step == "prepare":
        prepare(args.source, args.work, args.importance)
    elif args.step == "gguf":
        from lowmem.export.export import export

        export(args.source, args.path)
    elif args.step == "gptqmodel":
        args.report.write_text(json.dumps(convert_with_gptqmodel(args)))
    else:
        args.report.write_text(json.dumps(measure(args.work, args.method, args.path, args.source)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
