"""Figures of the server: a log line per request, and Prometheus metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lowmem.plan.device import MemoryUse
from lowmem.server.worker import Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2)
_KEY = "lowmem.note"
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


@dataclass
class Note:
    """What log and metrics record of a request. It contains no text of the request."""

    id: str
    method: str
    client: str
    start: float = field(default_factory=time.monotonic)
    route: str = "-"
    """The route that matched; "-" for an unknown path."""
    status: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    reason: str = ""
    """Why the answer ended."""

    def line(self) -> str:
        """The log line."""
        parts = [time.strftime("%H:%M:%S"), self.method, self.route, str(self.status)]
        if self.prompt_tokens:
            parts.append(f"{self.prompt_tokens} ({self.cached_tokens} cached) + {self.new_tokens} tokens")
        parts.append(f"{time.monotonic() - self.start:.2f} s")
        if self.reason:
            parts.append(self.reason)
        return " ".join([*parts, self.client, self.id])


def put_note(scope: MutableMapping[str, Any], note: Note) -> None:
    """Store a request's note in its ASGI scope."""
    scope[_KEY] = note


def note_of(scope: MutableMapping[str, Any]) -> Note:
    """The note of a request."""
    note: Note = scope[_KEY]
    return note


class Metrics:
    """Counters and histograms in their own registry."""

    def __init__(self, worker: Worker, memory: Callable[[], MemoryUse]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "lowmem_requests", "Answered requests", ("method", "route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "lowmem_request_seconds",
            "Time from the arrival of a request to its end",
            ("route",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._tokens = {
            name: Counter(f"lowmem_{name}_tokens", text, registry=self._registry)
            for name, text in (
                ("prompt", "Prompt tokens"),
                ("cached", "Prompt tokens that were in the KV cache"),
                ("completion", "Tokens of answers"),
            )
        }
        self._first = Histogram(
            "lowmem_time_to_first_token_seconds",
            "Time from the arrival of a request to its first token, including the queue",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._each = Histogram(
            "lowmem_time_per_token_seconds",
            "Mean time per token of an answer, after the first token",
            buckets=_TOKEN_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_Gauges(worker, memory))

    def ended(self, note: Note) -> None:
        """Record the end of a request."""
        method = note.method if note.method in _METHODS else "other"
        self._requests.labels(method, note.route, str(note.status)).inc()
        self._seconds.labels(note.route).observe(time.monotonic() - note.start)
        self._tokens["prompt"].inc(note.prompt_tokens)
        self._tokens["cached"].inc(note.cached_tokens)
        self._tokens["completion"].inc(note.new_tokens)

    def first_token(self, seconds: float) -> None:
        """Record the time to a first token."""
        self._first.observe(seconds)

    def decode_speed(self, tokens_per_second: float) -> None:
        """Record the decode speed of an answer."""
        if tokens_per_second > 0:
            self._each.observe(1 / tokens_per_second)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    """Metrics that are read from the worker and the process on request."""

    def __init__(self, worker: Worker, memory: Callable[[], MemoryUse]) -> None:
        self._worker, self._memory = worker, memory

    def collect(self) -> Iterable[Metric]:
        counts, memory = self._worker.counts, self._memory()
        yield GaugeMetricFamily("lowmem_queue_length", "Waiting requests", self._worker.waiting)
        yield GaugeMetricFamily("lowmem_busy", "1 while an answer is generated", int(self._worker.busy))
        yield GaugeMetricFamily("lowmem_running", "Answers that are being generated", self._worker.running)
        yield GaugeMetricFamily("lowmem_slots", "Answers at once, at most", self._worker.slots)
        yield GaugeMetricFamily("lowmem_resident_memory_bytes", "Resident memory of the process", memory.host)
        yield GaugeMetricFamily("lowmem_card_memory_bytes", "Memory allocated on the card", memory.card)
        yield CounterMetricFamily("lowmem_answers", "Completed answers", counts.answers)
        yield CounterMetricFamily(
            "lowmem_cancelled",
            "Answers cancelled by their client or the time limit",
            counts.cancelled,
        )
        yield CounterMetricFamily("lowmem_failed", "Answers that ended in an internal error", counts.failed)
        yield CounterMetricFamily("lowmem_generated_tokens", "Generated tokens, sent or not", counts.tokens)
        yield CounterMetricFamily("lowmem_drafted_tokens", "Tokens that were drafted", counts.drafted)
        yield CounterMetricFamily("lowmem_accepted_tokens", "Drafted tokens that were right", counts.accepted)
