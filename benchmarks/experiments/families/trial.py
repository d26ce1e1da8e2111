"""One tiny model: saved, planned, run, converted, verified and loaded again, beside transformers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from lowmem.benchmarks.experiments.families.variants import POSITIONS, VOCABULARY, Variant
from lowmem.convert.calibration import CalibrationSpec
from lowmem.convert.pipeline import convert
from torch import nn

from lowmem.checkpoint.verify.converted import verify
from lowmem.config import PREFILL_CHUNK, QuantConfig, SamplingParams
from lowmem.errors import LowmemError
from lowmem.generate.engine import Engine
from lowmem.loading.loader import LoadOptions, load
from lowmem.models.architecture import decoder_layers
from lowmem.plan.shape import read_shape

SHORT, LONG = 7, PREFILL_CHUNK + 100
"""Tokens of the prompts; the long one takes two chunks, and passes every window of the sweep."""
NEW = 12
"""Tokens of an answer."""
KLD = 0.05
"""The most nats by which the 8-bit model may differ."""
_ROUTER = re.compile(r"\.router(\.gate|\.layer)?$")
"""What chooses among experts: a linear in a few families, which all keep it in 16 bits."""
OK = "ok"
REFUSED = "refused: "


@dataclass(frozen=True)
class Outcome:
    """What happened to one tiny model; "ok", or in words what went wrong; "" for what was not tried."""

    name: str
    """Family and option."""
    shape: str = ""
    """The planner's shape against the model's."""
    short: str = ""
    """A short prompt: the tokens of run against transformers'."""
    long: str = ""
    """A prompt longer than a chunk."""
    convert: str = ""
    """Conversion to 8 bits, and `verify` of the result."""
    kld: float | None = None
    """Mean KL divergence of the converted model, loaded again, in nats."""
    untried: str = ""
    """Why no model was made."""
    refused: str = ""
    """Why plan, run and convert refuse the model, in the same words."""

    @property
    def right(self) -> bool:
        """Whether it runs and converts as it must."""
        return self._runs and self.convert == OK

    @property
    def only_runs(self) -> bool:
        """Whether it runs as it must, and convert refuses it."""
        return self._runs and self.convert.startswith(REFUSED)

    @property
    def fault(self) -> bool:
        """Whether anything is wrong."""
        return not (self.refused or self.untried or self.right or self.only_runs)

    @property
    def _runs(self) -> bool:
        return self.shape == self.short == self.long == OK


def try_variant(variant: Variant, work: Path) -> Outcome:
    """Make the model in `work`, a folder that is emptied, and try everything."""
    folder, packed = work / "source", work / "packed"
    shutil.rmtree(work)
    model = make(variant)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = resources.files("lowmem").joinpath("data/tiny-starchat/" + name)
        (folder / name).write_bytes(file.read_bytes())
    refused = _refusals(folder, packed)
    if refused:
        return Outcome(variant.name, refused=refused)
    oracle = model.eval()
    shape = _said(folder, lambda: _compare_shape(folder, oracle))
    short = _said(folder, lambda: _compare_tokens(folder, oracle, SHORT))
    long = _said(folder, lambda: _compare_tokens(folder, oracle, min(LONG, limit(oracle) - NEW)))
    kld: list[float] = []
    converted = _said(folder, lambda: _convert(folder, packed, oracle, kld))
    return Outcome(variant.name, shape, short, long, converted, kld[0] if kld else None)


def make(variant: Variant) -> Any:
    """transformers' model of a variant, in float32, with random weights, biases and norms."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(CONFIG_MAPPING[variant.family](**variant.settings), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    embedding = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.data.copy_(parameter.data + 0.1 * noise)
        elif parameter is embedding:
            parameter.data.copy_(0.2 * noise)
        elif "A_log" not in name:
            parameter.data.copy_(0.7 * parameter.shape[-1] ** -0.5 * noise)
    model.tie_weights()
    return model.eval()


def limit(model: Any) -> int:
    """The positions of a tiny model."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or POSITIONS)


def tokens(count: int) -> torch.Tensor:
    """Random token ids [1, count]."""
    return torch.randint(8, VOCABULARY - 8, (1, count), generator=torch.Generator().manual_seed(count))


def _said(folder: Path, step: Callable[[], str]) -> str:
    """A step's own words, or those of the error in which it ended, without the place of the model."""
    try:
        return step()
    except LowmemError as error:
        return f"{REFUSED}{str(error).replace(str(folder), 'MODEL')}"
    except Exception as error:  # transformers' and our own faults are what the sweep looks for
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _refusals(folder: Path, packed: Path) -> str:
    """The reason for which plan, run and convert refuse the model; "" unless all give the same."""
    reasons = set()
    for step in (
        lambda: read_shape(folder),
        lambda: load(folder, LoadOptions(dtype=torch.float32)),
        lambda: _pack(folder, packed),
    ):
        try:
            step()
            return ""
        except LowmemError as error:
            reasons.add(str(error).replace(str(folder), "MODEL"))
        except Exception:
            return ""
    return reasons.pop() if len(reasons) == 1 else ""


def _compare_shape(folder: Path, model: Any) -> str:
    shape = read_shape(folder)
    _, layers = decoder_layers(model, model.config)
    linears = [m for name, m in layers.named_modules() if type(m) is nn.Linear and not _ROUTER.search(name)]
    stored = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    with torch.no_grad():
        cache = model(tokens(5), use_cache=True).past_key_values
    kept = [rows for layer in cache.layers for rows in (layer.keys, layer.values) if rows is not None]
    pairs: dict[str, tuple[object, object]] = {
        "layers": (shape.layers, len(layers)),
        "numbers": (sum(tensor.numel for tensor in shape.tensors), sum(stored.values())),
        "vocabulary": (shape.vocab, model.get_input_embeddings().weight.shape[0]),
        "KV of a token": (shape.kv_values, sum(rows.shape[1] * rows.shape[3] for rows in kept)),
    }
    if linears:  # GPT-2 and its relatives have another kind of module
        sizes = {(linear.in_features, linear.out_features) for linear in linears}
        pairs["linears"] = shape.linear_sizes, sizes
        pairs["count of linears"] = sum(tensor.linear for tensor in shape.tensors), len(linears)
    wrong = [f"{name} {ours}, not {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]
    return "; ".join(wrong) or OK


def _compare_tokens(folder: Path, model: Any, count: int) -> str:
    prompt = tokens(count)
    theirs = _greedy(model, prompt)
    loaded = load(folder, LoadOptions(dtype=torch.float32))
    ours = run(loaded.model, prompt[0].tolist())
    return OK if ours == theirs else f"{ours}, not {theirs}"


def _greedy(model: Any, prompt: torch.Tensor) -> list[int]:
    """transformers' own answer."""
    model.generation_config.eos_token_id = None
    result = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW,
        pad_token_id=0,
    )
    return result[0, prompt.shape[1] :].tolist()  # type: ignore[no-any-return]


def run(model: Any, prompt: list[int]) -> list[int]:
    """The engine's answer."""
    engine = Engine(model, context=len(prompt) + NEW)
    params = SamplingParams(max_new_tokens=NEW, temperature=0)
    return [token.id for token in engine.generate(prompt, params)]


def _pack(folder: Path, packed: Path) -> None:
    config = QuantConfig(bits=8, correction=0.0, passes=0)
    convert(folder, packed, config, calibration=CalibrationSpec(rows=8, row_length=64))


def _convert(folder: Path, packed: Path, model: Any, kld: list[float]) -> str:
    _pack(folder, packed)
    report = verify(packed)
    if not report.ok:
        return f"verify: {report}"[:300]
    again = load(packed, LoadOptions(dtype=torch.float32)).model
    ids = tokens(96)
    with torch.no_grad():
        p, q = (torch.log_softmax(m(ids, use_cache=False).logits[0].double(), -1) for m in (model, again))
    kld.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return OK if kld[0] <= KLD else f"KL divergence {kld[0]:.3f}"
