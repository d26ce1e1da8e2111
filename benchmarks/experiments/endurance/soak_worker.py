"""The two processes that `soak` watches, and how each counts what it holds.

`session`: random turns on lowmem's Session; answers requests (`workers/protocol.py`). `terminal`: `lowmem
run` as it is, which also appends a census to a file on SIGUSR1.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lowmem.benchmarks.experiments.workers.protocol import serve

GREEDY_ANSWER = 24  # tokens of the question that ends every round, so that samples are of the same state
_STORE = 2 << 20  # bytes of the prefix store: room for a few of a small model's sequences, so that some go


@dataclass(frozen=True)
class Census:
    """What a process holds, by its own account. Sizes are bytes."""

    rss: int
    """Resident."""
    pss: int
    """The same, shared pages counted in shares."""
    anonymous: int
    """Resident pages without a file: a leak shows here."""
    private: int
    """Pages of this process alone."""
    shared: int
    heap: int
    """Allocated by malloc and not freed."""
    descriptors: int
    threads: int
    objects: int
    """Known to Python's collector."""
    blocks: int
    """Of Python's allocator."""
    tensors: int
    tensor_bytes: int
    """Of their storages."""
    cached: int
    """KV caches and prefix stores among them."""
    types: dict[str, int]
    """Objects by type."""


_MALLINFO = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO.split())


def rebuild_interned() -> None:
    """Have Python resize its table of interned strings now, instead of at a random minute.

    The table counts freed strings too. Once full, it is rebuilt for three times the strings that are left:
    3.7 MiB more, once in the life of a process.
    """
    for number in range(200_000):
        sys.intern(f"made up {number}")


def take_census() -> Census:
    """Count now, memory first, so that the counting does not show in it."""
    rollup = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, _, amount = line.partition(":")
        rollup[name] = int(amount.split()[0]) * 1024
    descriptors = len(os.listdir("/proc/self/fd")) - 1  # less that of the listing
    threads = len(os.listdir("/proc/self/task"))
    gc.collect()
    heap, blocks = _heap(), sys.getallocatedblocks()
    types: Counter[type] = Counter()
    found: list[Any] = []
    tensor, caches = _kinds()
    for thing in gc.get_objects():
        kind = type(thing)
        types[kind] += 1
        if issubclass(kind, (tensor, *caches)):
            found.append(thing)
    storages = dict(pair for thing in found if isinstance(thing, tensor) and (pair := _storage(thing)))
    return Census(
        rss=rollup["Rss"],
        pss=rollup["Pss"],
        anonymous=rollup["Anonymous"],
        private=rollup["Private_Clean"] + rollup["Private_Dirty"],
        shared=rollup["Shared_Clean"] + rollup["Shared_Dirty"],
        heap=heap,
        descriptors=descriptors,
        threads=threads,
        objects=types.total(),
        blocks=blocks,
        tensors=sum(isinstance(thing, tensor) for thing in found),
        tensor_bytes=sum(storages.values()),
        cached=sum(thing.nbytes for thing in found if isinstance(thing, caches)),
        types=dict(_by_name(types)),
    )


def _by_name(types: Counter[type]) -> Counter[str]:
    names: Counter[str] = Counter()
    for kind, count in types.items():
        names[f"{kind.__module__}.{kind.__qualname__}"] += count
    return names


def _heap() -> int:
    """Bytes allocated by malloc; 0 where the C library does not say."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return 0
    library.mallinfo2.restype = _Mallinfo
    info = library.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def _storage(tensor: Any) -> tuple[int, int] | None:
    """The identity of a tensor's storage and its bytes; None for a tensor without one, such as a sparse one.

    The storage object's address is the identity: wrapper tensors have no data address.
    """
    if tensor.device.type == "meta":
        return None
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # torch raises these for such a tensor
        return None
    return storage._cdata, storage.nbytes()


def _kinds() -> tuple[Any, tuple[Any, ...]]:
    """The types of tensors, and of lowmem's stores of them."""
    import torch

    from lowmem.generate.cache.contract import KVCache
    from lowmem.generate.prefix_store import PrefixStore

    return torch.Tensor, (KVCache, PrefixStore)


class SessionRound:
    """Turns of every kind on one Session, drawn from the dice."""

    def __init__(self, session: Any, folder: Path, dice: random.Random, *, new_tokens: int = 40) -> None:
        from lowmem.chat.conversation import Conversation
        from lowmem.config import SamplingParams

        self._session, self._file, self.dice = session, folder / "session.json", dice
        self._talk = Conversation()
        self._params = SamplingParams(max_new_tokens=new_tokens)
        self._kinds = (
            *(self._ask,) * 4,
            self._ask_much,
            self._leave,
            self._abandon,
            self._interrupt,
            self._refused,
            self._fill,
            self._undo,
            self._retry,
            self._save_and_load,
            self._other,
            self._reset,
        )

    def run(self, turns: int) -> None:
        """`turns` turns, then a reset and the same short question always."""
        for _ in range(turns):
            self.dice.choice(self._kinds)()
        self._reset()
        self._session.engine.reset()
        self._session.complete(
            "What is a list?",
            replace(
                self._params, temperature=0, max_new_tokens=min(GREEDY_ANSWER, self._params.max_new_tokens)
            ),
        )

    def _sampling(self) -> Any:
        dice = self.dice
        return replace(
            self._params,
            temperature=dice.choice((0.0, 0.7, 1.2)),
            repetition_penalty=dice.choice((1.0, 1.3)),
            seed=dice.choice((None, dice.randrange(1000))),
            stop=dice.choice(((), ("\n\n", "the end"), ("<|user|>",))),
            logprobs=dice.choice((None, None, 5)),
        )

    def _question(self, words: int = 6) -> str:
        return text_of(self.dice, words)

    def _stream(self, question: str) -> Iterator[Any]:
        responses: Iterator[Any] = self._session.stream(
            self._talk.messages(question), self._sampling(), system=self._talk.system
        )
        return responses

    def _ask(self, words: int = 6) -> None:
        from lowmem.chat.conversation import Exchange

        question = self._question(words)
        text = "".join(response.text for response in self._stream(question))
        self._talk = self._talk.with_exchange(Exchange(question, text))

    def _ask_much(self) -> None:
        self._ask(self._session.context // 4)  # over half of the context in tokens: old turns are dropped

    def _leave(self) -> None:
        responses: Any = self._stream(self._question())
        for _ in range(self.dice.randint(0, 5)):
            next(responses, None)
        responses.close()

    def _abandon(self) -> None:
        next(self._stream(self._question()))  # never closed

    def _interrupt(self) -> None:
        def stop(done: int, total: int) -> None:
            raise KeyboardInterrupt

        try:
            self._session.complete(self._question(), self._params, on_prefill=stop)
        except KeyboardInterrupt:
            pass

    def _refused(self) -> None:
        from lowmem.errors import InvalidRequestError

        for prompt, params in (
            (self._question(4 * self._session.context), self._params),
            ("x", replace(self._params, temperature=-1.0)),
        ):
            try:
                self._session.stream(prompt, params)
            except InvalidRequestError:
                continue
            raise AssertionError("an invalid request was accepted")

    def _fill(self) -> None:
        from lowmem.models.dialogue import fim_tokens

        if fim_tokens(self._session.loaded.tokenizer) is not None:
            list(self._session.fill_in(self._question(40), self._question(600), self._params))

    def _undo(self) -> None:
        if self._talk.exchanges:
            self._talk = self._talk.without_last()

    def _retry(self) -> None:
        from lowmem.chat.conversation import Exchange

        if self._talk.exchanges:
            question = self._talk.exchanges[-1].question
            self._talk = self._talk.without_last()
            text = "".join(response.text for response in self._stream(question))
            self._talk = self._talk.with_exchange(Exchange(question, text))

    def _save_and_load(self) -> None:
        from lowmem.chat.conversation import ChatState
        from lowmem.chat.store import load, save

        save(str(self._file), ChatState(self._talk, self._params, "soak"))
        self._talk = load(str(self._file), self._params).conversation

    def _other(self) -> None:
        """Another conversation in between: the prefix store keeps this one's rows."""
        self._session.complete(self._question(30), self._sampling(), system=self._question(20))

    def _reset(self) -> None:
        from lowmem.chat.conversation import Conversation

        self._talk = Conversation(self.dice.choice((None, self._question())))


_PHRASE = (
    "write a function that sorts the list of numbers in Python and returns its median value then explain "
    "what each line does when text is empty or has größe 日本 😀 `code` **bold** x = [1, 2] def f(a):"
)
_WORDS = _PHRASE.split()


def text_of(dice: random.Random, words: int, made_up: float = 0.125) -> str:
    """A text of `words` words; the made-up share of them keeps word caches from holding them all."""
    return " ".join(
        "".join(dice.choices("abcdefghijklmnop_äß", k=dice.randint(3, 9)))
        if dice.random() < made_up
        else dice.choice(_WORDS)
        for _ in range(words)
    )


def warm_texts(dice: random.Random) -> list[str]:
    """More words than the tokenizer's cache of 10,000, which would otherwise fill for a while."""
    return [text_of(dice, 3000, made_up=1.0) for _ in range(5)]


class SessionRuntime:
    """A Session that runs a round and takes a census for each request."""

    def __init__(self, model: str, context: int, folder: Path, seed: int) -> None:
        import lowmem
        from lowmem.generate.prefix_store import PrefixStore
        from lowmem.session import Session

        session = Session(lowmem.open_model(model, context=context, device="cpu"))
        session.engine.store = PrefixStore(_STORE)
        self._rounds = SessionRound(session, folder, random.Random(seed))
        self.kernel = f"{session.loaded.label}, {session.loaded.kernel}"
        self.load_seconds = session.loaded.load_seconds
        for text in warm_texts(self._rounds.dice):
            session.count(text)
        rebuild_interned()

    def round(self, turns: int) -> dict[str, Any]:
        """A round of `turns` turns; the census after it."""
        self._rounds.run(turns)
        return asdict(take_census())


def _terminal(file: str, words: list[str]) -> int:
    from lowmem.cli import main

    asked = False

    def count(number: int, frame: object) -> None:
        nonlocal asked
        if not asked:  # the model is loaded by now
            rebuild_interned()
        asked = True
        line = (json.dumps(asdict(take_census())) + "\n").encode()
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, line)
        finally:
            os.close(handle)

    signal.signal(signal.SIGUSR1, count)
    return main(["run", *words])


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    if kind == "session":
        folder, context, saved, seed = rest
        sys.exit(serve(lambda: SessionRuntime(folder, int(context), Path(saved), int(seed))))
    sys.exit(_terminal(rest[0], rest[1:]))
