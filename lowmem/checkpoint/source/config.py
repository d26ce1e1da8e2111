"""transformers' config of a checkpoint: made in one place, from a config.json that was checked first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.checkpoint.files.reading import one_line
from lowmem.errors import SourceError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def model_config(folder: Path, config_json: Mapping[str, Any]) -> PretrainedConfig:
    """transformers' config of `folder`, without its `quantization_config`; no code of the folder runs.

    config_json: the object in config.json, as `read_config_json` checked it. Raises SourceError when
    transformers does not know the model type, or rejects the values.
    """
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers import __version__ as version

    path = folder / "config.json"
    model_type = config_json.get("model_type")
    if not isinstance(model_type, str):
        raise SourceError(f"{path} has no model_type", "Give a transformers checkpoint")
    if model_type not in CONFIG_MAPPING:
        raise SourceError(
            f"{path} has model_type {model_type!r}, which transformers {version} does not know",
            "Try a newer transformers; code that comes with a checkpoint is never run",
        )
    key = next((k for k in config_json if callable(getattr(CONFIG_MAPPING[model_type], k, None))), None)
    if key is not None:  # it would become an attribute in the place of a method
        raise SourceError(f"{path} has the key {key!r}, which is not a setting", "Download it again")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the values are not trusted, and each config class fails in its own way
        raise SourceError(f"{path} is not a usable config: {one_line(error)}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config  # type: ignore[no-any-return]
