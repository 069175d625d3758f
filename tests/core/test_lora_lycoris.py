"""LyCORIS files: algorithms that are no LoRA, alpha without a rank, scalar."""

import pytest
import torch

from pixart_core.checkpoint import CheckpointError
from pixart_core.checkpoint.lora import read_lora
from pixart_core.checkpoint.lora_apply import apply_lora
from pixart_core.checkpoint.lora_export import host_tensors

PEFT = "base_model.model.transformer_blocks.0.attn1.to_"
MODULE = "lycoris_transformer_blocks_0_attn1_to_q"


def other(*leaves, module=MODULE):
    return {**{f"{module}.{leaf}": torch.ones(2, 2) for leaf in leaves},
            f"{module}.alpha": torch.tensor(1.0)}


GLORA = [f"{part}.weight" for part in ("a1", "a2", "b1", "b2")]
LORA = {f"{MODULE}.lora_down.weight": torch.ones(2, 48), f"{MODULE}.lora_up.weight":
        torch.ones(48, 2)}
OTHER_ADAPTERS = {
    "oft": other("oft_blocks", "rescale"), "diag_oft": other("oft_diag"),
    "peft_oft": other("oft_R.default.weight", module="base_model.model.proj_out"),
    "peft_boft": other("boft_R", "boft_s", module="base_model.model.proj_out"),
    "glora": other(*GLORA), "dotted_glora": other(*GLORA, module="transformer.proj_out"),
}


@pytest.mark.parametrize("case", OTHER_ADAPTERS)
def test_adapters_that_are_no_lora(case):
    """Named, without the advice to load them with a LoRA loader, which refuses them here."""
    with pytest.raises(CheckpointError) as error:
        read_lora(OTHER_ADAPTERS[case])
    assert ("GLoRA" if "glora" in case else "an OFT or BOFT") in str(error.value)
    assert "not supported; LoRA, LoHa, LoKr and DoRA are" in str(error.value)
    assert "holds a LoRA" not in str(error.value) and "LoRA loader" not in str(error.value)


def test_other_adapters_beside_a_lora_are_listed():
    more = other("oft_blocks", *GLORA, module="transformer.proj_out")
    lora = read_lora({**LORA, **more})
    assert len(lora.layers) == 1 and set(lora.unused) == more.keys()


def test_alpha_for_layers_without_a_rank():
    """Said, where nobody tells a rank: a given alpha would be ignored without a word."""
    free = {f"lycoris_transformer_blocks_1_attn1_to_{p}.lokr_w{n}": torch.ones(n, n)
            for p in "qk" for n in (1, 2)}
    assert not read_lora({**LORA, **free}).notes
    lora = read_lora({**LORA, **free}, alpha=4)
    assert [layer.scale for layer in lora.layers] == [2.0, 1.0, 1.0]
    assert "alpha does not apply to 2 of its 3 layers" in lora.notes[0]
    told = read_lora(free, alpha=4, config={"peft_type": "LOKR", "r": 8, "alpha": 1})
    assert {layer.scale for layer in told.layers} == {0.5} and not told.notes


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MATRICES = {  # the tensors of one layer; what they make, written out; the rank that divides alpha
    "lora": ({"lora_up.weight": random(48, 2), "lora_down.weight": random(2, 48, seed=1)},
             lambda up, down: up @ down, 2),
    "loha": ({f"hada_w{n}_{ab}": random(*shape, seed=n) for n in (1, 2)
              for ab, shape in (("a", (48, 3)), ("b", (3, 48)))},
             lambda a1, b1, a2, b2: (a1 @ b1) * (a2 @ b2), 3),
    "lokr": ({"lokr_w1": random(4, 4), "lokr_w2_a": random(12, 2), "lokr_w2_b": random(2, 12)},
             lambda w1, a, b: torch.kron(w1, a @ b), 2),
    "lokr_full": ({"lokr_w1": random(4, 4), "lokr_w2": random(12, 12)}, torch.kron, None),
}


@pytest.mark.parametrize("kind", MATRICES)
def test_scalar_multiplies_the_change(make_weights, kind):
    """alpha / rank * scalar * (matrices), in the file for ComfyUI's loader too, which knows no
    scalar."""
    tensors, product, rank = MATRICES[kind]
    lora = read_lora({**{f"{MODULE}.{leaf}": tensor for leaf, tensor in tensors.items()},
                      f"{MODULE}.alpha": torch.tensor(5.0), f"{MODULE}.scalar": torch.tensor(0.3)})
    assert not lora.unused and not lora.notes
    weights = make_weights()
    expected = weights["blocks.0.attn.qkv.weight"][:48] + (
        0.3 * (5 / rank if rank else 1) * product(*tensors.values()))
    for way in (lora, read_lora(host_tensors(lora))):
        merged = apply_lora(weights, way)["blocks.0.attn.qkv.weight"]
        torch.testing.assert_close(merged[:48], expected, rtol=1e-5, atol=1e-5)


def test_the_file_for_comfyui_has_scalar_in_its_numbers():
    """Its loader multiplies by alpha / rank, and a LoKr of whole matrices by nothing."""
    for kind, (tensors, _, rank) in MATRICES.items():
        lora = read_lora({**{f"{MODULE}.{leaf}": tensor for leaf, tensor in tensors.items()},
                          f"{MODULE}.scalar": torch.tensor([0.3])})
        out = {name.rpartition("to_q.")[2]: tensor for name, tensor in host_tensors(lora).items()}
        assert "scalar" not in out
        if rank:
            assert out["alpha"].item() == pytest.approx(0.3 * rank), kind
        else:
            torch.testing.assert_close(out["lokr_w1"], 0.3 * tensors["lokr_w1"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_a_scaled_bias_is_multiplied_in_float32(dtype):
    """PEFT's lora_B.bias, which counts alpha / rank times: float16 would round a second time, and
    float8 has no multiplication. k's own difference, which has no scale, joins it in one bias."""
    up, other_bias = random(48, seed=5).to(dtype), random(48, seed=6).to(dtype)
    lora = read_lora({f"{PEFT}q.lora_A.weight": torch.ones(3, 48), f"{PEFT}q.lora_B.weight":
                      torch.ones(48, 3), f"{PEFT}q.lora_B.bias": up,
                      f"{PEFT}k.diff_b": other_bias}, alpha=1)
    bias = host_tensors(lora)["diffusion_model.blocks.0.attn.qkv.diff_b"]
    assert torch.equal(bias, torch.cat([up.float() * (1 / 3), other_bias.float(), torch.zeros(48)]))


def test_a_scalar_of_nothing_is_listed():
    """Beside differences, too, which it does not multiply."""
    more = {"lycoris_proj_out.scalar": torch.tensor(2.0),
            f"{MODULE[:-1]}k.diff": torch.ones(48, 48), f"{MODULE[:-1]}k.scalar": torch.tensor(2.0)}
    lora = read_lora({**LORA, **more})
    assert lora.unused == ("lycoris_proj_out.scalar", f"{MODULE[:-1]}k.scalar")


@pytest.mark.parametrize("leaf", ["alpha", "scalar"])
@pytest.mark.parametrize("value", [torch.tensor(torch.inf), torch.ones(2)])
def test_factors_are_one_finite_number(leaf, value):
    with pytest.raises(CheckpointError, match=f"{leaf} of {MODULE} is not one finite number"):
        read_lora({**LORA, f"{MODULE}.{leaf}": value})
