"""What other programs load: a table, which their own code checks in tests/compat and tests/kernels."""

from __future__ import annotations

import pytest

from lowmem.checkpoint.formats import LinearFormat
from lowmem.checkpoint.readers import READERS
from lowmem.config import BITS
from lowmem.errors import RecipeError
from tests.compat.vllm_forms import FORMS

LAYER = "model.layers.0."
QKV = tuple(f"{LAYER}self_attn.{name}_proj" for name in "qkv")
MLP = tuple(f"{LAYER}mlp.{name}_proj" for name in ("gate", "up", "down"))
FOUR, EIGHT = LinearFormat(4, 128), LinearFormat(8, 64)


def test_vllm_loads_what_its_own_code_took() -> None:
    for form in (form for form in FORMS if form.method is None):
        found = READERS["vllm"].allows(LinearFormat(form.bits, form.group_size, form.sym))
        assert (found == "") == form.taken, (form, found)


def test_the_widths_of_each_reader() -> None:
    taken = {
        name: [bits for bits in BITS if not reader.allows(LinearFormat(bits, 64))]
        for name, reader in READERS.items()
    }
    assert taken == {"gptqmodel": list(BITS), "vllm": [8, 4], "gguf": [8, 5, 4]}
    assert all(reader.allows(None) == "" for reader in READERS.values())
    assert "gptq_p" in READERS["vllm"].allows(LinearFormat(4, 128, layout="gptq_p"))
    assert "groups of 96" in READERS["gptqmodel"].allows(LinearFormat(4, 96))
    assert not READERS["gguf"].allows(LinearFormat(4, 96))
    assert "symmetric" in READERS["gguf"].allows(LinearFormat(4, 96, sym=False))


def test_vllm_joins_linears_that_must_be_stored_alike() -> None:
    vllm = READERS["vllm"]
    joined = {f"{LAYER}self_attn.qkv_proj": QKV, f"{LAYER}mlp.gate_up_proj": MLP[:2]}
    assert vllm.must_match((*QKV, *MLP)) == joined
    assert vllm.must_match(("transformer.h.0.attn.c_attn", f"{LAYER}mlp.up_proj", QKV[0])) == {}
    assert READERS["gptqmodel"].must_match(QKV) == {}
    alike = dict.fromkeys((*QKV, *MLP), FOUR) | {MLP[2]: EIGHT}
    vllm.check(alike)
    for different in ({QKV[1]: EIGHT}, {MLP[0]: None}, {QKV[2]: LinearFormat(4, 64)}):
        with pytest.raises(RecipeError, match=r"joins .* stored differently"):
            vllm.check(alike | different)
        READERS["gptqmodel"].check(alike | different)
    with pytest.raises(RecipeError, match=f"{MLP[2]}: vLLM loads 8 and 4 bits, not 3"):
        vllm.check(alike | {MLP[2]: LinearFormat(3, 128)})
    named = vllm.with_joined(dict.fromkeys(QKV, EIGHT))
    assert named == dict.fromkeys((*QKV, f"{LAYER}self_attn.qkv_proj"), EIGHT)
