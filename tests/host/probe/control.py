"""What ControlNet tests need beside the pack: a VAE that gives a known latent, a foreign
ControlNet, and a count of everything that is alive."""

import gc

import comfy.controlnet
import comfy.model_management
import torch

from .common import ANY, CATEGORY, NO_CACHE, fingerprint, read_input, report

ENCODED: dict[str, list] = {}


class LatentVAE:
    """Encodes any picture to one latent, divided by `scale`, and counts how often."""

    def __init__(self, latent: torch.Tensor, label: str) -> None:
        self.latent, self.label = latent, label

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        ENCODED.setdefault(self.label, []).append(list(pixels.shape))
        return self.latent.clone()


class ProbeLatentVAE:
    """VAE whose encoder gives `control_latent` of a file whatever the picture."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"file": ("STRING", {"default": ""}),
                             "scale": ("FLOAT", {"default": 1.0, "step": 1e-5, "round": False}),
                             "label": ("STRING", {"default": "vae"})}}

    RETURN_TYPES = ("VAE",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    @classmethod
    def IS_CHANGED(cls, file, **_):  # noqa: N802
        return fingerprint(file)

    def run(self, file, scale, label):
        ENCODED.pop(label, None)
        return (LatentVAE(read_input(file)["control_latent"] / scale, label),)


class CountingVAE:
    """A VAE of the host that notes what it encodes."""

    def __init__(self, vae, label: str) -> None:
        self.vae, self.label = vae, label

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        ENCODED.setdefault(self.label, []).append(list(pixels.shape))
        return self.vae.encode(pixels)


class ProbeCountingVAE:
    """The VAE that comes in, with its encodings noted under `label`."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"vae": ("VAE",), "label": ("STRING", {"default": "vae"})}}

    RETURN_TYPES = ("VAE",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, vae, label):
        ENCODED.pop(label, None)
        return (CountingVAE(vae, label),)


class ProbeAlive:
    """Once `after` has been computed: what the VAE `label` encoded, bytes of all live tensors, and
    the memory the host counts as free."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"after": (ANY,), "label": ("STRING", {"default": "vae"})}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "run"
    CATEGORY = CATEGORY

    @classmethod
    def IS_CHANGED(cls, **_):  # noqa: N802
        return NO_CACHE

    def run(self, after, label):
        del after
        gc.collect()
        storages = {}
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return report({"encoded": ENCODED.get(label, []), "bytes": sum(storages.values()),
                       "free": comfy.model_management.get_free_memory()})


class Foreign(comfy.controlnet.ControlBase):
    """A ControlNet as other models have it: a dictionary of residuals."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        earlier = None
        if self.previous_controlnet is not None:
            earlier = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number,
                                                           transformer_options)
        return self.control_merge({"output": [torch.zeros_like(x_noisy)]}, earlier, None)

    def copy(self):
        other = Foreign()
        self.copy_to(other)
        return other


class ProbeForeignControl:
    """CONTROL_NET of another kind of model."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {}}

    RETURN_TYPES = ("CONTROL_NET",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self):
        return (Foreign(),)


NODES = (ProbeLatentVAE, ProbeCountingVAE, ProbeAlive, ProbeForeignControl)
