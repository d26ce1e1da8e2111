"""Two commands at once: one works, the other is refused in one line, and all files are complete.

Real processes. The first is stopped (SIGSTOP) at a step of its own, so that nothing is left to chance.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from lowmem.benchmarks.experiments.endurance.faults import Child, Fault, Outcome
from lowmem.benchmarks.experiments.endurance.scenarios import Material, make_material, tree

from lowmem.checkpoint import cache


@pytest.fixture(scope="module")
def material(spawner, tmp_path_factory) -> Material:
    return make_material(tmp_path_factory.mktemp("concurrency") / "material", spawner)


class Commands:
    """`lowmem` in processes, with the cache below one folder."""

    def __init__(self, context, root: Path) -> None:
        self.context, self.root = context, root

    def __call__(self, *words: str) -> Outcome:
        return Child(self.context, self.root, None).run(words)

    def stopped_at(self, step: int, *words: str) -> Child:
        """One that has come to its n-th step below the folder, and waits there."""
        child = Child(self.context, self.root, Fault("stop", step, 0.0, 0))
        child.start(words)
        if not child.stopped():
            raise AssertionError(child.wait().said)
        return child


@pytest.fixture
def lowmem(spawner, tmp_path: Path, monkeypatch) -> Commands:
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "cache"))
    return Commands(spawner, tmp_path)


def refused(outcome: Outcome, words: str) -> None:
    assert outcome.code == 2 and words in outcome.said, outcome.said
    assert outcome.said.count("\n") == 1 and outcome.said.startswith("lowmem ")


def ended_well(child: Child) -> None:
    child.go_on()
    outcome = child.wait()
    assert outcome.code == 0, outcome.said


def test_two_converts_into_one_folder_and_readers_meanwhile(lowmem, material, tmp_path):
    out = tmp_path / "out"
    first = lowmem.stopped_at(40, *material.convert(out))
    job = tree(tmp_path / "out.partial")
    try:
        refused(lowmem(*material.convert(out)), "another process is converting into")
        refused(lowmem(*material.convert(out, "--bits", "8", "--force")), "another process")
        refused(lowmem("verify", str(out)), "out")
        refused(lowmem("run", str(out), "-p", "Hi", "--max-new-tokens", "1"), "out")
        assert tree(tmp_path / "out.partial") == job, "what is in work was touched"
    finally:
        ended_well(first)
    assert tree(out) == tree(material.whole)
    refused(lowmem(*material.convert(out)), "exists")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_two_converts_into_the_cache_with_list_and_rm_meanwhile(lowmem, material, tmp_path):
    first = lowmem.stopped_at(40, *material.convert(None))
    try:
        refused(lowmem(*material.convert(None)), "another process is converting into")
        (entry,) = cache.entries()
        assert not entry.complete and "unfinished" in lowmem("list").said
        refused(lowmem("rm", entry.name, "--yes"), "a conversion is working on")
        assert cache.entries() == [entry]
    finally:
        ended_well(first)
    (entry,) = cache.entries()
    assert entry.state == "ready" and tree(entry.path) == tree(material.whole)
    refused(lowmem(*material.convert(None)), "is already converted")


def test_rm_while_a_run_has_the_checkpoint_open(lowmem, material):
    """The run goes on with the files that it has open; what begins later finds nothing."""
    from lowmem.config import SamplingParams
    from lowmem.errors import LowmemError
    from lowmem.loading.loader import load
    from lowmem.session import Session

    assert lowmem(*material.convert(None)).code == 0
    (entry,) = cache.entries()
    session = Session(load(entry.path), context=64)
    params = SamplingParams(max_new_tokens=8, temperature=0.0)
    before = session.complete("def f(", params, raw=True).text
    assert lowmem("rm", entry.name, "--yes").code == 0
    assert cache.entries() == [] and not entry.path.exists()
    session.engine.reset()
    assert session.complete("def f(", params, raw=True).text == before
    with pytest.raises(LowmemError):
        load(entry.path)


def bench(material: Material, root: Path, out: str) -> list[str]:
    sizes = ["--rows", "2", "--row-length", "16", "--no-greedy", "--quiet", "--no-record"]
    models = [str(material.whole), "--reference", str(material.source)]
    return ["bench", "quality", *models, "--text", str(material.text), *sizes, "--out", str(root / out)]


def test_two_benches_share_a_record_or_a_reference(lowmem, material, tmp_path):
    first = lowmem.stopped_at(25, *bench(material, tmp_path, "one"))
    try:
        refused(lowmem(*bench(material, tmp_path, "one")), "another lowmem bench quality is writing to")
        refused(lowmem(*bench(material, tmp_path, "two")), "another process is measuring the same in")
    finally:
        ended_well(first)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "quality-results.jsonl",
        "quality.json",
    ]
    kept = tree(tmp_path / "cache")
    assert lowmem(*bench(material, tmp_path, "two")).code == 0
    assert tree(tmp_path / "cache") == kept, "the reference is shared, and no other file is left"
