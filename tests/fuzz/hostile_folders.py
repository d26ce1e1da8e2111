"""All hostile folders: malicious ones and damaged ones."""

from tests.fuzz import hostile_texts, hostile_weights
from tests.fuzz.hostile import CASES, Case

__all__ = ["CASES", "Case", "hostile_texts", "hostile_weights"]
