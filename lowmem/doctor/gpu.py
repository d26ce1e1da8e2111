"""The checks of a card on the embedded model, for the doctor and for the tests marked `gpu`.

Each returns its result in a line, and raises RuntimeError on failure. On a CPU they compare it with itself,
which is how they are tested.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem.cards.find import cards_of, is_card
from lowmem.checkpoint.formats import LinearFormat
from lowmem.checkpoint.packing import pack_rows, pack_zeros
from lowmem.config import BITS, SamplingParams
from lowmem.doctor.report import Check, Checks, guarded
from lowmem.generate.cache.dense import DenseKVCache
from lowmem.generate.decoders.capture import CARD_GRAPH
from lowmem.generate.decoders.contract import DecoderRefused, Feed
from lowmem.generate.decoders.eager import EagerDecoder
from lowmem.generate.decoders.graph import GraphDecoder
from lowmem.generate.engine import Engine
from lowmem.kernels import bitsandbytes as bnb
from lowmem.kernels import dispatch
from lowmem.kernels.quant_linear import QuantLinear
from lowmem.loading.loader import LoadedModel, LoadOptions, load
from lowmem.models.architecture import decoder_layers
from lowmem.text.units import format_bytes

_CONTEXT = 256
_NEW_TOKENS = 24
_GROUP_SIZE = 128
_PROMPT = "def fibonacci(n):\n"


def gpu_checks(device: torch.device, dtype: torch.dtype) -> Checks:
    """Loading, memory, every kernel in a whole model, compiled decode, bitsandbytes: on `device`."""
    area = f"a model on {device}"
    report = "Please report it, with this output"
    yield guarded(area, "greedy tokens", lambda: same_tokens_as_cpu(device), report)
    yield guarded(area, "memory", lambda: memory_is_accounted(device), report, "warning")
    yield guarded(area, "compiled decode", lambda: decode_works(area, device, dtype), report, "warning")
    for bits in BITS:
        yield guarded(area, f"{bits}-bit GPTQ", lambda b=bits: kernel_in_model(b, device, dtype), report)  # type: ignore[misc]
    for method in ("int8", "nf4"):
        yield guarded(
            area,
            f"bitsandbytes {method}",
            lambda m=method: bnb_in_model(m, device, dtype),  # type: ignore[misc]
            "Convert the model instead",
            "warning",
        )


def same_tokens_as_cpu(device: torch.device) -> str:
    """Compare greedy tokens in float32 on the device with those on the CPU."""
    there = load(_tiny(), LoadOptions(device=device, dtype=torch.float32))
    here = load(_tiny(), LoadOptions(device="cpu", dtype=torch.float32))
    ours, theirs = _greedy(there), _greedy(here)
    if ours != theirs:
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        raise RuntimeError(f"token {at + 1} is {ours[at]}, on the CPU {theirs[at]}")
    return f"{len(ours)} tokens, the same as on the CPU; loaded in {there.load_seconds:.1f} s"


def memory_is_accounted(device: torch.device) -> str:
    """Compare the memory that a load takes on the card with the size of the weights."""
    if not is_card(device):
        return "not tried: only a card counts its memory"
    cards = cards_of(device)
    cards.synchronize(device)
    before = cards.allocated(device)
    if not cards.reset_peak(device):
        return f"not tried: torch counts no peak of {cards.label} memory"
    loaded = load(_tiny(), LoadOptions(device=device, dtype=torch.float16))
    taken = cards.allocated(device) - before
    peak = cards.peak(device) - before
    # The allocator rounds each tensor up to 512 bytes.
    slack = 512 * sum(1 for _ in [*loaded.model.parameters(), *loaded.model.buffers()])
    if not loaded.weight_bytes <= taken <= loaded.weight_bytes + slack:
        weights = format_bytes(loaded.weight_bytes)
        raise RuntimeError(f"{format_bytes(taken)} are allocated for {weights} of weights")
    return f"{format_bytes(taken)} for the weights, {format_bytes(peak)} at the peak of loading"


def decode_works(area: str, device: torch.device, dtype: torch.dtype) -> Check | str:
    """Compare compiled decode with eager decode. Returns a warning where it is not possible."""
    loaded = load(_tiny(), LoadOptions(device=device, dtype=dtype))
    layers = len(decoder_layers(loaded.model, loaded.model.config)[1])
    eager, cache = EagerDecoder(loaded.model), DenseKVCache(layers, _CONTEXT, slots=2)
    # On a CPU, torch.compile's eager backend runs the same code.
    backend = CARD_GRAPH if is_card(device) else "eager"
    try:
        decode = GraphDecoder(eager, cache, backend=backend)
    except DecoderRefused as refused:
        return Check(area, "compiled decode", "warning", refused.reason, "Decode stays eager and is slower")
    captured, plain = cache.slots
    logits, _ = eager.prefill([Feed(slot, _prompt(loaded)) for slot in (captured, plain)])
    fed, worst = [int(logits.argmax())], 0.0
    for _ in range(_NEW_TOKENS):
        got = decode.step([Feed(captured, fed)]).logits[0].float()
        right = eager.step([Feed(plain, fed)]).logits[0].float()
        worst = max(worst, float((got - right).norm() / right.norm()))
        fed = [int(right.argmax())]
    if not worst < 0.05:
        raise RuntimeError(f"its logits differ from the eager ones by {worst:.2g} of their norm")
    return f"{_NEW_TOKENS} tokens, logits within {worst:.1%} of eager decode"


def kernel_in_model(bits: int, device: torch.device, dtype: torch.dtype) -> str:
    """Compare logits of the embedded model at `bits` with the device's kernel and with the reference."""
    loaded = load(_tiny(), LoadOptions(device=device, dtype=dtype))
    pack_model(loaded, bits)
    ids = torch.tensor([_prompt(loaded)], device=device)
    with torch.inference_mode():
        right = loaded.model(input_ids=ids).logits.float()
        name = dispatch.install(loaded.model, device, dtype)
        got = loaded.model(input_ids=ids).logits.float()
    error = float((got - right).norm() / right.norm())
    if not error < 0.05:
        raise RuntimeError(f"{name} differs from the reference by {error:.2g} of the logits' norm")
    return f"{name}, logits within {error:.1%} of the reference's"


def bnb_in_model(method: bnb.Method, device: torch.device, dtype: torch.dtype) -> str:
    """Compare the most likely tokens of the model quantized by bitsandbytes with the 16-bit model's."""
    dense = load(_tiny(), LoadOptions(device=device, dtype=dtype))
    packed = load(_tiny(), LoadOptions(device=device, dtype=dtype, on_the_fly=method))
    ids = torch.tensor([_prompt(dense)], device=device)
    with torch.inference_mode():
        right = dense.model(input_ids=ids).logits[0].argmax(-1)
        got = packed.model(input_ids=ids).logits[0].argmax(-1)
    share = float((right == got).float().mean())
    if share < 0.6:
        raise RuntimeError(f"only {share:.0%} of the most likely tokens equal those of the 16-bit model")
    return f"{share:.0%} of the most likely tokens equal those of the 16-bit model"


def pack_model(loaded: LoadedModel, bits: int) -> None:
    """Replace the decoder layers' linears by symmetric round-to-nearest ones, in groups of 128."""
    _, layers = decoder_layers(loaded.model, loaded.model.config)
    for layer in layers:
        modules = dict(layer.named_modules())
        for path, linear in modules.items():
            if isinstance(linear, nn.Linear):
                parent, _, child = path.rpartition(".")
                setattr(modules[parent], child, _packed(linear, bits))


def _packed(linear: nn.Linear, bits: int) -> QuantLinear:
    weight = linear.weight.detach().float().T  # [in, out]
    groups = weight.reshape(-1, _GROUP_SIZE, weight.shape[1])
    middle = 1 << (bits - 1)
    scales = (groups.abs().amax(1) / max(middle - 1, 1)).clamp(min=1e-5).half()
    q = (groups / scales.float()[:, None]).round().clamp(-middle, middle - 1) + middle
    packed = QuantLinear(
        linear.in_features,
        linear.out_features,
        LinearFormat(bits, _GROUP_SIZE),
        bias=linear.bias is not None,
        device="meta",
    )
    zeros = torch.full(scales.shape, middle, device=weight.device)
    packed.qweight = pack_rows(q.reshape(weight.shape).to(torch.int32), bits)
    packed.qzeros = pack_zeros(zeros, bits)
    packed.scales = scales
    packed.g_idx = (torch.arange(linear.in_features, device=weight.device) // _GROUP_SIZE).int()
    if linear.bias is not None:
        packed.bias = linear.bias.detach()
    return packed


def _greedy(loaded: LoadedModel) -> list[int]:
    engine = Engine(loaded.model, context=_CONTEXT, stop_ids=(), speculate=False)
    params = SamplingParams(max_new_tokens=_NEW_TOKENS, temperature=0)
    return [token.id for token in engine.generate(_prompt(loaded), params)]


def _prompt(loaded: LoadedModel) -> list[int]:
    tokenizer: Any = loaded.tokenizer
    ids: list[int] = tokenizer.encode(_PROMPT, add_special_tokens=False)
    return ids


def _tiny() -> Path:
    """Folder of the embedded model."""
    return Path(str(files("lowmem") / "data" / "tiny-starchat"))
