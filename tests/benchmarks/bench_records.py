"""Generated records in the format of `lowmem bench`: plausible and extreme ones."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise

from lowmem.benchmarks.common.records import (
    Attempt,
    Bucket,
    DecodeLatency,
    GreedyAgreement,
    HumanEvalRecord,
    LatencyRecord,
    Machine,
    Origin,
    PrefillLatency,
    QualityRecord,
    Repeated,
    Roofline,
    Spread,
    Subject,
    SubjectHumanEval,
    SubjectLatency,
    SubjectQuality,
    TextQuality,
)

HOSTILE = "<script>alert(1)</script>|x`y` $z$ [a](javascript:1)\n# **b** & \u202e\x00\ud800"
MIB = 1 << 20
BUCKETS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)

FLOOR = Subject("bfloat16", "dense", "bfloat16", "tiny-starchat", 16.0, 402 * MIB)
FORMS = (
    Subject("8-bit g128", "gptq", "bfloat16", "tiny-8bit", 8.19, 206 * MIB),
    Subject("int8", "int8", "bfloat16", "tiny-starchat", 8.0, 204 * MIB),
    Subject("NF4", "nf4", "bfloat16", "tiny-starchat", 4.5, 117 * MIB),
    Subject("4-bit g128", "gptq", "bfloat16", "tiny-4bit", 4.16, 105 * MIB),
    Subject("3-bit g64", "gptq", "bfloat16", "tiny-3bit", 3.3, 85 * MIB),
)
KLD = {
    "bfloat16": 0.000102,
    "8-bit g128": 0.000015,
    "int8": 0.000335,
    "NF4": 0.009354,
    "4-bit g128": 0.0025,
    "3-bit g64": 0.0105,
}


def an_origin(command: str = "lowmem bench quality tiny-starchat", **changes: object) -> Origin:
    machine = Machine(
        "AMD EPYC 9R14 96-Core Processor", ("avx2", "avx512_vnni"), 2, 24 * 1024 * MIB, "cpu", 0
    )
    versions = (("lowmem", "0.4.0"), ("python", "3.11.2"), ("torch", "2.15.0"), ("transformers", "5.23.0"))
    fields = {
        "command": command,
        "date": "2026-11-23T06:40:00+00:00",
        "machine": machine,
        "versions": versions,
        "source": "tiny-starchat",
        "source_digest": "9f" * 32,
        "load_average": 0.31,
    }
    return Origin(**(fields | changes))  # type: ignore[arg-type]


def a_text(name: str, kld: float, tokens: int = 12288, ppl: float = 25.312) -> TextQuality:
    """The quality of a version on a text, with mean KL divergence `kld`."""
    error = kld * 0.016
    buckets = tuple(
        Bucket(low, high, tokens // 7, kld * (2.2 - 2 * low), 1 - 1.5 * math.sqrt(kld) * (1 - low))
        for low, high in pairwise(BUCKETS)
    )
    spread = Spread(kld, error, kld * 0.4, kld * 2.5, kld * 9, kld * 140)
    same = 1 - 0.9 * math.sqrt(kld)
    return TextQuality(
        name,
        tokens,
        ppl * (1 + kld),
        ppl,
        1 + kld,
        kld / 4,
        spread,
        same,
        0.0019,
        math.sqrt(kld) / 9,
        buckets,
    )


def a_subject_quality(
    subject: Subject, kld: float, texts: Sequence[str], floor: bool = False
) -> SubjectQuality:
    found = tuple(a_text(name, kld * (1 + 0.3 * i)) for i, name in enumerate(texts))
    greedy = GreedyAgreement(64, (64,) * 8, tuple(min(64, int(6 + i * 9 / (1 + 40 * kld))) for i in range(8)))
    return SubjectQuality(subject, floor, found, greedy, 21.5)


def quality_record(
    forms: Sequence[Subject] = FORMS,
    texts: Sequence[str] = ("code", "dialogues", "HumanEval"),
    **changes: object,
) -> QualityRecord:
    floor = a_subject_quality(FLOOR, KLD["bfloat16"], texts, floor=True)
    rest = (a_subject_quality(s, KLD.get(s.label, 0.02 / s.bits_per_weight), texts) for s in forms)
    return QualityRecord(
        an_origin("lowmem bench quality tiny-starchat --forms bfloat16,int8,nf4,gptq", **changes),
        "float32",
        41.2,
        730 * MIB,
        96 * MIB,
        (floor, *rest),
    )


def repeated(median: float, spread: float = 0.04, rounds: int = 3) -> Repeated:
    values = tuple(median * (1 + spread * (i - rounds // 2)) for i in range(rounds))
    return Repeated(median, min(values), max(values), values)


def a_decode(context: int, tpot: float, ceiling: float, seed: int) -> DecodeLatency:
    random_ = random.Random(seed)
    itl = sorted(tpot * (0.97 + random_.expovariate(18)) for _ in range(384))
    shuffled = itl[:]
    random_.shuffle(shuffled)
    p50, p90, p99 = (itl[int(len(itl) * share)] for share in (0.5, 0.9, 0.99))
    return DecodeLatency(
        context, 128, repeated(tpot), p50, p90, p99, tuple(shuffled), ceiling, 1 / tpot / ceiling, None
    )


def a_subject_latency(
    subject: Subject, contexts: Sequence[int] = (32, 1024), seed: int = 0
) -> SubjectLatency:
    ceiling = 36e9 / subject.weight_bytes
    decode = tuple(
        a_decode(c, (1 + c / 9000) / (0.71 * ceiling), ceiling / (1 + c / 12000), seed + c) for c in contexts
    )
    speed = 700 if subject.method == "gptq" else 1100
    prefill = tuple(
        PrefillLatency(n, repeated(n / (speed * n / (n + 40))), repeated(speed * n / (n + 40)), 4100.0, 0.17)
        for n in (32, 128, 512, 2048)
    )
    needed = subject.weight_bytes + 60 * MIB
    return SubjectLatency(
        subject, True, "", needed, "torch", repeated(0.8), prefill, decode, needed + 22 * MIB, 0
    )


def does_not_fit(subject: Subject, needed: int = 29597 * MIB) -> SubjectLatency:
    reason = f"needs {needed / 2**30:.1f} GiB, there are 12.0 GiB"
    return SubjectLatency(subject, False, reason, needed, "", None, (), (), 0, 0)


def latency_record(
    subjects: Sequence[SubjectLatency] | None = None, warnings: Sequence[str] = (), **changes: object
) -> LatencyRecord:
    found = subjects or [a_subject_latency(s, seed=i) for i, s in enumerate((FLOOR, *FORMS))]
    roof = Roofline(repeated(36.1e9), repeated(431e9), "bfloat16")
    origin = an_origin("lowmem bench latency tiny-starchat", **changes)
    return LatencyRecord(origin, 3, 2, roof, 0.08, tuple(warnings), tuple(found))


def humaneval_record(forms: Sequence[Subject] = (FLOOR, *FORMS[3:]), **changes: object) -> HumanEvalRecord:
    subjects = []
    for index, form in enumerate(forms):
        outcomes = ["passed" if i % 9 == index % 9 else ("failed", "timeout")[i % 2] for i in range(164)]
        attempts = tuple(
            Attempt(f"HumanEval/{i}", 0, o == "passed", o, "", "    return 1\n")
            for i, o in enumerate(outcomes)
        )
        share = outcomes.count("passed") / 164
        error = math.sqrt(share * (1 - share) / 164)
        subjects.append(SubjectHumanEval(form, 164, 1, 0.0, share, error, 310.0, attempts))
    return HumanEvalRecord(an_origin("lowmem bench humaneval tiny-starchat", **changes), tuple(subjects))


def many_forms(
    number: int = 30, name: str = "a form with a rather long name, number {}"
) -> tuple[Subject, ...]:
    """`number` versions with nearly equal bits per weight."""
    return tuple(
        Subject(name.format(i), "peer", "float16", f"/models/{i}", 2.5 + 6 * i / number, (70 + 5 * i) * MIB)
        for i in range(number)
    )
