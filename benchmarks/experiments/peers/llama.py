"""llama.cpp's part of `lowmem.benchmarks.experiments.peers.command`, run by an interpreter that has llama-cpp-python and numpy.

Through its C interface, token ids in and logits out; nothing of lowmem's dependencies need be there.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp as llama  # type: ignore[import-not-found]
import numpy as np
from lowmem.benchmarks.experiments.peers.worker import Round, Started, prompt_of, serve, timed

FILE_TYPES = {
    "BF16": 32, "F16": 1, "Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q4_K_M": 15, "Q4_K_S": 14, "Q4_0": 2,
    "Q3_K_M": 12, "Q2_K": 10, "IQ4_XS": 30, "IQ3_S": 26, "IQ3_XXS": 23, "IQ2_S": 28,
}  # fmt: skip
"""llama.h's llama_ftype, LLAMA_FTYPE_MOSTLY_*."""
TENSOR_TYPES = {"F32": 0, "F16": 1, "BF16": 30}
"""ggml.h's ggml_type."""


class Model:
    """One GGUF file and a context on the CPU.

    exact: float32 KV cache, no flash attention: what is measured then is the weights' quantization (and
    llama.cpp's of the activations). Otherwise llama.cpp's defaults. chunk: tokens of a prompt that go through
    a layer at once, the whole context unless given. Raises RuntimeError where it cannot load.
    """

    def __init__(
        self, file: Path, context: int, threads: int, *, exact: bool = False, chunk: int | None = None
    ) -> None:
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama.llama_model_load_from_file(str(file).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        settings = llama.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        if chunk:
            settings.n_ubatch = min(chunk, context)
        settings.n_threads = settings.n_threads_batch = threads
        if exact:
            settings.type_k = settings.type_v = TENSOR_TYPES["F32"]
            settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {context} tokens for {file}")
        self._batch = llama.llama_batch_init(context, 0, 1)
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))

    def clear(self) -> None:
        """Forget all tokens."""
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)

    def cut(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        llama.llama_memory_seq_rm(llama.llama_get_memory(self._context), 0, length, -1)

    def feed(self, tokens: Sequence[int], position: int, *, every: bool) -> np.ndarray[Any, Any]:
        """float32 logits [rows, vocabulary] after every token, or the last; valid until the next call."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = every or i == len(tokens) - 1
        if llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp cannot decode {len(tokens)} tokens at {position}")
        rows = len(tokens) if every else 1
        return np.ctypeslib.as_array(llama.llama_get_logits(self._context), (rows, self.vocabulary))

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        """Greedy: the first token after the prefill, and `count` more."""
        self.clear()
        token = int(self.feed(prompt, 0, every=False)[0].argmax())
        yield token
        for position in range(len(prompt), len(prompt) + count):
            token = int(self.feed([token], position, every=False)[0].argmax())
            yield token


def quantize(
    source: Path, out: Path, kind: str, threads: int, importance: Path | None, embedding: str | None
) -> dict[str, Any]:
    """Quantize a GGUF file to one of FILE_TYPES by llama.cpp's own recipe; what was set.

    importance: .npz of mean squared inputs, by tensor. embedding: type of the token embedding and the head.
    Raises RuntimeError where llama.cpp refuses.
    """
    params = llama.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, FILE_TYPES[kind]
    if embedding:
        params.token_embedding_type = params.output_tensor_type = TENSOR_TYPES[embedding]
    keep: list[Any] = []  # what the C structure points into
    if importance:
        with np.load(importance) as file:
            values = {name: np.ascontiguousarray(file[name], np.float32) for name in file.files}
        entries = (llama.llama_model_imatrix_data * (len(values) + 1))()  # ended by one without a name
        for entry, (name, data) in zip(entries, values.items(), strict=False):
            entry.name, entry.size = name.encode(), data.size
            entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            keep.append(data)
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama.llama_model_imatrix_data))
        keep.append(entries)
    if llama.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp cannot quantize to {kind}")
    return {"type": kind, "importance": bool(importance), "embedding": embedding or "llama.cpp's choice"}


def write_logits(file: Path, rows_file: Path, out: Path, threads: int) -> None:
    """Logits of token rows [rows, length] (.npy) → .npy, float32 [rows, length, vocabulary]."""
    rows = np.load(rows_file)
    model = Model(file, rows.shape[1], threads, exact=True)
    result = np.lib.format.open_memmap(
        out, mode="w+", dtype=np.float32, shape=(*rows.shape, model.vocabulary)
    )
    for row, logits in zip(rows, result, strict=True):
        model.clear()
        logits[:] = model.feed(row.tolist(), 0, every=True)
    result.flush()


def open_runtime(
    file: Path, threads: int, prompt_tokens: int, new_tokens: int, most_seconds: float
) -> tuple[Started, Callable[[], Round]]:
    """For `serve`."""
    start = time.perf_counter()
    model = Model(file, prompt_tokens + new_tokens + 1, threads)
    seconds = time.perf_counter() - start
    prompt = prompt_of(prompt_tokens, model.vocabulary)

    def run_round() -> Round:
        return timed(model.tokens(prompt, new_tokens), most_seconds)

    return Started(kernel_name(), seconds), run_round


def kernel_name() -> str:
    """The instruction sets beyond AVX2 that llama.cpp was built for, and whether it repacks weights."""
    info: str = llama.llama_print_system_info().decode()
    names = [part.split("=")[0].split(":")[-1].strip() for part in info.split("|") if "= 1" in part]
    kept = [name for name in names if name.startswith(("AVX512", "AVX_VNNI", "AMX", "NEON", "SVE", "REPACK"))]
    return " ".join(["llama.cpp", *kept])


def main(argv: Sequence[str] | None = None) -> int:
    """One step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=("quantize", "logits", "serve"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--type", choices=FILE_TYPES)
    parser.add_argument("--importance", type=Path)
    parser.add_argument("--embedding", choices=TENSOR_TYPES)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--most-seconds", type=float, default=20)
    args = parser.parse_args(argv)
    if args.step == "quantize":
        report = quantize(args.file, args.out, args.type, args.threads, args.importance, args.embedding)
        data = {"settings": report, "versions": {"llama-cpp-python": version("llama-cpp-python")}}
        args.report.write_text(json.dumps(data))
    elif args.step == "logits":
        write_logits(args.file, args.rows, args.out, args.threads)
    else:
        return serve(
            lambda: open_runtime(
                args.file, args.threads, args.prompt_tokens, args.new_tokens, args.most_seconds
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
