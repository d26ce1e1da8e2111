"""A fair queue: clients take turns, and each client's requests keep their order."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Items of several clients, in round-robin order over the clients. Not thread-safe."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Item]] = OrderedDict()  # the next client first

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def push(self, client: str, item: Item) -> None:
        """Append to the client's line. A new client is last."""
        self._lines.setdefault(client, deque()).append(item)

    def push_front(self, client: str, item: Item) -> None:
        """Prepend to the client's line and make the client last: for an item that goes on after its turn."""
        self._lines.setdefault(client, deque()).appendleft(item)
        self._lines.move_to_end(client)

    def pop(self) -> Item:
        """Remove and return the next item; raises IndexError if the queue is empty."""
        if not self._lines:
            raise IndexError("the queue is empty")
        client, line = next(iter(self._lines.items()))
        item = line.popleft()
        if line:
            self._lines.move_to_end(client)
        else:
            del self._lines[client]
        return item

    def remove(self, client: str, item: Item) -> bool:
        """Remove an item; returns whether it was in the queue."""
        line = self._lines.get(client)
        if line is None or item not in line:
            return False
        line.remove(item)
        if not line:
            del self._lines[client]
        return True

    def would_crowd_out(self, client: str) -> bool:
        """Whether another client has at least two more items than `client`."""
        return self._crowd(client) is not None

    def crowded_out(self, client: str) -> Item | None:
        """Remove the last item of the client with the most items; None unless it has two more than `client`.

        A client that fills a bounded queue thus cannot keep other clients out.
        """
        line = self._crowd(client)
        return None if line is None else line.pop()

    def clear(self) -> list[Item]:
        """Remove and return all items, grouped by client."""
        items = [item for line in self._lines.values() for item in line]
        self._lines.clear()
        return items

    def _crowd(self, client: str) -> deque[Item] | None:
        longest = max(self._lines.values(), key=len, default=None)
        if longest is None or len(longest) < len(self._lines.get(client, ())) + 2:
            return None
        return longest
