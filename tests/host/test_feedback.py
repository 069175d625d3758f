"""What a user sees while a picture is drawn: previews and progress of every sampler."""

import contextlib
from dataclasses import dataclass

import numpy
import pytest
import torch
from checks import STARTER, save, saved
from graphs import LCM, MODEL, VAE, StarterGraph
from launch import running_host
from PIL import Image, ImageOps
from prompt import Graph
from safetensors.torch import load_file, save_file

WIDTH, HEIGHT = 160, 96  # of the starter's training
SHOWN = (512, 307)  # previews are scaled to fit 512 px
STEPS = {"ksampler": 4, "image to image": 3, "lcm": 4, "lcm custom": 4, "dmd": 1, "dmd custom": 1,
         "sa-solver": 5}
METHODS = ["latent2rgb", "taesd"]
SCALE = 0.18215  # of SD 1.5 latents
CLOSE, FAR = 3.0, 10.0  # mean difference in levels of 255: of JPEG, and of anything wrong


class AllSamplers(StarterGraph):
    """One graph that draws with every sampler, each on a model that keeps what is denoised."""

    def __init__(self):
        super().__init__(width=WIDTH, height=HEIGHT)
        self.lcm_model = self.add("PixArtLoader", model_name=LCM)
        self.nodes, self.reports, self.pictures = {}, {}, {}
        grey = self.add("EmptyImage", width=WIDTH, height=HEIGHT, batch_size=1, color=0x808080)
        start = self.add("VAEEncode", vae=self.vae, pixels=grey)
        solver = {"solver": "sa-solver", "steps": 5, "strength": 1.0}
        self.take("ksampler", self.model, lambda m: self.ksampler(model=m, steps=4))
        self.take("image to image", self.model, lambda m: self.ksampler(
            model=m, steps=3, denoise=0.6, latent_image=start))
        self.take("lcm", self.lcm_model, lambda m: self.lcm(model=m))
        schedule = self.add("PixArtLCMSchedule", steps=4, strength=1.0, grid="diffusers")
        self.take("lcm custom", self.lcm_model, lambda m: self.custom(m, schedule, schedule[1]))
        self.take("dmd", self.model, lambda m: self.add(
            "PixArtDMDSampler", model=m, positive=self.positive, latent=self.latent, seed=0))
        schedule = self.add("PixArtDMDSchedule")
        self.take("dmd custom", self.model, lambda m: self.custom(m, schedule, schedule[1]))
        sigmas = self.add("PixArtSchedule", **solver)
        self.take("sa-solver", self.model, lambda m: self.custom(
            m, self.add("PixArtSASolver", eta=1.0), sigmas, cfg=3.0))

    def custom(self, model, sampler, sigmas, cfg=1.0):
        return self.add("SamplerCustom", model=model, add_noise=True, noise_seed=0, cfg=cfg,
                        positive=self.positive, negative=self.negative, sampler=sampler,
                        sigmas=sigmas, latent_image=self.latent)

    def take(self, name, model, draw):
        counted = self.add("ProbeCalls", model=model, label=f"feedback {name}")
        self.nodes[name] = node = draw(counted)
        self.pictures[name] = self.picture(node)
        self.reports[name] = self.add("ProbeCallsReport", label=f"feedback {name}", after=node)


@dataclass
class Seen:
    """What one sampler showed; `denoised` (steps, 1, 4, h, w) is what its model calls gave."""

    previews: list[Image.Image]
    progress: list[tuple[float, float]]
    states: list[tuple[float, float, str]]
    calls: int
    denoised: torch.Tensor
    picture: numpy.ndarray


def pixels(image, size=SHOWN):
    """A picture scaled as the host scales its previews."""
    scaled = ImageOps.contain(image.convert("RGB"), size, Image.Resampling.BILINEAR)
    return numpy.asarray(scaled).astype(float)


def difference(a, b):
    return numpy.abs(a - b).mean()


@contextlib.contextmanager
def previewing(host, installation, tmp_path_factory, method):
    """A server that shows previews of `method`, and the extra data that a prompt of it takes."""
    if "preview_method" in (installation.path / "execution.py").read_text(encoding="utf-8"):
        yield host, {"preview_method": method}
    elif method == "latent2rgb":
        yield host, {}  # what "auto" stands for, which the server was started with
    else:
        here = __import__("conftest")
        packs = {here.PACK_NAME: here.REPOSITORY, "probe": here.HERE / "probe"}
        with running_host(installation, tmp_path_factory.mktemp("previews"), packs,
                          ("--cpu", "--preview-method", method)) as other:
            yield other, {}


@pytest.fixture(scope="module", params=METHODS)
def server(request, host, installation, tmp_path_factory):
    """(method, the server, extra data of its prompts), with TAESD for alpha and Sigma: the
    starter's decoder, and the same with red and blue exchanged."""
    decoder = {name.removeprefix("taesd_decoder."): tensor
               for name, tensor in load_file(STARTER.vae).items()
               if name.startswith("taesd_decoder.")}
    last = max(int(name.split(".")[0]) for name in decoder)
    exchanged = {name: tensor.flip(0).contiguous() if name.startswith(f"{last}.") else tensor
                 for name, tensor in decoder.items()}
    method = request.param
    with previewing(host, installation, tmp_path_factory, method) as (server, extra):
        folder = server.models_dir / "vae_approx"
        save_file(decoder, folder / "taesd_decoder.safetensors")
        save_file(exchanged, folder / "taesdxl_decoder.safetensors")
        yield method, server, extra


@pytest.fixture(scope="module")
def run(server):
    """What each sampler of AllSamplers showed."""
    method, host, extra = server
    graph = AllSamplers()
    result = host.run(graph, extra=extra)
    seen = {}
    for name, node in graph.nodes.items():
        states = [(state["value"], state["max"], state["state"])
                  for kind, data in result.events if kind == "progress_state"
                  for state in [data["nodes"].get(node.id)] if state]
        seen[name] = Seen(
            [p.image for p in result.previews if p.node == node.id],
            [(value, total) for where, value, total in result.progress if where == node.id],
            [state for i, state in enumerate(states) if state not in states[:i]],
            result.json(graph.reports[name])["calls"],
            host.read_tensors(f"feedback {name}")["denoised"],
            pixels(host.picture(result.images(graph.pictures[name])[0])))
    return method, seen


@pytest.fixture(scope="module")
def colours(host):
    """{"SD15" or "SDXL": a function of latents (1, 4, h, w) as the host's latent2rgb shows them}"""
    graph = Graph()
    node = graph.add("ProbeLatentColours")
    found = host.run(graph).json(node)

    def shower(factors, bias):
        def show(latents):
            images = latents.movedim(1, -1) @ torch.tensor(factors) + torch.tensor(bias)
            return to_pixels((images + 1) / 2)
        return show

    return {name: shower(**entry) for name, entry in found.items()}


@pytest.fixture(scope="module")
def decoded(host):
    """What VAE Decode makes of latents (B, 4, h, w) of an alpha model."""

    def decode(latents):
        graph = Graph()
        name = host.write_tensors("previewed", {"samples": latents / SCALE})
        image = graph.add("VAEDecode", samples=graph.add("ProbeLoadLatent", file=name),
                          vae=graph.add("VAELoader", vae_name=VAE))
        save(graph, image, "previewed")
        host.run(graph)
        return to_pixels(saved(host, "previewed", "value"))

    return decode


def to_pixels(images):
    """(B, h, w, 3) in 0..1 -> an array of each, scaled as the host scales its previews."""
    levels = (images.clamp(0, 1) * 255).to(torch.uint8).numpy()
    return numpy.stack([pixels(Image.fromarray(image)) for image in levels])


@pytest.mark.parametrize("sampler", STEPS)
def test_every_step_is_counted_and_shown_once(run, sampler):
    """By both kinds of progress message; the preview has the picture's shape."""
    _, seen = run
    shown, steps = seen[sampler], STEPS[sampler]
    counted = [(value, steps) for value in range(1, steps + 1)]
    assert shown.progress == counted
    running = [(value, total, "running") for value, total in counted]
    assert shown.states == [(0, 1, "running"), *running, (steps, steps, "finished")]
    assert shown.calls == len(shown.denoised) == steps
    assert [image.size for image in shown.previews] == [SHOWN] * steps


@pytest.mark.parametrize("sampler", STEPS)
def test_previews_show_what_is_denoised(run, colours, decoded, sampler):
    """Not the noisy latent, not at another scale, not in the colours of another VAE."""
    method, seen = run
    found = numpy.stack([pixels(preview) for preview in seen[sampler].previews])
    latents = seen[sampler].denoised[:, 0]
    right = colours["SD15"] if method == "latent2rgb" else decoded
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    # one step of a model that is no DMD ends in latents that look the same in larger ones
    scale = SCALE if sampler.startswith("dmd") else 1 / SCALE
    wrong = {"noise": right(latents + 2 * noise), "scale": right(latents * scale)}
    if method == "latent2rgb":
        wrong["factors"] = colours["SDXL"](latents)
    off = [difference(*pair) for pair in zip(found, right(latents), strict=True)]
    assert max(off) < CLOSE, off
    # in a latent that is far out of range some of these make no difference, but not in all
    far = {name: max(map(difference, found, images)) for name, images in wrong.items()}
    assert min(far.values()) > FAR, far


@pytest.mark.parametrize("server", ["taesd"], indirect=True)
@pytest.mark.parametrize("sampler", STEPS)
def test_the_last_preview_is_the_picture(run, sampler):
    """The starter's VAE is a TAESD, so the two are the same but for JPEG; its latents are not
    those that the factors of latent2rgb were made for."""
    _, seen = run
    last, picture = pixels(seen[sampler].previews[-1]), seen[sampler].picture
    assert difference(last, picture) < CLOSE
    assert numpy.corrcoef(last.ravel(), picture.ravel())[0, 1] > 0.99


def test_sigma_is_shown_in_its_own_colours(server, colours, decoded):
    """SDXL's factors, and the TAESD that is named for SDXL."""
    method, host, extra = server
    graph = StarterGraph(model=MODEL, width=WIDTH, height=HEIGHT, variant="sigma")
    graph.model = graph.add("ProbeCalls", model=graph.model, label="feedback sigma")
    node = graph.ksampler(steps=2)
    graph.add("ProbeCallsReport", label="feedback sigma", after=node)
    result = host.run(graph, extra=extra)
    found = numpy.stack([pixels(preview.image) for preview in result.previews])
    latents = host.read_tensors("feedback sigma")["denoised"][:, 0]
    if method == "latent2rgb":
        right, wrong = colours["SDXL"](latents), colours["SD15"](latents)
    else:
        wrong = decoded(latents)
        right = wrong[..., ::-1]
    assert max(map(difference, found, right)) < CLOSE
    assert max(map(difference, found, wrong)) > FAR
