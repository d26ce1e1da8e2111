"""From the names of a model's tensors to the names under which a checkpoint stores them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator

from lowmem.errors import SourceError


def resolve_names(stored: Iterable[str], expected: Iterable[str]) -> dict[str, str]:
    """Map a model's state-dict names to the names under which a checkpoint stores them.

    Handles one base-model prefix that is missing (`h.0.ln_1.bias` for `transformer.h.0.ln_1.bias`) or extra
    (`model.lm_head.weight`), the same for all names, except where only the plain name is stored. Raises
    SourceError naming the first expected tensor that the checkpoint lacks.
    """
    present, names = dict.fromkeys(stored), list(expected)
    best: dict[str, str] = {}
    for drop, add in _prefixes(present, names):
        found = {}
        for name in names:
            bare = name.removeprefix(drop)
            # The head is outside the base model and may be stored without its prefix.
            candidate = add + bare if add + bare in present else name
            if candidate in present:
                found[name] = candidate
        # Two names of the model must not share one tensor of the checkpoint.
        if len(set(found.values())) == len(found) > len(best):
            best = found
        if len(best) == len(names):
            return best
    missing = next(name for name in names if name not in best)
    raise SourceError(
        f"the checkpoint holds no tensor {missing!r}",
        "It is incomplete, or of another architecture than its config",
    )


def _prefixes(stored: dict[str, None], names: list[str]) -> list[tuple[str, str]]:
    """(prefix to drop, prefix to add) pairs to try: none first, then the most frequent."""
    extra = _counts(stored, set(names))
    missing = _counts(names, stored)
    drops = [(prefix, "") for prefix, _ in missing.most_common(4)]
    adds = [("", prefix) for prefix, _ in extra.most_common(4)]
    return [("", ""), *drops, *adds]


def _counts(names: Iterable[str], others: Container[str]) -> Counter[str]:
    """Each prefix of `names`, by how many names are among `others` without it."""
    return Counter(prefix for name in names for prefix, rest in _splits(name) if rest in others)


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """("a.", "b.c"), ("a.b.", "c") of "a.b.c"; at most 8, since names are not trusted."""
    position = 0
    for _ in range(8):
        position = name.find(".", position) + 1
        if not position:
            return
        yield name[:position], name[position:]
