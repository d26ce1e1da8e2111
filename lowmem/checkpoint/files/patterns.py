"""Names of the files that belong to a model."""

TOKENIZER_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tokenizer.model.v*",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
    "*.tiktoken",
)
VOCABULARIES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model*", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json", "tiktoken.model", "*.tiktoken"),
)
"""Files that each hold a whole vocabulary."""
SETTINGS_PATTERNS = (
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "dialogue_template.json",
)
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Settings of a quantized checkpoint beside its config.json: auto-gptq's, AutoAWQ's and ModelOpt's."""
TEMPLATE_FOLDER = "additional_chat_templates"
"""The folder inside a checkpoint's that holds its named chat templates, as NAME.jinja."""
PROCESSOR_FILE = "processor_config.json"
"""Settings of a vision model's inputs, which may hold the chat template."""
LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
# Code and weights are never copied.
CODE_SUFFIXES = (".py", ".pyc", ".so", ".dll", ".dylib", ".sh", ".exe")
WEIGHT_SUFFIXES = (
    ".bin",
    ".safetensors",
    ".gguf",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".pkl",
)
