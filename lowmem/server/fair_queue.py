"""Who is next: clients take turns, and each client's requests come in their order."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Items of many clients, given out in turns: one of each client that has any, then from the first again.

    A plain value, of one thread or behind a lock.
    """

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Item]] = OrderedDict()  # in the order of their turns

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def push(self, client: str, item: Item) -> None:
        """To the end of the client's line; a client without one comes last."""
        self._lines.setdefault(client, deque()).append(item)

    def push_front(self, client: str, item: Item) -> None:
        """To the front of the client's line, which comes last: the rest of something that had its turn."""
        self._lines.setdefault(client, deque()).appendleft(item)
        self._lines.move_to_end(client)

    def pop(self) -> Item:
        """The next one; IndexError when there is none."""
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
        """Take an item out of its line; whether it was there."""
        line = self._lines.get(client)
        if line is None or item not in line:
            return False
        line.remove(item)
        if not line:
            del self._lines[client]
        return True

    def would_crowd_out(self, client: str) -> bool:
        """Whether another line is longer than `client`'s by two or more."""
        return self._crowd(client) is not None

    def crowded_out(self, client: str) -> Item | None:
        """Take out the last item of the longest line, if that is longer than `client`'s by two or more.

        So one who fills a bounded queue does not keep others out of it.
        """
        line = self._crowd(client)
        return None if line is None else line.pop()

    def clear(self) -> list[Item]:
        """Take all out, in the order of lines."""
        items = [item for line in self._lines.values() for item in line]
        self._lines.clear()
        return items

    def _crowd(self, client: str) -> deque[Item] | None:
        longest = max(self._lines.values(), key=len, default=None)
        if longest is None or len(longest) < len(self._lines.get(client, ())) + 2:
            return None
        return longest
