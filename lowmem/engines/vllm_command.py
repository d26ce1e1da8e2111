"""What is served, where and for whom → vLLM's command line and environment. Pure: nothing is looked up here.

Every flag is written out, so that an answer does not depend on what another version of vLLM prefers.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowmem.config import SamplingParams
from lowmem.engines.installed import Vllm

DOOR = "lowmem_door"
"""The package that vLLM imports from our folder: see vllm_door.py."""
_DOOR_FILES = ("engines/vllm_door.py", "engines/vllm_trim.py", "text/addresses.py", "text/api_keys.py")
DOOR_VARIABLE = "LOWMEM_DOOR"
EXPLICIT_METHOD = (0, 32)
"""Since this release one name means GPTQ on every device; earlier ones choose among several by themselves."""
SHARDED = {
    "gpt_bigcode": {
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    }
}
"""model_type → how cards share the linears for which transformers has no plan of its own. vLLM has no code of
its own for these models either, and would keep the linears whole on every card."""
_RENAMED = (r"transformer\.", r"model\.")
"""The start of such a model's names in patterns of `dynamic`: in the checkpoint, and in vLLM's modules."""


@dataclass(frozen=True)
class Served:
    """The checkpoint, and how it is read."""

    folder: Path
    names: tuple[str, ...]
    """The model's names in requests."""
    model_type: str
    dtype: str
    context: int
    """Tokens of prompt and answer together."""
    method: str = ""
    """vLLM's name of the quantization: "auto_gptq", "humming"; empty for 16 bits."""
    quantization: Mapping[str, Any] | None = None
    """The config's quantization_config; None in 16 bits."""
    template: Path | None = None
    """A chat template to use instead of the folder's."""
    generation: Path | None = None
    """A folder whose generation_config.json names the tokens that end an answer; None: the model's does."""


@dataclass(frozen=True)
class Ranks:
    """The processes that share the model, and the memory of each."""

    count: int
    cards: tuple[str, ...] = ()
    """The cards as $CUDA_VISIBLE_DEVICES names them, one for each rank; empty: there are none."""
    share: float | None = None
    """Of each card's memory that vLLM may fill."""
    cores: tuple[str, ...] = ()
    """The CPU's cores of each rank, as "0-3"; empty on cards."""
    kv_bytes: int | None = None
    """Of each rank's KV cache; None: what the card's share leaves."""


@dataclass(frozen=True)
class Door:
    """Who may ask, and how many at once."""

    host: str
    port: int
    keys: tuple[str, ...] = field(default=(), repr=False)
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    max_body: int = 2 << 20
    sequences: int | None = None
    """Answers at once; None leaves it to vLLM."""
    prefix_cache: bool = True
    trims: bool = False
    """Drop a line end at the start of a chat's answer: it belongs to StarChat's template."""
    shutdown_seconds: float = 30.0


@dataclass(frozen=True)
class Launch:
    """A command, and what its environment has beside ours."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    secret: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Environment that is not shown."""

    @property
    def shown(self) -> str:
        """The command as a line for a shell, without secrets."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.words)])


def launch(vllm: Vllm, served: Served, ranks: Ranks, door: Door, place: Path) -> Launch:
    """The command that serves a folder.

    place: our folder, from which vLLM imports DOOR. The keys are in the environment: every user of the
    machine can read the arguments of a process.
    """
    words = [vllm.executable, "serve", str(served.folder), "--served-model-name", *served.names]
    words += ["--host", door.host, "--port", str(door.port)]
    words += _model_flags(vllm, served) + _rank_flags(served, ranks) + _door_flags(door)
    environment = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if ranks.cores:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(ranks.cores)
        environment["VLLM_CPU_INT4_W4A8"] = "0"  # activations stay in 16 bits
    if ranks.cards:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(ranks.cards)
    rules = {
        "keys": door.keys,
        "hosts": door.hosts,
        "origins": door.origins,
        "max_body": door.max_body,
        "trims": door.trims,
    }
    return Launch(tuple(words), environment, {DOOR_VARIABLE: json.dumps(rules), "PYTHONPATH": str(place)})


def copy_door(place: Path) -> None:
    """Put the modules into our folder that vLLM imports from it."""
    for name in _DOOR_FILES:
        copy = place / DOOR / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((Path(__file__).parents[1] / name).read_bytes())


def _model_flags(vllm: Vllm, served: Served) -> list[str]:
    defaults = SamplingParams()
    sampling = {
        "temperature": defaults.temperature,
        "top_k": defaults.top_k,
        "top_p": defaults.top_p,
    }
    words = ["--dtype", served.dtype, "--max-model-len", str(served.context)]
    if served.method and (vllm.release >= EXPLICIT_METHOD or served.method != "auto_gptq"):
        words += ["--quantization", served.method]
    if served.template is not None:
        words += ["--chat-template", str(served.template)]
    if served.generation is not None:
        words += ["--generation-config", str(served.generation)]
    return [*words, "--override-generation-config", json.dumps(sampling)]


def overrides(model_type: str, quantization: Mapping[str, Any] | None, ranks: int) -> dict[str, Any]:
    """What vLLM must read in another way than config.json says it, for the families of SHARDED.

    How cards share their linears, and the names in `dynamic`, which it compares with its own modules'.
    """
    changes: dict[str, Any] = {}
    plan = SHARDED.get(model_type)
    if plan and ranks > 1:
        changes["base_model_tp_plan"] = plan
    dynamic = (quantization or {}).get("dynamic")
    if plan and quantization and dynamic:
        renamed = {pattern.replace(*_RENAMED, 1): settings for pattern, settings in dynamic.items()}
        changes["quantization_config"] = {**quantization, "dynamic": renamed}
    return changes


def _rank_flags(served: Served, ranks: Ranks) -> list[str]:
    words = ["--tensor-parallel-size", str(ranks.count)]
    if ranks.count > 1:
        words += ["--distributed-executor-backend", "mp"]
    if changes := overrides(served.model_type, served.quantization, ranks.count):
        words += ["--hf-overrides", json.dumps(changes)]
    if ranks.cores or served.model_type in SHARDED:
        words.append("--enforce-eager")  # torch.compile fails on transformers' model of these families
    if ranks.share is not None:
        words += ["--gpu-memory-utilization", f"{ranks.share:.2f}"]
    if ranks.kv_bytes is not None:
        words += ["--kv-cache-memory-bytes", str(ranks.kv_bytes)]
    return words


def _door_flags(door: Door) -> list[str]:
    words = ["--allowed-origins", json.dumps(door.origins), "--middleware", f"{DOOR}.engines.vllm_door.Door"]
    if door.sequences is not None:
        words += ["--max-num-seqs", str(door.sequences)]
    words.append("--enable-prefix-caching" if door.prefix_cache else "--no-enable-prefix-caching")
    return [
        *words,
        "--shutdown-timeout",
        str(max(1, round(door.shutdown_seconds))),
        "--disable-uvicorn-access-log",
    ]
