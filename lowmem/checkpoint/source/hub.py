"""Download checkpoints from the Hugging Face hub; errors are of one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from lowmem.checkpoint.files.patterns import (
    LICENCE_PATTERNS,
    PROCESSOR_FILE,
    QUANTIZATION_FILES,
    SETTINGS_PATTERNS,
    TEMPLATE_FOLDER,
    TOKENIZER_PATTERNS,
    WEIGHT_SUFFIXES,
)
from lowmem.checkpoint.files.reading import one_line
from lowmem.checkpoint.files.whole import require_room
from lowmem.checkpoint.foreign import refuse_foreign
from lowmem.checkpoint.headers.folder import read_config_json
from lowmem.errors import SourceError

TIMEOUT_S = 10.0
SMALL_FILES = (
    *("config.json", "README.md", PROCESSOR_FILE, *QUANTIZATION_FILES),
    *(*TOKENIZER_PATTERNS, *SETTINGS_PATTERNS, *LICENCE_PATTERNS),
)
# In order of preference. The first skips duplicates such as consolidated.safetensors.
WEIGHTS = (
    ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    ("*.safetensors", "*.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"),
    ("gptq_model*.bin", "gptq_model*.bin.index.json"),
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TEMPLATE = re.compile(rf"{TEMPLATE_FOLDER}/{_NAME.pattern}\.jinja")


def choose_files(names: Iterable[str], repo: str) -> list[str]:
    """The files of a repository that a conversion needs: safetensors, or .bin if there are none.

    Only plain files of the top folder and named chat templates, and no code. Raises SourceError when there
    are no such weights.
    """
    plain = [name for name in names if _NAME.fullmatch(name) and not name.endswith(".py")]
    weights = next(
        (w for w in WEIGHTS if any(fnmatchcase(name, pattern) for name in plain for pattern in w)), ()
    )
    chosen = [name for name in plain if any(fnmatchcase(name, p) for p in (*SMALL_FILES, *weights))]
    if not any(name.endswith((".safetensors", ".bin")) for name in chosen):
        gguf = any(name.endswith(".gguf") for name in plain)
        raise SourceError(
            f"{repo} on the hub holds no safetensors and no pytorch_model.bin",
            "Download one of its .gguf files and give that file" if gguf else "Check the name",
        )
    return sorted([*chosen, *(name for name in names if _TEMPLATE.fullmatch(name))])


def download(
    repo: str,
    revision: str | None = None,
    offline: bool = False,
    progress: Callable[[str], None] | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """The local folder of a hub repository's snapshot, downloaded as needed.

    An interrupted download resumes. Without a network a complete cached copy is used.

    check: called with the folder when all files but the weights are there; what it raises ends the download.
    Raises SourceError when there is no copy, or when the repository is unknown, gated or private;
    DiskFullError, before anything is downloaded, when the disk is too small for the missing files;
    ForeignError, before the weights are, for a method that lowmem does not read.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    # The HTTP library's root exception: hub 1.x and 2.x build on differently named ones.
    transport_error = cast("type[Exception]", errors.HfHubHTTPError.__bases__[0])
    network_errors = (transport_error, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, OSError)

    def cached() -> Path | None:
        # The hub's own completeness check covers the given patterns: pass those that we download.
        for weights in WEIGHTS:
            try:
                folder = Path(
                    snapshot_download(
                        repo,
                        revision=revision,
                        local_files_only=True,
                        allow_patterns=[*SMALL_FILES, *weights],
                        ignore_patterns=["*/*", "*.py"],
                    )
                )
            except (errors.LocalEntryNotFoundError, OSError):
                continue
            if any(fnmatchcase(path.name, pattern) for path in folder.iterdir() for pattern in weights):
                return folder
        return None

    def no_network(reason: str) -> Path:
        folder = cached()
        if folder is None:
            raise SourceError(
                f"{repo} is not a local folder, and the hub cannot be reached ({reason})",
                "Connect to the network, or give the path of a local copy",
            )
        if progress:
            progress(f"{repo}: using the cached copy ({reason})")
        return folder

    if offline or constants.HF_HUB_OFFLINE:
        return no_network("offline")
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT_S, files_metadata=True)
    except errors.HFValidationError as error:
        raise SourceError(f"{repo} is neither a local folder nor a hub id: {one_line(error)}") from error
    except errors.GatedRepoError as error:
        raise SourceError(f"{repo} is gated on the hub", _gated(repo)) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(f"{repo} on the hub has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"{repo} is neither a local folder nor a repository on the hub that you may read",
            "Check the name; for a private one log in first: hf auth login",
        ) from error
    except network_errors as error:
        return no_network(one_line(error))
    files = choose_files([sibling.rfilename for sibling in info.siblings or []], repo)
    _check_room(repo, [sibling for sibling in info.siblings or [] if sibling.rfilename in files])
    if progress:
        progress(f"{repo}: fetching {len(files)} files of revision {info.sha or revision}")

    def fetch(names: list[str]) -> Path:
        try:
            return Path(
                snapshot_download(
                    repo, revision=info.sha or revision, allow_patterns=names, etag_timeout=TIMEOUT_S
                )
            )
        except errors.GatedRepoError as error:
            raise SourceError(f"{repo} is gated on the hub", _gated(repo)) from error
        except network_errors as error:
            raise SourceError(
                f"the download of {repo} stopped: {one_line(error)}",
                "Run the same command again: the download resumes",
            ) from error

    if "config.json" in files:  # gigabytes of weights that cannot be used are not worth their download
        folder = fetch([name for name in files if not name.endswith(WEIGHT_SUFFIXES)])
        refuse_foreign(folder, read_config_json(folder), repo)
        if check:
            check(folder)
    return fetch(files)


def _check_room(repo: str, files: Iterable[Any]) -> None:
    """Raise DiskFullError when the disk of the hub's cache is too small for the missing part of `files`.

    files: RepoSiblings. Parts left by an interrupted download count as present.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE)
    blobs = cache / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"
    needed = 0
    for file in files:
        lfs = getattr(file, "lfs", None)
        name = lfs.sha256 if lfs else getattr(file, "blob_id", None)
        held = max((path.stat().st_size for path in blobs.glob(f"{name}*")), default=0) if name else 0
        needed += max(0, (getattr(file, "size", None) or 0) - held)
    work = f"the rest of the download of {repo}"
    require_room(cache, needed, work, "set HF_HOME to a folder on a larger disk")


def _gated(repo: str) -> str:
    return f"Accept its terms at https://huggingface.co/{repo} and log in: hf auth login"
