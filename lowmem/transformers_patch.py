"""`lowmem.patch_transformers`: let transformers' own from_pretrained load a gpt_bigcode GPTQ folder."""

from __future__ import annotations

from typing import Any


def patch_transformers() -> None:
    """Let `from_pretrained` and `pipeline` of transformers load quantized checkpoints of gpt_bigcode.

    transformers 5.23 and 5.24 initialize the `weight` of every `c_proj`, which a packed linear does not have:
    `AttributeError: ... object has no attribute 'weight'`. After this call they leave packed linears alone;
    everything else stays as it is. Call it once before loading; further calls do nothing, and nothing undoes
    it. Models that `lowmem.load` opens, and other families, do not need it.
    """
    import torch
    from transformers.models.gpt_bigcode import modeling_gpt_bigcode as module

    base: Any = module.GPTBigCodePreTrainedModel
    original = base._init_weights
    if getattr(original, "skips_packed", False):
        return

    def _init_weights(self: Any, part: Any) -> None:
        # A packed linear has no weight, or a stand-in that tells its dtype.
        residual = isinstance(part, module.GPTBigCodeAttention | module.GPTBigCodeMLP)
        if not residual or isinstance(getattr(part.c_proj, "weight", None), torch.Tensor):
            original(self, part)

    _init_weights.skips_packed = True  # type: ignore[attr-defined]
    base._init_weights = _init_weights
