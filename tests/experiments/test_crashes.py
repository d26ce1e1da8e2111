"""Commands that meet faults at random moments lose nothing, show nothing by halves, go on to the same bytes.

A seeded few of what `python -m lowmem.benchmarks.experiments.endurance.crashes` does by the hundred.
"""

from __future__ import annotations

from lowmem.benchmarks.experiments.endurance.crashes import run

FEW = {
    ("convert", "kill"): 4,
    ("convert", "full"): 2,
    ("convert", "broken"): 2,
    ("convert", "memory"): 1,
    ("replace", "kill"): 3,
    ("cache", "kill"): 3,
    ("quality", "kill"): 4,
    ("quality", "broken"): 2,
    ("latency", "kill"): 3,
}


def test_faults_at_random_moments_do_no_harm(spawner):
    tallies = run(FEW, seed=3, context=spawner)
    kills = [tally for tally in tallies if tally.fault == "kill"]
    assert [tally.hit for tally in kills] == [4, 3, 3, 4, 3]
    for tally in tallies:
        assert tally.hit, f"{tally.scenario} never met {tally.fault}"
    said = " ".join(line for tally in tallies for line in tally.said)
    assert "Input/output error" in said and "give the same command again" in said
