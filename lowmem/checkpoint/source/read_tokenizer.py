"""Read a folder's tokenizer and its chat templates through transformers, from any of the files that hold one.

tokenizer.json is read as it is. Without it transformers builds the fast tokenizer from `tokenizer.model`
(sentencepiece's, or tiktoken's list of tokens), `tekken.json`, or `vocab.json` with `merges.txt`. It needs
other packages for some of them, and its messages name the wrong ones; and where it does not know a model's
class it builds a tokenizer that leaves out what sentencepiece does, so the two are compared here.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.checkpoint.files.reading import one_line
from lowmem.checkpoint.headers.tokenizer import check_tokenizer_files, processor_template
from lowmem.errors import SourceError
from lowmem.text.tokenizing import decode, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OWN = "Put the model's tokenizer.json beside its weights"
_PROBES = ("a", "def main(argv): return [x for x in argv]", "Hello, world! It's the 1st of 3 tests.")
"""Plain texts: what a model's own settings change (white space at the start, normal forms) is not in them."""
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def read_folder_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a checkpoint's folder, with its chat templates.

    Templates come from where transformers looks for them, otherwise from the files of the checkpoint's
    processor (processor_config.json, chat_template.json). Raises SourceError if the files are missing or
    unusable.
    """
    if not _is_vocabulary_there(folder):
        raise _no_tokenizer(folder)
    model = None if (folder / "tokenizer.json").is_file() else _sentencepiece_model(folder)
    tokenizer = read_tokenizer(folder)
    if model is not None and not _encodes_as(tokenizer, model):
        # transformers has no class for some models (Mistral's) whose files are Llama's.
        tokenizer = read_tokenizer(folder, as_llama=True)
        if not _encodes_as(tokenizer, model):
            raise SourceError(
                f"transformers encodes text differently from {model} itself, so answers would be wrong", _OWN
            )
    if not tokenizer.chat_template:
        tokenizer.chat_template = processor_template(folder)
    return tokenizer


def read_tokenizer(folder: Path, *, as_llama: bool = False, **options: Any) -> PreTrainedTokenizerBase:
    """The fast tokenizer that transformers reads with these options of AutoTokenizer.from_pretrained.

    as_llama: as Llama's, whatever class the files name. Raises SourceError if its files are missing,
    unusable, or hold only a slow tokenizer.
    """
    from transformers import AutoTokenizer, LlamaTokenizer

    reader: Any = LlamaTokenizer if as_llama else AutoTokenizer
    check_tokenizer_files(folder)
    try:
        tokenizer = reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        # Settings of a wrong type fail only when the first text is encoded.
        decode(tokenizer, encode(tokenizer, "a"), skip_special_tokens=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a damaged file: bare Exceptions of the Rust code, and its panics
        if "Couldn't instantiate the backend tokenizer" in str(error):
            raise _unknown_class(folder) from error
        raise SourceError(f"the tokenizer in {folder} cannot be read: {one_line(error)}") from error
    if not tokenizer.is_fast:
        raise SourceError(f"{folder} has only a slow tokenizer ({type(tokenizer).__name__})", _OWN)
    return tokenizer  # type: ignore[no-any-return]


def _is_vocabulary_there(folder: Path) -> bool:
    plain = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model", *_SENTENCEPIECE)
    return any((folder / name).is_file() for name in plain)


def _no_tokenizer(folder: Path) -> SourceError:
    versioned = sorted(path.name for path in folder.glob("tokenizer.model.v*"))
    if versioned:
        return SourceError(
            f"{folder} has {versioned[0]}, which transformers does not read under this name",
            "Copy it to tokenizer.model in the same folder",
        )
    ranks = sorted(path.name for path in folder.glob("*.tiktoken"))
    if ranks:
        return SourceError(f"{folder} has {ranks[0]}, which only the checkpoint's own code reads", _OWN)
    return SourceError(f"{folder} has no tokenizer", _OWN)


def _unknown_class(folder: Path) -> SourceError:
    """The error for files whose kind transformers cannot tell; its own message blames a package."""
    return SourceError(
        f"the tokenizer in {folder} cannot be read: transformers cannot tell its kind from these files",
        _OWN,
    )


def _sentencepiece_model(folder: Path) -> Path | None:
    """The sentencepiece model that the tokenizer is built from; None for other files.

    Raises SourceError where a package that transformers needs to read the file is missing.
    """
    check_tokenizer_files(folder)
    for name in (*_SENTENCEPIECE, "tiktoken.model"):
        file = folder / name
        if not file.is_file():
            continue
        if _is_token_list(file):
            _require(file, "a list of tokens for tiktoken", "tiktoken")
            return None
        _require(file, "a sentencepiece model", "sentencepiece", "google.protobuf")
        return file
    return None


def _require(file: Path, what: str, *modules: str) -> None:
    missing = [module.removeprefix("google.") for module in modules if not _is_installed(module)]
    if missing:
        raise SourceError(
            f"{file} is {what}, and the package {' and the package '.join(missing)} is not installed",
            f"Install it: pip install {' '.join(missing)}",
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _is_token_list(file: Path) -> bool:
    """Whether a file holds tiktoken's lines, each of a token in base64 and its number."""
    with file.open("rb") as stream:
        parts = stream.readline(1000).split()
    return len(parts) == 2 and parts[1].isdigit()


def _encodes_as(tokenizer: PreTrainedTokenizerBase, model: Path) -> bool:
    """Whether a tokenizer encodes the probes to the ids that sentencepiece gives.

    Raises SourceError if sentencepiece cannot read the model.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        reference = SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as error:
        raise SourceError(f"{model} cannot be read: {one_line(error)}") from error
    return all(
        encode(tokenizer, text, add_special_tokens=False) == list(reference.encode(text)) for text in _PROBES
    )
