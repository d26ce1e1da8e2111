"""llama.cpp's part of the experiments. Run by path, in an interpreter that has llama-cpp-python and numpy.

It uses llama.cpp's C interface, token ids in and logits out. lowmem is not imported: it need not be installed
there.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp as llama  # type: ignore[import-not-found]
import numpy as np
from protocol import gaps, prompt_of, prompts_of, serve  # type: ignore[import-not-found]  # the file beside this one

FILE_TYPES = {
    "BF16": 32, "F16": 1, "Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q5_K_S": 16, "Q5_0": 8, "Q4_K_M": 15,
    "Q4_K_S": 14, "Q4_0": 2, "Q3_K_L": 13, "Q3_K_M": 12, "Q3_K_S": 11, "Q2_K": 10, "Q2_K_S": 21,
    "IQ4_NL": 25, "IQ4_XS": 30, "IQ3_M": 27, "IQ3_S": 26, "IQ3_XS": 22, "IQ3_XXS": 23, "IQ2_M": 29,
    "IQ2_S": 28, "IQ2_XS": 20, "IQ2_XXS": 19,
}  # fmt: skip
"""llama.h's llama_ftype, LLAMA_FTYPE_MOSTLY_*."""
TENSOR_TYPES = {"F32": 0, "F16": 1, "BF16": 30}
"""ggml.h's ggml_type."""
CHUNK = 512
"""Prompt tokens in one forward pass: llama.cpp's own default."""


class Model:
    """One GGUF file and a context on the CPU. Raises RuntimeError if llama.cpp cannot load it.

    context: tokens of each of `sequences` sequences. exact: keep the KV cache in float32 and use no flash
    attention, so that only llama.cpp's quantization of weights and activations shows in the logits. Otherwise
    llama.cpp's defaults apply.
    """

    def __init__(
        self, file: Path, context: int, threads: int, sequences: int = 1, *, exact: bool = False
    ) -> None:
        start = time.perf_counter()
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama.llama_model_load_from_file(str(file).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        settings = llama.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_seq_max = context * sequences, context, sequences
        settings.n_ubatch = context if exact else min(CHUNK, context)
        settings.n_threads = settings.n_threads_batch = threads
        if exact:
            settings.type_k = settings.type_v = TENSOR_TYPES["F32"]
            settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {context} tokens for {file}")
        self._batch = llama.llama_batch_init(context, 0, 1)
        self._held = 0  # tokens in the KV cache
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self.kernel = kernel_name()
        self.load_seconds = time.perf_counter() - start

    def feed(self, tokens: Sequence[int], *, every: bool = False) -> Any:
        """float32 logits [rows, vocabulary] after the last token or every one, valid until the next call."""
        logits = self._decode([(token, self._held + i, 0) for i, token in enumerate(tokens)], every)
        self._held += len(tokens)
        return logits

    def _decode(self, rows: Sequence[tuple[int, int, int]], every: bool) -> Any:
        """One forward of rows (token, position, sequence)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = every or i == len(rows) - 1
        if llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp cannot decode {len(rows)} tokens at {rows[0][1]}")
        shape = len(rows) if every else 1, self.vocabulary
        return np.ctypeslib.as_array(llama.llama_get_logits(self._context), shape)

    def cut(self, length: int) -> None:
        """Keep only the first `length` tokens in the KV cache."""
        llama.llama_memory_seq_rm(llama.llama_get_memory(self._context), 0, length, -1)
        self._held = length

    def hold(self, context: int) -> None:
        """Have exactly the prompt of `context` tokens in the KV cache."""
        if self._held < context:
            self.cut(0)
            self.feed(prompt_of(context, self.vocabulary))
        self.cut(context)

    # --- requests: see lowmem_worker.Runtime ---

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Seconds from a prompt of `tokens` to its first new token, from an empty KV cache."""
        self.cut(0)
        start = time.perf_counter()
        int(self.feed(prompt_of(tokens, self.vocabulary))[0].argmax())
        return {"seconds": time.perf_counter() - start}

    def decode(self, context: int, tokens: int, most_seconds: float = 1e9) -> dict[str, Any]:
        """Seconds of each greedy token after a context."""
        self.hold(context)
        return {"seconds": gaps(self._greedy(tokens), most_seconds)}

    def _greedy(self, tokens: int) -> Iterator[int]:
        token = 1
        yield token
        for _ in range(tokens):
            token = int(self.feed([token])[0].argmax())
            yield token

    def rows(self, context: int, rows: int, steps: int) -> dict[str, Any]:
        """Seconds of decode steps of one row and of several, in turns."""
        self.hold(context)
        seconds: dict[int, list[float]] = {1: [], rows: []}
        for _ in range(steps):
            for count, kept in seconds.items():
                start = time.perf_counter()
                self.feed(prompt_of(count, self.vocabulary), every=True)
                kept.append(time.perf_counter() - start)
                self.cut(context)
        return {"one": seconds[1], "many": seconds[rows]}

    def together(self, sequences: int, context: int, steps: int) -> dict[str, Any]:
        """Seconds of decode steps of several sequences, each of them behind a prompt of its own."""
        self._empty(sequences)
        prompts = prompts_of(sequences, context, self.vocabulary)
        for sequence, ids in enumerate(prompts):
            self._decode([(token, place, sequence) for place, token in enumerate(ids)], False)
        tokens, seconds = [1] * sequences, []
        for position in range(context, context + steps):
            start = time.perf_counter()
            rows = [(token, position, sequence) for sequence, token in enumerate(tokens)]
            tokens = self._decode(rows, True).argmax(axis=1).tolist()
            seconds.append(time.perf_counter() - start)
        self._empty(sequences)
        return {"seconds": seconds}

    def _empty(self, sequences: int) -> None:
        for sequence in range(sequences):
            llama.llama_memory_seq_rm(llama.llama_get_memory(self._context), sequence, 0, -1)
        self._held = 0


def kernel_name() -> str:
    """The instruction sets beyond AVX2 that llama.cpp was built for, and whether it repacks weights."""
    info: str = llama.llama_print_system_info().decode()
    names = [part.split("=")[0].split(":")[-1].strip() for part in info.split("|") if "= 1" in part]
    kept = [name for name in names if name.startswith(("AVX512", "AVX_VNNI", "AMX", "NEON", "SVE", "REPACK"))]
    return " ".join(["llama.cpp", *kept])


def quantize(args: argparse.Namespace) -> dict[str, Any]:
    """Quantize a GGUF file by llama.cpp's own recipe; its settings. RuntimeError if llama.cpp refuses."""
    params = llama.llama_model_quantize_default_params()
    params.nthread, params.ftype = args.threads, FILE_TYPES[args.type]
    if args.embedding:
        params.token_embedding_type = params.output_tensor_type = TENSOR_TYPES[args.embedding]
    values: dict[str, Any] = {}  # outlives the C structure that points into it
    if args.importance:
        with np.load(args.importance) as file:
            values = {name: np.ascontiguousarray(file[name], np.float32) for name in file.files}
        entries = (llama.llama_model_imatrix_data * (len(values) + 1))()  # the last has no name: the end
        for entry, (name, data) in zip(entries, values.items(), strict=False):
            entry.name, entry.size = name.encode(), data.size
            entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama.llama_model_imatrix_data))
    if llama.llama_model_quantize(str(args.file).encode(), str(args.out).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp cannot quantize to {args.type}")
    settings = {"type": args.type, "importance": bool(args.importance)}
    settings["embedding"] = args.embedding or "llama.cpp's choice"
    return {"settings": settings, "versions": {"llama-cpp-python": version("llama-cpp-python")}}


def write_logits(args: argparse.Namespace) -> None:
    """Logits of the token rows [rows, length] of --rows, to --out: float32 [rows, length, vocabulary]."""
    rows = np.load(args.rows)
    model = Model(args.file, rows.shape[1], args.threads, exact=True)
    shape = (*rows.shape, model.vocabulary)
    result = np.lib.format.open_memmap(args.out, mode="w+", dtype=np.float32, shape=shape)
    for row, logits in zip(rows, result, strict=True):
        model.cut(0)
        logits[:] = model.feed(row.tolist(), every=True)
    result.flush()


def main() -> int:
    """One step; the exit code."""
    parser = argparse.ArgumentParser(description="Quantize, compute logits, or serve timing requests.")
    parser.add_argument("step", choices=("quantize", "logits", "serve"))
    parser.add_argument("file", type=Path, help="a GGUF file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the GGUF or .npy file to write")
    parser.add_argument("--report", type=Path, help="of a quantization: the JSON file to write settings to")
    parser.add_argument("--type", choices=FILE_TYPES)
    parser.add_argument("--importance", type=Path, help=".npz of mean squared inputs, by tensor")
    parser.add_argument("--embedding", choices=TENSOR_TYPES, help="type of the token embedding and the head")
    parser.add_argument("--rows", type=Path, help=".npy of token rows")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=1, help="at once, `--context` tokens each")
    args = parser.parse_args()
    if args.step == "serve":
        return int(serve(lambda: Model(args.file, args.context, args.threads, args.sequences)))
    if args.step == "quantize":
        args.report.write_text(json.dumps(quantize(args)))
    else:
        write_logits(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
