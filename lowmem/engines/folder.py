"""The checks of a folder before another program serves it: those that our own server makes when it loads.

And what the folder lacks for that program: the dialogue's template, and the tokens that end an answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.checkpoint.source.open import open_source
from lowmem.checkpoint.verify.digests import check_all, check_small
from lowmem.models.dialogue import CHAT_TEMPLATE, Dialogue, end_token_ids
from lowmem.models.vocabulary import check_vocabulary
from lowmem.plan.shape import ModelShape

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Facts:
    """What a folder tells of its model."""

    stop_ids: tuple[int, ...]
    """An answer ends at any of these tokens, as with our own server."""
    template: str | None
    """A chat template that is to replace the folder's; None: the folder's own serves."""
    ends_itself: bool
    """Its generation_config.json names all of `stop_ids`."""
    trims: bool
    """The dialogue is StarChat's: a line end at the start of an answer belongs to its template."""
    quantization: Mapping[str, Any] | None
    """The config's quantization_config; None in 16 bits, or where another file says it."""
    """As its model card names it."""

    def write(self, place: Path) -> tuple[Path | None, Path | None]:
        """Write what the folder lacks. Returns the template's file, and generation_config.json's folder."""
        template = generation = None
        if self.template is not None:
            template = place / "chat_template.jinja"
            template.write_text(self.template, encoding="utf-8")
        if not self.ends_itself:
            generation = place / "generation"
            generation.mkdir()
            text = json.dumps({"eos_token_id": list(self.stop_ids)}, indent=1)
            (generation / "generation_config.json").write_text(text, encoding="utf-8")
        return template, generation


def check_folder(path: Path, shape: ModelShape, notify: Notify, *, digests: bool = False) -> Facts:
    """Check a folder as our own server does.

    digests: compare all files with their digests. notify: told of changed settings and of the licence. Raises
    SourceError for weights or a tokenizer that are not those of the conversion, or for another model's
    tokenizer.
    """
    if digests:
        notify(f"comparing the files of {path} with their digests")
        notify(f"{check_all(path)} files match their digests")
    source = open_source(path, offline=True)
    config, tokenizer = source.config(), source.tokenizer()
    check_small(source.path, notify)
    dialogue = Dialogue.detect(tokenizer)
    markers: tuple[int, ...] = ()
    if dialogue is not None:
        markers = (dialogue.system_id, dialogue.user_id, dialogue.assistant_id, dialogue.end_id)
    check_vocabulary(tokenizer, shape.vocab, markers, notify)
    generation = source.generation_config()
    stop_ids = end_token_ids(tokenizer, dialogue, config, generation)
    named = generation.get("eos_token_id")
    known = set(named if isinstance(named, list) else [named])
    # Our own server writes StarChat's dialogue whatever template a folder has.
    own = dialogue is not None and getattr(tokenizer, "chat_template", None) != CHAT_TEMPLATE
    licence = source.license_name()
    if licence:
        notify(f"licence: {licence}, as the checkpoint's card says; it binds whoever serves the model")
    return Facts(
        stop_ids,
        CHAT_TEMPLATE if own else None,
        set(stop_ids) <= known,
        dialogue is not None,
        source.config_json.get("quantization_config"),
    )
