"""One model in lowmem, or in another library that lowmem loads, in a process that answers timing requests.

    python -m lowmem.benchmarks.experiments.workers.lowmem_worker METHOD PATH CONTEXT THREADS [SEQUENCES]

METHOD: dense, gptq (lowmem's kernels), gptq-head8 (and embedding and head in 8 bits), gptqmodel (GPTQModel's
kernels), int8 or nf4 (bitsandbytes).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lowmem.benchmarks.experiments.workers.protocol import gaps, prompt_of, prompts_of, serve
from lowmem.benchmarks.latency.together import step_seconds

from lowmem.config import SamplingParams
from lowmem.errors import LowmemError
from lowmem.generate.decoders.contract import Feed
from lowmem.generate.engine import Engine
from lowmem.kernels import dispatch
from lowmem.kernels.native import library as native
from lowmem.kernels.native.linear import Packed
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.kernels.registry import gptqmodel_kernels
from lowmem.loading.loader import LoadedModel, LoadOptions, load
from lowmem.models.embedding import token_table
from lowmem.session import Session

_LARGE = 1 << 20  # bytes; smaller tensors are left out of the reads


@dataclass(frozen=True)
class Batch:
    """Decode steps between two reads of the bytes that a step reads."""

    before: float
    """Bytes a second of a read of the model's own weights, just before."""
    seconds: tuple[float, ...]
    """Of each step."""
    after: float
    """Like `before`, just after."""
    buffer: float
    """Bytes a second of a read of other memory, after that."""


class Runtime:
    """One model. The KV cache is kept between two requests."""

    def __init__(self, loaded: LoadedModel, context: int, sequences: int = 1, kernel: str = "") -> None:
        self.loaded = loaded
        self.kernel = f"{kernel or loaded.kernel}, {str(loaded.dtype).removeprefix('torch.')}"
        self.load_seconds = loaded.load_seconds
        self.engine: Engine = Session(loaded, context=context, slots=sequences, speculate=False).engine
        self.engine.stop_ids = frozenset()  # no token ends an answer
        self.engine.repacking.finish()  # repack all weights now, not between tokens; load.py times that
        self.vocabulary = token_table(loaded.model).vocabulary

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Seconds from a prompt of `tokens` to its first new token, from an empty KV cache."""
        self.engine.reset()
        start = time.perf_counter()
        next(self._generate(tokens, 1))
        return {"seconds": time.perf_counter() - start}

    def decode(self, context: int, tokens: int, most_seconds: float = 1e9) -> dict[str, Any]:
        """Seconds of each of `tokens` tokens after a context; stops after `most_seconds` of them."""
        return {"seconds": gaps(self._generate(context, tokens + 1), most_seconds)}

    def rows(self, context: int, rows: int, steps: int) -> dict[str, Any]:
        """Seconds of decode steps of one row and of several, in turns."""
        next(self._generate(context, 1))
        slot = self.engine.cache.slots[0]
        seconds: dict[int, list[float]] = {1: [], rows: []}
        ids = prompt_of(max(rows, 2), self.vocabulary)
        for _ in range(steps):
            for count, kept in seconds.items():
                slot.cut(context)
                start = time.perf_counter()
                # As in a step, tokens are chosen from the logits on the host.
                self.engine.decoder.step([Feed(slot, ids[:count])]).logits[0].argmax(-1).tolist()
                kept.append(time.perf_counter() - start)
        slot.cut(context)
        return {"one": seconds[1], "many": seconds[rows]}

    def together(self, sequences: int, context: int, steps: int) -> dict[str, Any]:
        """Seconds of decode steps of several sequences, each of them behind a prompt of its own."""
        self.engine.reset()
        prompts = prompts_of(sequences, context, self.vocabulary)
        return {"seconds": step_seconds(self.engine, prompts, steps)}

    def first_token(self, prompt: int, beside: int) -> dict[str, Any]:
        """Seconds to the first token of a prompt, while another of `beside` tokens (0: none) is read.

        It comes when a part of the other has just begun, so that this part is waited for.
        """
        self.engine.reset()
        long, short = prompts_of(2, max(prompt, beside), self.vocabulary)
        greedy = SamplingParams(temperature=0, max_new_tokens=4)
        other = self.engine.start(long[:beside], greedy) if beside else None
        for _ in range(3 if other else 0):
            self.engine.advance()
        start = time.perf_counter()
        self.engine.advance()
        sequence = self.engine.start(short[:prompt], greedy)
        while not sequence.tokens:
            self.engine.advance()
        seconds = time.perf_counter() - start
        if other is not None and not other.reads:
            raise RuntimeError("the long prompt was read too soon")
        self.engine.reset()
        return {"seconds": seconds}

    def share(self, context: int, steps: int, batches: int) -> dict[str, Any]:
        """Batches of decode steps between reads, and the bytes that a step reads."""
        self.decode(context, 2)
        self.__dict__.pop("_read_tensors", None)  # the first steps may have moved them
        found = []
        for _ in range(batches):
            before = self._read_rate()
            seconds = tuple(self.decode(context, steps)["seconds"])
            found.append(asdict(Batch(before, seconds, self._read_rate(), self._buffer_rate())))
        return {"bytes": sum(self.bytes(context + steps // 2).values()), "batches": found}

    def bytes(self, context: int) -> dict[str, int]:
        """Bytes that a decode step reads at this context, by part, counted from the model."""
        packed = [module for module in self.loaded.model.modules() if isinstance(module, QuantLinear)]
        config = self.loaded.model.config.get_text_config()
        head_size = config.hidden_size // config.num_attention_heads
        kv_heads = 1 if getattr(config, "multi_query", False) else config.num_key_value_heads
        everything = [*self.loaded.model.parameters(), *self.loaded.model.buffers()]
        tensors = {
            "packed": [_weights(linear)[0] for linear in packed],
            "scales": [_weights(linear)[1] for linear in packed],
            "head": [self.loaded.model.get_output_embeddings().weight],
            "vectors": [p for p in everything if p.dim() == 1 and p.is_floating_point()],
        }
        found = {name: sum(tensor.nbytes for tensor in some) for name, some in tensors.items()}
        kv_width = 2 * kv_heads * head_size * self.loaded.dtype.itemsize
        return found | {"kv": config.num_hidden_layers * kv_width * context}

    @cached_property
    def _read_tensors(self) -> list[torch.Tensor]:
        """The large tensors that a step reads, each once."""
        model = self.loaded.model
        head = model.get_output_embeddings().weight.detach()
        found = {head.data_ptr(): head}
        for module in model.modules():
            if isinstance(module, QuantLinear):
                found |= {tensor.data_ptr(): tensor for tensor in _weights(module)}
        return [tensor for tensor in found.values() if tensor.nbytes >= _LARGE]

    @cached_property
    def _buffer(self) -> torch.Tensor:
        return torch.ones(sum(tensor.nbytes for tensor in self._read_tensors) // 8, dtype=torch.int64)

    def _read_rate(self) -> float:
        start = time.perf_counter()
        for tensor in self._read_tensors:
            native.read(tensor)
        return sum(tensor.nbytes for tensor in self._read_tensors) / (time.perf_counter() - start)

    def _buffer_rate(self) -> float:
        buffer = self._buffer
        start = time.perf_counter()
        native.read(buffer)
        return buffer.nbytes / (time.perf_counter() - start)

    def _generate(self, context: int, tokens: int) -> Iterator[Any]:
        params = SamplingParams(max_new_tokens=tokens, temperature=0)
        return self.engine.generate(prompt_of(context, self.vocabulary), params)


def weights_of(packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensors that the kernels read of a linear: packed words and scales, wherever they are now."""
    words, scales = packed._tensors[:2]
    assert words is not None and scales is not None
    return words, scales


def _weights(linear: QuantLinear) -> tuple[torch.Tensor, torch.Tensor]:
    return (linear.qweight, linear.scales) if linear.packed is None else weights_of(linear.packed)


def open_runtime(method: str, path: Path, context: int, threads: int, sequences: int = 1) -> Runtime:
    """Load a model for `serve`. Raises LowmemError where that cannot be done."""
    torch.set_num_threads(threads)
    on_the_fly: Any = method if method in ("int8", "nf4") else None
    head_bits = 8 if method == "gptq-head8" else 16
    loaded = load(path, LoadOptions(on_the_fly=on_the_fly, context=context, head_bits=head_bits))
    kernel = ""
    if method == "gptqmodel":
        if loaded.format is None:
            raise LowmemError(f"{path} is not quantized")
        specs = dispatch.linear_specs(loaded.model, "cpu")
        kernels = gptqmodel_kernels(list(specs.values()), torch.device("cpu"))
        kernel = dispatch.replace_linears(loaded.model, specs, kernels, loaded.dtype).name
    return Runtime(loaded, context, sequences, kernel)


def main(argv: Sequence[str]) -> int:
    """The worker; the exit code."""
    method, path, *numbers = argv
    return serve(lambda: open_runtime(method, Path(path), *map(int, numbers)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
