"""Gumbel noise for sampling: a pure function of a key, a token's place in the answer, and the token's id.

The argmax of log-probabilities with independent Gumbel noise is a draw from the distribution (Gumbel 1954). A
draft model that adds the same noise to its own log-probabilities draws the same token with a probability of
at least (1 - d) / (1 + d), d being the total variation distance of the two distributions, although neither
knows the other's (Daliri, Musco and Suresh 2025, "Coupling without Communication and Drafter-Invariant
Speculative Decoding"). So drafts change no token of a seeded answer, which rejection sampling cannot say.
"""

from __future__ import annotations

import torch

from lowmem.cards.find import widest_float

# splitmix64's constants (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators").
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_PLACE = 0xD1B54A32D192ED03


def gumbel(key: int, place: int, ids: torch.Tensor) -> torch.Tensor:
    """The noise of each of the token ids, int64 [n], in the widest floating point type of their device.

    key: 64 random bits of the answer. place: of the token in the answer. Nothing waits for the device.
    """
    mixed = ids * _signed(_STEP) + _signed(key + (place + 1) * _PLACE)
    mixed = (mixed ^ _right(mixed, 30)) * _signed(_FIRST)
    mixed = (mixed ^ _right(mixed, 27)) * _signed(_SECOND)
    mixed = mixed ^ _right(mixed, 31)
    wide = widest_float(ids.device)
    bits = 53 if wide is torch.float64 else 24
    uniform = (_right(mixed, 64 - bits).to(wide) + 0.5) * 2.0**-bits
    return -(-torch.log1p(-uniform)).log()


def _signed(number: int) -> int:
    """The low 64 bits as a signed integer, which is what torch multiplies."""
    return (number + 2**63) % 2**64 - 2**63


def _right(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """Shifted right with zeros: torch's own shift repeats the sign."""
    return (numbers >> count) & ((1 << (64 - count)) - 1)
