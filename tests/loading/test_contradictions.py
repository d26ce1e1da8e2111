"""GPTQ tensors that contradict their config or each other: the right answer, or one line that names them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem.checkpoint.packing import pack_rows, unpack_rows
from lowmem.checkpoint.verify.converted import verify
from lowmem.errors import SourceError
from lowmem.loading.loader import LoadOptions, load
from lowmem.plan.shape import read_shape
from tests.helpers import tiny_model
from tests.rtn_helpers import write_rtn_checkpoint

UP = "model.layers.0.mlp.up_proj"
Tensors = dict[str, torch.Tensor]
IDS = torch.arange(40)[None] * 7


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """A folder, and the model that it stores: with groups in order, in act-order and without groups."""
    found = {}
    for kind, options in {
        "plain": {},
        "act-order": {"act_order_seed": 3},
        "one group": {"group_size": -1},
    }.items():
        folder = tmp_path_factory.mktemp("packed")
        model = write_rtn_checkpoint(tiny_model("llama"), folder, **options)  # type: ignore[arg-type]
        found[kind] = folder, model
    return found


def altered(source: Path, folder: Path, change: Callable[[Tensors], None], **settings: Any) -> Path:
    """A copy of a checkpoint with other tensors and settings."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(settings)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def every(part: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    """A change of this part of every linear."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(f".{part}")]:
            tensors[name] = make(tensors[name])

    return change


def one(part: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    """A change of this part of one linear."""

    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.{part}"] = make(tensors[f"{UP}.{part}"])

    return change


def drop(part: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(f".{part}")]:
            del tensors[name]

    return change


def constant(field: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same field everywhere in 4-bit words."""

    def make(words: torch.Tensor) -> torch.Tensor:
        values = torch.full((words.shape[1] * 8, words.shape[0]), field, dtype=torch.uint8)
        return pack_rows(values, 4).T

    return make


def swapped(g_idx: torch.Tensor) -> torch.Tensor:
    return torch.cat((g_idx[32:], g_idx[:32]))


def nothing(_: Tensors) -> None:
    return


def logits(folder: Path, notes: list[str] | None = None) -> torch.Tensor:
    heard: list[str] = [] if notes is None else notes
    loaded = load(folder, LoadOptions(dtype=torch.float32), notify=heard.append)
    with torch.inference_mode():
        return loaded.model(IDS).logits  # type: ignore[no-any-return]


REFUSED = [
    ("plain", one("g_idx", torch.zeros_like), {}, "up_proj.g_idx.*all inputs into group 0"),
    ("act-order", one("g_idx", torch.zeros_like), {}, "up_proj.g_idx.*all inputs into group 0"),
    ("plain", one("g_idx", swapped), {}, "up_proj.g_idx.*out of order.*desc_act"),
    ("act-order", nothing, {"desc_act": False}, "g_idx.*out of order.*desc_act"),
    (
        "act-order",
        one("g_idx", lambda t: t.clamp(max=0) + (torch.arange(64) > 40)),
        {},
        "up_proj.g_idx.*41 inp",
    ),
    ("plain", one("g_idx", lambda t: t - 1), {}, "up_proj.g_idx.*groups -1 to 0"),
    ("plain", one("scales", lambda t: t / 0), {}, "up_proj.scales.*finite"),
    ("plain", every("qzeros", constant(8)), {"sym": True}, "qzeros.*layout gptq_v2"),
    ("plain", every("qzeros", constant(0)), {"sym": True}, "qzeros.*never written"),
    (
        "plain",
        every("qzeros", constant(7)),
        {"sym": True, "checkpoint_format": "gptq_v2"},
        "qzeros.*layout gptq,",
    ),
]
REFUSED_BY_HEADERS = [
    ("plain", nothing, {"bits": 8}, "qzeros.*of 4 bits, and the config says 8"),
    ("plain", nothing, {"bits": 2}, "qzeros.*of 4 bits, and the config says 2"),
    ("plain", nothing, {"group_size": 64}, "scales.*groups of 32 inputs.*group_size 64"),
    ("plain", nothing, {"group_size": -1}, "scales.*groups of 32 inputs.*group_size -1"),
    ("plain", nothing, {"dynamic": {"+:.*up_proj": {"bits": 8}}}, "up_proj.qzeros.*config says 8"),
    ("plain", nothing, {"dynamic": {"-:.*up_proj": {}}}, "up_proj is quantized.*dynamic"),
    ("plain", one("scales", lambda t: t[:, :64]), {}, "up_proj.scales.*64 outputs.*128"),
    ("plain", one("qzeros", lambda t: t[:1]), {}, "up_proj.qzeros.*1 groups.*2"),
    ("plain", one("g_idx", lambda t: t[:32]), {}, "up_proj.qweight.*64 inputs.*32"),
    ("plain", one("qweight", lambda t: t[:4]), {}, "up_proj.qweight.*32 inputs.*64"),
    ("plain", one("g_idx", lambda t: t[None]), {}, "up_proj.g_idx.*shape"),
    ("act-order", drop("g_idx"), {}, "g_idx.*missing.*desc_act"),
    ("plain", drop("qzeros"), {}, "qzeros.*missing"),
    ("plain", drop("scales"), {}, "scales.*missing"),
]


@pytest.mark.parametrize(("kind", "change", "settings", "message"), REFUSED + REFUSED_BY_HEADERS)
def test_a_contradiction_is_refused_by_the_tensors_name(
    made: dict[str, Any], tmp_path: Path, kind: str, change: Any, settings: dict[str, Any], message: str
) -> None:
    folder = altered(made[kind][0], tmp_path / "copy", change, **settings)
    with pytest.raises(SourceError, match=message) as caught:
        load(folder)
    assert caught.value.hint
    assert not verify(folder).ok


@pytest.mark.parametrize(("kind", "change", "settings", "message"), REFUSED_BY_HEADERS)
def test_what_headers_show_is_refused_by_the_plan(
    made: dict[str, Any], tmp_path: Path, kind: str, change: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        read_shape(altered(made[kind][0], tmp_path / "copy", change, **settings))


@pytest.mark.parametrize(
    ("kind", "change", "settings"),
    [
        ("act-order", nothing, {}),
        ("act-order", nothing, {"static_groups": True, "desc_act": "true"}),
        ("plain", nothing, {"desc_act": True}),
        ("plain", drop("g_idx"), {}),
        ("plain", drop("g_idx"), {"bits": "4", "group_size": "32", "sym": None, "desc_act": None}),
        ("one group", nothing, {}),
        ("one group", nothing, {"desc_act": True, "group_size": None}),
        ("one group", drop("g_idx"), {"desc_act": True}),
        ("plain", every("scales", torch.Tensor.float), {}),
        ("plain", nothing, {"dynamic": {"+:.*up_proj": {"bits": 4}, "-:.*nothing.*": {}}}),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_what_is_whole_is_read(
    made: dict[str, Any], tmp_path: Path, kind: str, change: Any, settings: dict[str, Any]
) -> None:
    source, model = made[kind]
    folder = altered(source, tmp_path / "copy", change, **settings)
    notes: list[str] = []
    with torch.inference_mode():
        assert torch.allclose(logits(folder, notes), model(IDS).logits, atol=1e-4)
    assert notes == []
    read_shape(folder)
    assert verify(folder).ok


def test_zero_points_that_differ_under_sym_are_used_and_noted(made: dict[str, Any], tmp_path: Path) -> None:
    """As auto-gptq and GPTQModel's plain kernels read them; GPTQ-for-LLaMa's were published so."""
    source, model = made["plain"]
    folder = altered(source, tmp_path / "copy", nothing, sym=True)
    notes: list[str] = []
    with torch.inference_mode():
        assert torch.allclose(logits(folder, notes), model(IDS).logits, atol=1e-4)
    assert len(notes) == 1 and "sym is true" in notes[0]
    report = verify(folder)
    assert report.ok and any("sym is true" in note for note in report.notes)


def test_zero_points_stored_as_minus_one_are_noted(made: dict[str, Any], tmp_path: Path) -> None:
    def minus_one(words: torch.Tensor) -> torch.Tensor:
        fields = unpack_rows(words.T, 4)
        fields[3] = 15
        return pack_rows(fields, 4).T

    notes: list[str] = []
    folder = altered(made["plain"][0], tmp_path / "copy", one("qzeros", minus_one))
    logits(folder, notes)
    assert len(notes) == 1 and "disagree" in notes[0] and UP in notes[0]
    theirs = altered(folder, tmp_path / "theirs", nothing, meta={"quantizer": ["gptqmodel:7.7.0"]})
    notes.clear()
    logits(theirs, notes)
    assert notes == []
