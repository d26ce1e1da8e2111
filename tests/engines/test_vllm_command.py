"""vLLM's command line: every flag written, keys never shown, one rank and several."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lowmem.engines.installed import Vllm
from lowmem.engines.vllm_command import DOOR_VARIABLE, Door, Launch, Ranks, Served, launch, overrides

KEY = "0123456789abcdef"
SERVED = Served(Path("/models/a b"), ("one", "two"), "gpt_bigcode", "float16", 8192, "auto_gptq")
ALONE = Ranks(1)
DOOR = Door("127.0.0.1", 8000, (KEY,), ("box.lan",), ("http://localhost:3000",))


def made(served: Served = SERVED, ranks: Ranks = ALONE, door: Door = DOOR, version: str = "0.33.0") -> Launch:
    return launch(Vllm("/env/bin/vllm", version), served, ranks, door, Path("/place"))


def value(command: Launch, flag: str) -> str:
    return command.words[command.words.index(flag) + 1]


def test_the_folder_its_names_and_how_it_is_read() -> None:
    command = made()
    assert command.words[:3] == ("/env/bin/vllm", "serve", "/models/a b")
    at = command.words.index("--served-model-name")
    assert command.words[at + 1 : at + 3] == ("one", "two")
    assert value(command, "--dtype") == "float16" and value(command, "--max-model-len") == "8192"
    assert value(command, "--quantization") == "auto_gptq"
    sampling = json.loads(value(command, "--override-generation-config"))
    assert sampling == {"temperature": 0.2, "top_k": 50, "top_p": 0.95}
    assert "--trust-remote-code" not in command.words


def test_older_releases_choose_the_quantization_themselves() -> None:
    """Before 0.32 some names chose slower kernels."""
    assert "--quantization" not in made(version="0.24.0").words
    assert "--quantization" not in made(version="").words


def test_what_the_folder_lacks() -> None:
    assert not {"--chat-template", "--generation-config"} & set(made().words)
    served = replace(SERVED, template=Path("/t.jinja"), generation=Path("/g"))
    assert value(made(served), "--chat-template") == "/t.jinja"
    assert value(made(served), "--generation-config") == "/g"


def test_keys_are_neither_arguments_nor_shown() -> None:
    command = made()
    assert KEY not in " ".join(command.words) and KEY not in command.shown and KEY not in repr(command)
    rules = json.loads(command.secret[DOOR_VARIABLE])
    assert rules["keys"] == [KEY] and rules["hosts"] == ["box.lan"]
    assert value(command, "--middleware") == "lowmem_door.engines.vllm_door.Door"
    assert KEY not in repr(DOOR)


def test_nothing_is_reported_or_downloaded() -> None:
    assert made().environment["VLLM_NO_USAGE_STATS"] == "1" and made().environment["HF_HUB_OFFLINE"] == "1"


def test_browsers_of_other_origins_need_a_name() -> None:
    assert json.loads(value(made(), "--allowed-origins")) == ["http://localhost:3000"]
    assert json.loads(value(made(door=Door("::1", 1)), "--allowed-origins")) == []


def test_two_cards() -> None:
    command = made(ranks=Ranks(2, ("0", "1"), 0.9))
    assert value(command, "--tensor-parallel-size") == "2"
    assert value(command, "--distributed-executor-backend") == "mp"
    assert value(command, "--gpu-memory-utilization") == "0.90"
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    plan = json.loads(value(command, "--hf-overrides"))["base_model_tp_plan"]
    assert plan == {"h.*.mlp.c_fc": "colwise", "h.*.mlp.c_proj": "rowwise"}
    assert "VLLM_CPU_OMP_THREADS_BIND" not in command.environment


def test_names_of_dynamic_are_those_of_vllms_modules() -> None:
    """Without its own code for a model, vLLM calls transformers' base model `model`."""
    dynamic = {r"-:^transformer\.h\.0\.attn\.c_attn$": {}, r"+:^transformer\.h\.1\.mlp\.c_fc$": {"bits": 8}}
    quantization = {"quant_method": "gptq", "bits": 4, "dynamic": dynamic}
    found = overrides("gpt_bigcode", quantization, 1)["quantization_config"]
    renamed = {r"-:^model\.h\.0\.attn\.c_attn$": {}, r"+:^model\.h\.1\.mlp\.c_fc$": {"bits": 8}}
    assert found == {**quantization, "dynamic": renamed}
    assert overrides("llama", quantization, 2) == {} and overrides("gpt_bigcode", None, 1) == {}


def test_a_family_with_a_plan_of_its_own_keeps_it() -> None:
    served = Served(Path("/m"), ("m",), "llama", "bfloat16", 8192)
    words = made(served, Ranks(2, ("0", "1"), 0.9)).words
    assert not {"--hf-overrides", "--enforce-eager", "--quantization"} & set(words)


def test_two_processes_of_a_cpu() -> None:
    command = made(ranks=Ranks(2, cores=("0-3", "4-7"), kv_bytes=1 << 20))
    assert command.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-3|4-7"
    assert value(command, "--kv-cache-memory-bytes") == str(1 << 20) and "--enforce-eager" in command.words
    assert "--gpu-memory-utilization" not in command.words
    assert "VLLM_CPU_OMP_THREADS_BIND='0-3|4-7' " in command.shown and "'/models/a b'" in command.shown


@pytest.mark.parametrize(
    ("kept", "flag"), [(True, "--enable-prefix-caching"), (False, "--no-enable-prefix-caching")]
)
def test_limits(kept: bool, flag: str) -> None:
    door = Door("127.0.0.1", 8000, sequences=7, prefix_cache=kept, shutdown_seconds=12)
    command = made(door=door)
    assert flag in command.words and value(command, "--max-num-seqs") == "7"
    assert value(command, "--shutdown-timeout") == "12"
