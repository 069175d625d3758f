"""The host's hooks on the CLIP of PixArt T5 Loader."""

import torch
from checks import parted, relative, saved
from graphs import PROMPT, T5, Graph
from safetensors.torch import save_file

LAYER = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.v"


def add_lora(host, width):
    """A random LoRA of one layer of a T5 that is `width` wide."""
    generator = torch.Generator().manual_seed(0)
    pair = {f"{LAYER}.lora_down.weight": torch.randn(2, width, generator=generator),
            f"{LAYER}.lora_up.weight": torch.randn(width, 2, generator=generator),
            f"{LAYER}.alpha": torch.tensor(2.0)}
    folder = host.models_dir / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(parted(pair), folder / "t5_layer.safetensors")
    return "t5_layer.safetensors"


def test_set_clip_hooks(host, encoder):
    """A LoRA hook on the CLIP gives what the same LoRA patched into it gives."""
    name = add_lora(host, encoder.model.config.d_model)
    graph = Graph()
    clip = graph.add("PixArtT5Loader", t5_name=T5)
    hook = graph.add("CreateHookLora", lora_name=name, strength_model=0.0, strength_clip=1.0)
    hooked = graph.add("SetClipHooks", clip=clip, hooks=hook, apply_to_conds=True,
                       schedule_clip=False)
    model = graph.add("PixArtLoader", model_name="pixart_starter.safetensors")
    patched = graph.add("LoraLoader", model=model, clip=clip, lora_name=name, strength_model=0.0,
                        strength_clip=1.0)
    for label, chosen in (("plain", clip), ("hooked", hooked), ("patched", patched[1])):
        states = graph.add("PixArtTextEncode", clip=chosen, text=PROMPT, clean_caption=False,
                           max_tokens=300)
        graph.add("ProbeSaveTensors", value=states, name=f"hooks_{label}")
    host.run(graph)
    plain, hooked, patched = (saved(host, f"hooks_{label}", "value.0.0")
                              for label in ("plain", "hooked", "patched"))
    assert relative(hooked, patched) < 1e-5
    assert relative(hooked, plain) > 0.01
