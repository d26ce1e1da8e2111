"""Checkpoints that lowmem does not read, recognised by config, files and tensors, and named. Needs no torch.

plan, run, serve, convert and verify refuse them in the same words, from headers alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.errors import ForeignError

HINT = "Use the 16-bit original (`lowmem convert` makes a GPTQ version of it), or a GPTQ or GGUF version"
_METHODS = {
    "aqlm": "AQLM",
    "awq": "AWQ",
    "bitblas": "BitBLAS",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors (llm-compressor)",
    "eetq": "EETQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "fbgemm_fp8": "FP8",
    "fouroversix": "Four Over Six",
    "fp8": "FP8",
    "fp_quant": "FP-Quant",
    "gguf": "GGUF",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "marlin": "Marlin",
    "metal": "Metal",
    "mlx": "MLX",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "paroquant": "ParoQuant",
    "qqq": "QQQ",
    "quanto": "Quanto",
    "quark": "Quark",
    "quip": "QuIP#",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "squeezellm": "SqueezeLLM",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
# (suffixes of tensor names that all occur, method): what a method stores in place of a weight.
_TENSORS = (
    ((".q_weight", ".q_scale"), "EXL2"),
    ((".trellis",), "EXL3"),
    ((".codes", ".codebooks"), "AQLM"),
    ((".Qidxs",), "QuIP#"),
    ((".W_q",), "HQQ"),
    ((".indices", ".centroids.weight"), "VPTQ"),
    ((".dense_weights", ".row_offsets"), "SpQR"),
    ((".weight.absmax",), "bitsandbytes"),
    ((".SCB",), "bitsandbytes"),
    ((".weight_packed", ".weight_scale"), "compressed-tensors (llm-compressor)"),
    ((".weight._data", ".weight._scale"), "Quanto"),
    ((".weight_scale_inv",), "FP8"),
    ((".weight_scale",), "FP8 or BitNet"),
    ((".weight", ".scales", ".biases"), "MLX"),
    ((".B", ".s"), "Marlin"),
)
_OLD_GGML = (b"lmgg", b"fmgg", b"tjgg", b"algg")
"""The first bytes of GGML files before GGUF, of 2023."""
_OTHER_WEIGHTS = {
    ".onnx": "ONNX",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".ckpt": "a training framework's",
    ".pth": "the original PyTorch layout's",
    ".npz": "NumPy or MLX",
    ".mlmodel": "Core ML",
    ".tflite": "TensorFlow Lite",
    ".engine": "TensorRT",
}


@dataclass(frozen=True)
class Foreign:
    """Why a checkpoint cannot be read, and the next step."""

    problem: str
    hint: str = HINT

    def error(self, where: object) -> ForeignError:
        """The error of a file or folder."""
        return ForeignError(f"{where}: {self.problem}", self.hint)


def refuse_foreign(path: Path, config: Mapping[str, Any], display: str = "") -> None:
    """Raise ForeignError for a folder (or weight file) whose config or files are another method's.

    config: the object in its config.json. display: its name in the message; the path, if it is "".
    """
    folder = path.parent if path.is_file() else path
    found = foreign_config(config) or _foreign_files(folder)
    if found:
        raise found.error(display or path)


def foreign_config(config: Mapping[str, Any]) -> Foreign | None:
    """What the object in a config.json says about a method that cannot be read."""
    mlx = config.get("quantization")
    if isinstance(mlx, Mapping) and "bits" in mlx:
        return _named("MLX")
    if config.get("compression_config"):
        return _named("compressed-tensors (llm-compressor)")
    if config.get("quip_params"):
        return _named("QuIP#")
    settings = config.get("quantization_config")
    return foreign_method(settings) if isinstance(settings, Mapping) else None


def foreign_method(settings: Mapping[str, Any]) -> Foreign | None:
    """The same of a `quantization_config`; None for GPTQ's, and for one of which the method is not known."""
    method = str(settings.get("quant_method") or settings.get("method") or "").lower()
    layout = str(settings.get("checkpoint_format") or settings.get("format") or "").lower()
    if not method:
        if any(
            settings.get(key) for key in ("load_in_4bit", "_load_in_4bit", "load_in_8bit", "_load_in_8bit")
        ):
            return _named("bitsandbytes")
        if "zero_point" in settings or str(settings.get("version")).lower() in ("gemm", "gemv", "marlin"):
            return _named("AWQ")
        if "quant_algo" in settings or isinstance(settings.get("quantization"), Mapping):
            return _named("ModelOpt")
    if method == "gptq" and layout in _METHODS:
        return _named(f"{_METHODS[layout]}'s layout")
    name = _METHODS.get(method.replace("_", "-")) or _METHODS.get(method)
    return _named(name) if name else None


def _foreign_files(folder: Path) -> Foreign | None:
    """What files beside config.json say."""
    if (folder / "hf_quant_config.json").is_file():
        return _named("ModelOpt")
    if (folder / "quant_config.json").is_file() and not (folder / "quantize_config.json").is_file():
        return _named("AWQ")
    return _named("HQQ") if (folder / "qmodel.pt").is_file() else None


def foreign_tensors(names: Iterable[str]) -> Foreign | None:
    """The method that tensors of these names are of; None for those of 16-bit and of GPTQ checkpoints."""
    endings: set[str] = set()
    for name in names:
        parts = name.split(".")
        endings.update("." + ".".join(parts[-count:]) for count in (1, 2) if len(parts) > count)
    if ".qweight" in endings:
        return None
    return next((_named(method) for suffixes, method in _TENSORS if endings.issuperset(suffixes)), None)


def check_disguise(path: Path) -> None:
    """Raise ForeignError for a GGUF or an older GGML file whose name says that it is something else."""
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError:
        return  # the reader of the file says what is wrong
    if magic == b"GGUF" and path.suffix != ".gguf":
        raise ForeignError(
            f"{path.name} is a GGUF file under another name",
            f"Rename it to {path.stem}.gguf, and give that file",
        )
    if magic in _OLD_GGML:
        raise ForeignError(f"{path.name} is a GGML file from before GGUF, which lowmem does not read", HINT)


def other_weights(names: Iterable[str]) -> str:
    """The weights among these files that cannot be read, as "ONNX weights only (model.onnx)"; "" for none."""
    for name in names:
        for suffix, framework in _OTHER_WEIGHTS.items():
            if name.lower().endswith(suffix):
                return f"{framework} weights only ({name})"
    return ""


def _named(method: str) -> Foreign:
    return Foreign(f"it is quantized in {method}, which lowmem does not read")
