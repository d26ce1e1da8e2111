"""Which files of a folder belong to a model, by their names."""

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
    "*.tiktoken",
)
# Files of which one is enough to have a vocabulary.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model*", "spiece.model", "*.tiktoken")
SETTINGS_PATTERNS = (
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "dialogue_template.json",
)
LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
# Never copied, whatever they are called: code and weights.
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
