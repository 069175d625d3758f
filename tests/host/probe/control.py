"""What ControlNet tests need beside the pack: a VAE that gives a known latent, a foreign
ControlNet, and a count of everything that is alive."""

import contextlib
import ctypes
import gc

import comfy.controlnet
import comfy.model_management
import comfy.sampler_helpers
import psutil
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


def give_free_memory_back():
    """Let the C library return what it keeps for later, which would count as resident."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class ProbeAlive:
    """Once `after` has been computed: what the VAE `label` encoded, bytes of all live tensors, the
    server's resident memory and what the host counts as free."""

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
        give_free_memory_back()
        storages = {}
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return report({"encoded": ENCODED.get(label, []), "bytes": sum(storages.values()),
                       "resident": psutil.Process().memory_info().rss,
                       "free": comfy.model_management.get_free_memory()})


class Foreign(comfy.controlnet.ControlBase):
    """A ControlNet of another kind of model, which must never get to run on a PixArt."""

    def pre_run(self, model, percent_to_timestep_function):
        raise AssertionError("a foreign ControlNet was prepared")

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        raise AssertionError("a foreign ControlNet ran")

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


class ProbeControlClone:
    """CONTROL_NET as the host would put it on another card."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"control_net": ("CONTROL_NET",)}}

    RETURN_TYPES = ("CONTROL_NET",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, control_net):
        device = torch.device("cpu")
        clone = control_net.deepclone_multigpu(device, autoregister=True)
        assert control_net.multigpu_clones.pop(device) is clone
        assert clone.patcher is not control_net.patcher
        return (clone,)


class ProbeControlStrength:
    """CONDITIONING whose ControlNet has another strength, without an apply node's short cuts."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"conditioning": ("CONDITIONING",), "strength": ("FLOAT", {})}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, conditioning, strength):
        for _, options in conditioning:
            options["control"].strength = strength
        return (conditioning,)


class ProbeEstimate:
    """Bytes that the host reckons with for sampling a latent of some size: what estimate_memory
    and the ControlNets say, and the call itself for a guidance pair."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",), "positive": ("CONDITIONING",),
                             "latent": ("LATENT",)}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, model, positive, latent):
        shape = list(latent["samples"].shape)
        conds = {"positive": comfy.sampler_helpers.convert_cond(positive)}
        first = comfy.sampler_helpers.estimate_memory(model, shape, conds)[0]
        extra = comfy.sampler_helpers.get_additional_models(conds, torch.float32)[1]
        cond = conds["positive"][0]
        made = model.model.extra_conds(**{
            "width": shape[3] * 8, "height": shape[2] * 8, **cond,
            "noise": latent["samples"], "device": "cpu"})
        sizes = {name: [value.size()] * 2 for name, value in made.items()}
        call = model.model.memory_required([2 * shape[0], *shape[1:]], cond_shapes=sizes)
        return report({"first": first + extra, "call": call})


NODES = (ProbeLatentVAE, ProbeCountingVAE, ProbeAlive, ProbeForeignControl, ProbeControlClone,
         ProbeControlStrength, ProbeEstimate)
