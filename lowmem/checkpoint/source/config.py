"""transformers' config of a checkpoint: made in one place, from a config.json that was checked first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.checkpoint.files.reading import one_line, read_json
from lowmem.errors import SourceError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def model_config(folder: Path, config_json: Mapping[str, Any]) -> PretrainedConfig:
    """transformers' config of `folder`, without its `quantization_config`; no code of the folder runs.

    Of a checkpoint with a vision or audio part it is the config of the text model inside.

    config_json: the object in config.json, as `read_config_json` returns it. Raises SourceError when
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
        if read_json(path).get("model_type") != model_type:  # a layout that is read as another
            config = CONFIG_MAPPING[model_type].from_dict(dict(config_json))
        else:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return _of_text(config)
    except Exception as error:  # the values are not trusted, and each config class fails in its own way
        raise SourceError(f"{path} is not a usable config: {one_line(error)}") from error


_SAME_TEXT_MODELS = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""Text models that transformers has only inside of others → the model that computes the same for text: its
positions along time, height and width (M-RoPE) are equal there."""


def is_reduced_to_text(config_json: Mapping[str, Any], config: PretrainedConfig) -> bool:
    """Whether `model_config` made the text model's config of a config.json that describes more."""
    from transformers import CONFIG_MAPPING

    model_type = config_json.get("model_type")
    return model_type in CONFIG_MAPPING and not isinstance(config, CONFIG_MAPPING[str(model_type)])


def _of_text(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the text model inside `config`; `config` itself where there is no other part."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    if "text_config" not in config.sub_configs:
        return config
    text = config.get_text_config()
    if text is config:
        return config
    if twin := _SAME_TEXT_MODELS.get(text.model_type):
        values = {key: value for key, value in text.to_dict().items() if key != "model_type"}
        values["rope_parameters"] = {
            key: value
            for key, value in (values.get("rope_parameters") or {}).items()
            if not key.startswith("mrope")
        }
        if twin == "qwen3_moe":
            values["norm_topk_prob"] = True  # as Qwen3-VL's router always does
        text = CONFIG_MAPPING[twin](**values)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    text.architectures = [(model[0] if isinstance(model, (list, tuple)) else model).__name__]
    text.dtype = config.dtype or text.dtype
    # The wrapper's head is tied by the wrapper's config.
    text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", text.tie_word_embeddings))
    text.name_or_path = config.name_or_path
    return text
