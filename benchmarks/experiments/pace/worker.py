"""Our worker of `lowmem.benchmarks.experiments.pace.command`: one model in a process of its own, asked again and again."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lowmem.benchmarks.experiments.pace.linears import weights
from lowmem.benchmarks.experiments.peers.worker import Started, answer_requests, prompt_of

from lowmem.config import SamplingParams
from lowmem.generate.decoders.contract import Feed
from lowmem.generate.engine import Engine
from lowmem.kernels.native import library as native
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.loading.loader import LoadedModel, load
from lowmem.session import Session

_LARGE = 1 << 20  # a tensor's bytes from which on it is worth a read of its own


@dataclass(frozen=True)
class Batch:
    """Steps of decoding between two reads of as many bytes. before, after: bytes a second, of the model's own
    weights where they lie; buffer: of other memory, after that."""

    before: float
    seconds: tuple[float, ...]
    after: float
    buffer: float


class Runtime:
    """One model; what the cache holds stays between two requests."""

    def __init__(self, loaded: LoadedModel, context: int) -> None:
        self.loaded = loaded
        self.engine: Engine = Session(loaded, context=context, speculate=False).engine
        self.engine.stop_ids = frozenset()  # no token ends an answer
        self.engine.repacking.finish()  # as after the first answer; see pace_load for what it takes
        self.vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])

    def answer(self, line: str) -> dict[str, Any]:
        """The answer to {"what": prefill, decode, rows, share or bytes, …}: see the methods."""
        request = json.loads(line)
        found: dict[str, Any] = getattr(self, f"do_{request.pop('what')}")(**request)
        return found

    def do_prefill(self, tokens: int) -> dict[str, Any]:
        """Seconds to the first token of a prompt of so many, from an empty cache."""
        self.engine.reset()
        start = time.perf_counter()
        next(self._generate(tokens, 1))
        return {"seconds": time.perf_counter() - start}

    def do_decode(self, context: int, tokens: int) -> dict[str, Any]:
        """Seconds of each of so many tokens after a context."""
        return {"seconds": list(self._gaps(context, tokens))}

    def do_rows(self, context: int, rows: int, steps: int) -> dict[str, Any]:
        """Seconds of steps of one row and of several through the engine's forward, in turns."""
        next(self._generate(context, 1))
        one: list[float] = []
        many: list[float] = []
        ids = prompt_of(max(rows, 2), self.vocabulary)
        slot = self.engine.cache.slots[0]
        for _ in range(steps):
            for count, kept in ((1, one), (rows, many)):
                slot.cut(context)
                start = time.perf_counter()
                # As in a step: the choices are made from the logits on the host.
                self.engine.decoder.step([Feed(slot, ids[:count])]).logits[0].argmax(-1).tolist()
                kept.append(time.perf_counter() - start)
        slot.cut(context)
        return {"one": one, "many": many}

    def do_share(self, context: int, steps: int, batches: int) -> dict[str, Any]:
        """Batches of decoding between reads, and the bytes that a step reads."""
        list(self._gaps(context, 2))
        self.__dict__.pop("_read_tensors", None)  # the first steps may have moved them
        found = []
        for _ in range(batches):
            before = self._read_rate()
            seconds = tuple(self._gaps(context, steps))
            found.append(asdict(Batch(before, seconds, self._read_rate(), self._buffer_rate())))
        return {"bytes": self.do_bytes(context + steps // 2)["total"], "batches": found}

    def do_bytes(self, context: int) -> dict[str, Any]:
        """Bytes that a step at this context reads, counted from the model."""
        packed = [module for module in self.loaded.model.modules() if isinstance(module, QuantLinear)]
        config = self.loaded.model.config.get_text_config()
        head_size = config.hidden_size // config.num_attention_heads
        kv_heads = 1 if getattr(config, "multi_query", False) else config.num_key_value_heads
        tensors = {
            "packed": [_weights(linear)[0] for linear in packed],
            "scales": [_weights(linear)[1] for linear in packed],
            "head": [self.loaded.model.get_output_embeddings().weight],
            "vectors": [p for p in self._tensors() if p.dim() == 1 and p.is_floating_point()],
        }
        found = {name: sum(tensor.nbytes for tensor in some) for name, some in tensors.items()}
        kv_width = 2 * kv_heads * head_size * self.loaded.dtype.itemsize
        found["kv"] = config.num_hidden_layers * kv_width * context
        return {**found, "total": sum(found.values())}

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from self.loaded.model.parameters()
        yield from self.loaded.model.buffers()

    @cached_property
    def _read_tensors(self) -> list[torch.Tensor]:
        """What a step reads, without what is too small to matter; nothing twice."""
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

    def _gaps(self, context: int, tokens: int) -> Iterator[float]:
        last = 0.0
        for count, _ in enumerate(self._generate(context, tokens + 1)):
            now = time.perf_counter()
            if count:
                yield now - last
            last = time.perf_counter()


def _weights(linear: QuantLinear) -> tuple[torch.Tensor, torch.Tensor]:
    return (linear.qweight, linear.scales) if linear.packed is None else weights(linear.packed)


def opened(folder: Path, context: int, threads: int) -> tuple[Started, Callable[[str], dict[str, Any]]]:
    """For `answer_requests`."""
    torch.set_num_threads(threads)
    loaded = load(folder, context=context)
    kernel = f"{loaded.kernel}, {str(loaded.dtype).removeprefix('torch.')}"
    return Started(kernel, loaded.load_seconds), Runtime(loaded, context).answer


def main(argv: Sequence[str]) -> int:
    """The worker: FOLDER CONTEXT THREADS."""
    folder, context, threads = argv
    return answer_requests(lambda: opened(Path(folder), int(context), int(threads)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
