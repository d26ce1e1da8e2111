"""Whole commands on hostile folders: `lowmem plan`, `verify`, `run`, `convert` and `list`.

Each command must end by itself within a limit of memory and CPU time, with exit code 0 or 2, and report the
problem in one line without control characters. It must not open files outside of the folder, write outside of
OUT, look up names for a pickle, or import code of the checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.fork_server import ForkServer, Outcome, fork_server
from tests.fuzz.hostile_folders import CASES, Case
from tests.fuzz.seeds import KINDS, copy_seed

COMMANDS = ("plan", "verify", "run", "convert")
# One case of each kind, with the commands that read furthest.
QUICK = {
    "config.json is a link that leads outside": ("plan",),
    "packed: weights are a link to a pipe": ("run",),
    "config.json is a pipe": ("run",),
    "the index names '/etc/passwd'": ("convert",),
    "source: n_layer '1000000000'": ("convert",),
    "attributes of Python": ("run",),
    "auto_map of the tokenizer alone": ("run",),
    "a pickle in the weights runs code": ("convert",),
    "fast_tokenizer_files elsewhere": ("run",),
    "model_max_length is a text": ("run",),
    "group_size does not fit in 64 bits": ("run",),
    "a huge sparse embedding, as in the config": ("convert",),
    "a layer number of 9 digits": ("plan",),
    "GGUF: llama.block_count 4294967295": ("run",),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    with fork_server(tmp_path_factory.mktemp("home")) as running:
        yield running


def arguments(command: str, folder: Path, out: Path) -> list[str]:
    return {
        "plan": ["plan", str(folder), "--ram", "2GiB"],
        "verify": ["verify", str(folder)],
        "run": ["run", str(folder), "-p", "hi", "--max-new-tokens", "2", "--quiet", "--ram", "2GiB"],
        "convert": [
            "convert",
            str(folder),
            str(out),
            "--quiet",
            "--plain",
            "--rows",
            "2",
            "--row-length",
            "32",
        ],
    }[command]


def made(case: Case, root: Path) -> Path:
    """Make the hostile folder. `root`/outside must not be read; it is not beside the folder."""
    (root / "outside").mkdir(parents=True)
    folder = copy_seed(case.base, root / "models" / "model")
    case.change(folder)
    return folder


def faults(case: Case, command: str, outcome: Outcome, root: Path) -> list[str]:
    """Describe every violation in an outcome."""
    said = outcome.stderr.strip().splitlines()
    wrong = []
    if outcome.signal or outcome.code not in (0, 2):
        wrong.append(f"ended with code {outcome.code}, signal {outcome.signal}")
    elif outcome.code == 0 and command not in case.harmless:
        wrong.append("worked")
    if outcome.code == 2 and command != "verify" and len(said) != 1:
        wrong.append(f"{len(said)} lines")
    if command == "verify" and outcome.code == 2 and not (outcome.stdout.strip() or len(said) == 1):
        wrong.append("no problem is named")
    if not all(line.isprintable() for line in (outcome.stdout + outcome.stderr).splitlines()):
        wrong.append("control characters")
    if len(outcome.stderr) > 5000:
        wrong.append(f"{len(outcome.stderr)} characters")
    if outcome.events or (root / "outside" / "was-run").exists():
        wrong.append("; ".join(outcome.events) or "code was run")
    if outcome.code and (root / "out").exists():
        wrong.append("OUT is there")
    return [*wrong, outcome.stderr[-1500:]] if wrong else []


def check(server: ForkServer, case: Case, commands: tuple[str, ...], root: Path) -> None:
    folder = made(case, root)
    found = {}
    for command in commands:
        if command == "convert" and case.base == "packed":
            continue
        outcome = server.run(arguments(command, folder, root / "out"), root)
        print(
            f"{case.name}: {command}: {outcome.code}, {outcome.seconds:.1f} s, {outcome.peak >> 20} MiB: "
            f"{outcome.stderr.strip()[:300]}"
        )
        wrong = faults(case, command, outcome, root)
        if wrong:
            found[command] = wrong
    shutil.rmtree(root)  # some are hundreds of megabytes
    assert not found


def test_case_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) and set(QUICK) <= set(names)


@pytest.mark.parametrize("name", QUICK)
def test_some_hostile_folders_are_refused_in_one_line(server: ForkServer, name: str, tmp_path: Path) -> None:
    check(server, next(case for case in CASES if case.name == name), QUICK[name], tmp_path / "root")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.encode("unicode_escape").decode())
def test_every_hostile_folder_is_refused_in_one_line(server: ForkServer, case: Case, tmp_path: Path) -> None:
    check(server, case, COMMANDS, tmp_path / "root")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_commands_succeed_on_the_seeds(server: ForkServer, kind: str, tmp_path: Path) -> None:
    """All commands succeed on the unchanged seeds; otherwise the cases would prove nothing."""
    check(server, Case("sound", kind, lambda folder: None, COMMANDS), COMMANDS, tmp_path / "root")


def test_list_with_hostile_cache_entries(server: ForkServer, tmp_path: Path) -> None:
    """`lowmem list` lists every entry of the cache, and reports those that it cannot read."""
    home = Path(server.home)
    names = (
        "config.json is deep",
        "bits is a float",
        "packed: config.json leads outside",
        "quantization_config is a text",
        "a deeply nested manifest",
    )
    for number, case in enumerate(case for case in CASES if case.name in names):
        (tmp_path / f"{number}" / "outside").mkdir(parents=True)
        base = tmp_path / f"{number}" / "models" / "model"
        case.change(copy_seed("packed", base))
        (base / "lowmem-manifest.json").touch()
        target = home / "lowmem" / "models" / f"owner--model{number}" / "4bit-g32"
        target.parent.mkdir(parents=True)
        shutil.copytree(base, target, symlinks=True)
        (target.parent / "origin.json").write_text('{"source": "a\\u001b[2J"}')
    outcome = server.run(["list"], tmp_path)
    assert outcome.code == 0 and not outcome.signal and not outcome.events, outcome
    lines = outcome.stdout.splitlines()
    assert len(lines) == 1 + len(names) and all(line.isprintable() for line in lines), outcome.stdout
