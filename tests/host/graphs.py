"""Graphs on the starter family that several host tests run."""

from __future__ import annotations

from prompt import Graph, Node

MODEL, LCM, T5, VAE = ("pixart_starter.safetensors", "pixart_starter_lcm.safetensors",
                       "t5_starter.safetensors", "vae_starter.safetensors")
SIGMA = "pixart_starter_sigma.safetensors"
PROMPT = "a large red circle on a blue background"
TOKENS = 40  # the starter's limit
SIDE = 64  # pixels: half of the starter's size, for tests that do not look at the picture
SMALL = {"width": SIDE, "height": SIDE}
TRAINED = {"width": 2 * SIDE, "height": 2 * SIDE}  # elsewhere a hair's difference grows


class StarterGraph(Graph):
    """A text-to-image graph on the starter family; each part can be replaced before `picture`."""

    def __init__(self, model: str = MODEL, prompt: str = PROMPT, negative: str = "",
                 width: int = SIDE, height: int = SIDE, batch: int = 1, **loader: object) -> None:
        super().__init__()
        self.model = self.add("PixArtLoader", model_name=model, **loader)
        self.clip = self.add("PixArtT5Loader", t5_name=T5)
        self.vae = self.add("VAELoader", vae_name=VAE)
        self.positive = self.encode(prompt)
        self.negative = self.encode(negative)
        self.latent = self.add("EmptyLatentImage", width=width, height=height, batch_size=batch)

    def encode(self, text: str, **inputs: object) -> Node:
        return self.add("PixArtTextEncode", clip=self.clip, text=text, clean_caption=True,
                        max_tokens=TOKENS, **inputs)

    def ksampler(self, **changes: object) -> Node:
        inputs = {"model": self.model, "positive": self.positive, "negative": self.negative,
                  "latent_image": self.latent, "seed": 0, "steps": 20, "cfg": 4.5,
                  "sampler_name": "dpmpp_2m", "scheduler": "simple", "denoise": 1.0, **changes}
        return self.add("KSampler", **inputs)

    def lcm(self, **changes: object) -> Node:
        inputs = {"model": self.model, "positive": self.positive, "latent": self.latent,
                  "seed": 0, "steps": 4, "strength": 1.0, "grid": "diffusers", **changes}
        return self.add("PixArtLCMSampler", **inputs)

    def picture(self, samples: Node) -> Node:
        image = self.add("VAEDecode", samples=samples, vae=self.vae)
        return self.add("SaveImage", images=image, filename_prefix="picture")

    def tensors(self, value: Node, name: str) -> Node:
        return self.add("ProbeSaveTensors", value=value, name=name)
