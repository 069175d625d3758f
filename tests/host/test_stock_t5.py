"""A T5 that the stock CLIPLoader loaded, through the stock CLIPTextEncode, into our MODEL."""

import torch
from checks import relative, save, saved
from graphs import Graph

import pixart_core as pc
from pixart_core.config import METADATA_KEY
from pixart_core.text.t5_file import T5Config, expected_shapes

# the smallest T5 that the host recognises: T5 base, under its "stable_audio" type
T5_BASE = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128,
                   gated=False, activation="relu")
SMALL = pc.PixArtConfig(hidden_size=48, depth=2, num_heads=2, mlp_hidden_size=192,
                        caption_channels=768)


def random_weights(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: (torch.randn(shape, generator=generator) * 0.05).half()
            for name, shape in shapes.items()}


def latents(host, text, name):
    graph = Graph()
    clip = graph.add("CLIPLoader", clip_name="t5_base.safetensors", type="stable_audio")
    model = graph.add("PixArtLoader", model_name="caption_768.safetensors")
    positive = graph.add("CLIPTextEncode", clip=clip, text=text)
    negative = graph.add("CLIPTextEncode", clip=clip, text="")
    latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    samples = graph.add("KSampler", model=model, positive=positive, negative=negative,
                        latent_image=latent, seed=0, steps=2, cfg=4.5, denoise=1.0,
                        sampler_name="dpmpp_2m", scheduler="simple")
    save(graph, samples, name)
    host.run(graph)
    return saved(host, name)


def test_stock_t5_and_text_encode(host):
    folders = host.models_dir / "text_encoders", host.models_dir / "diffusion_models"
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    encoder, model = folders[0] / "t5_base.safetensors", folders[1] / "caption_768.safetensors"
    pc.write_checkpoint(encoder, random_weights(expected_shapes(T5_BASE)), {})
    network = pc.PixArtTransformer(SMALL, device="meta").state_dict()
    shapes = {name: tensor.shape for name, tensor in network.items()}
    pc.write_checkpoint(model, random_weights(shapes), {METADATA_KEY: SMALL.to_json()})
    cat = latents(host, "a cat on a mat", "stock_cat")
    dog = latents(host, "three dogs in the snow, at night", "stock_dog")
    assert cat.isfinite().all() and dog.isfinite().all()
    assert relative(cat, dog) > 1e-6
