"""Folders that somebody made to do harm, or that bad luck made: all of them."""

from tests.fuzz import hostile_texts, hostile_weights
from tests.fuzz.hostile import CASES, Case

__all__ = ["CASES", "Case", "hostile_texts", "hostile_weights"]
