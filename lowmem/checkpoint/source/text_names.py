"""The names of a text model's tensors inside a checkpoint that also has a vision or audio part.

Needs no torch: plan leaves the same tensors out.
"""

from __future__ import annotations

import re

_TOWERS = re.compile(
    r"(^|\.)(vision|visual|image|audio|video|speech|sam|vit|multi_modal|multimodal|mm_|projector|connector"
    r"|perceiver|resampler|aligner|merger|embed_vision|embed_audio|modality|qformer|query|vq)\w*\."
)
_WRAPPERS = (
    "model.language_model.model.",
    "language_model.model.",
    "model.language_model.",
    "language_model.",
)
_OTHER_WRAPPERS = ("model.text_model.model.", "model.text_model.", "text_model.model.", "text_model.")
_INSIDE = re.compile(r"(^|\.)(layers|blocks|h)\.\d+\.")


def is_left_out(name: str) -> bool:
    """Whether a stored tensor belongs to a vision, audio or projector part, not to the text model."""
    inside = _INSIDE.search(name)
    before = name if inside is None else name[: inside.start() + 1]
    if "language_model." in before:
        return False
    return _TOWERS.search(before) is not None or _loose(name)


def _loose(name: str) -> bool:
    """Parameters of a wrapper that are not in a module: `image_newline`, `model.image_newline`."""
    return name.removeprefix("model.") in ("image_newline", "image_token", "view_separator", "view_seperator")


def text_name(name: str) -> str:
    """A stored name as the text model has it: `model.layers.0.…`, `lm_head.weight`."""
    for wrapper in (*_WRAPPERS, *_OTHER_WRAPPERS):
        if name.startswith(wrapper):
            rest = name[len(wrapper) :]
            return rest if rest.startswith("lm_head.") else f"model.{rest}"
    return name
