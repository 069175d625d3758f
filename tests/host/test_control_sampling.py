"""Whole runs with a ControlNet: steps it steers, LCM, image to image, memory, wrong models."""

import numpy as np
import pytest
import torch
from checks import relative, save, saved
from graphs import LCM, MODEL, PROMPT, SIDE, SMALL, StarterGraph
from PIL import Image, ImageDraw

import pixart_core as pc
from pixart_core.config import METADATA_KEY
from pixart_core.starter import find_starter

STARTER = find_starter()


@pytest.fixture(scope="module")
def control_file(tmp_path_factory):
    """A ControlNet for the starter with random projections, so that it does something."""
    base = pc.load_transformer(STARTER.transformer, dtype=torch.float32)
    net = pc.PixArtControlNet.from_base(base, depth=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "_proj." in name and "copied_block" not in name:
                parameter.normal_(std=0.03, generator=generator)
    file = tmp_path_factory.mktemp("control") / "starter_control.safetensors"
    pc.write_checkpoint(file, net.state_dict(), {METADATA_KEY: net.config.to_json()})
    return file


@pytest.fixture(scope="module")
def picture():
    image = Image.new("RGB", (96, 80))
    ImageDraw.Draw(image).ellipse((20, 10, 70, 60), outline=(255, 255, 255), width=3)
    return image


@pytest.fixture(scope="module")
def control(host, control_file, picture):
    """(ControlNet's name, image's name) in the host."""
    return host.add_model("controlnet", control_file), host.upload(picture, "control_hint.png")


class Steered(StarterGraph):
    """The starter graph with a ControlNet on both texts."""

    def __init__(self, control, negative_too=True, **settings):
        model = settings.pop("model", MODEL)
        size = {k: settings.pop(k) for k in ("width", "height", "batch") if k in settings}
        super().__init__(model=model, weight_dtype="float32", **size)
        name, image = control
        self.net = self.add("PixArtControlNetLoader", control_net_name=name,
                            weight_dtype="float32")
        self.image = self.add("LoadImage", image=image)
        self.plain = self.positive, self.negative
        if settings.pop("off", False):
            return
        both = {"negative": self.negative} if negative_too else {}
        steered = self.add("PixArtControlNetApply", **{
            "positive": self.positive, "control_net": self.net, "image": self.image,
            "vae": self.vae, "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, **both,
            **settings})
        self.positive, self.negative = steered[0], steered[1]


def latents(host, graph, samples):
    save(graph, samples, "steered")
    host.run(graph)
    return saved(host, "steered")


def euler(host, control, **settings):
    graph = Steered(control, **settings)
    return latents(host, graph, graph.ksampler(sampler_name="euler", steps=10))


@pytest.mark.parametrize(("start", "end", "first", "last"), [
    (0.5, 1.0, 5, 10), (0.0, 0.5, 0, 5), (0.25, 0.75, 3, 8), (0.4, 0.4004, 4, 5),
    # percentages that are a step's own timestep, 999 - 100 i, to the last digit
    (0.3 * 1000 / 999, 1.0, 3, 10), (0.0, 0.3 * 1000 / 999, 0, 4),
])
def test_start_and_end_switch_at_the_step_they_name(host, control, start, end, first, last):
    """The model calls that get a control, and stock KSamplerAdvanced nodes that hand over from
    plain to steered and back."""
    graph = Steered(control, start_percent=start, end_percent=end)
    watched = graph.add("ProbePatches", model=graph.model, label="steps")
    samples = graph.ksampler(sampler_name="euler", steps=10, model=watched)
    calls = graph.add("ProbeReport", label="steps", after=samples)
    seen = host.run(graph).json(calls)["calls"]
    assert [i for i, call in enumerate(seen) if call["args"][3] is not None] == [
        *range(first, last)]
    whole = euler(host, control, start_percent=start, end_percent=end)
    graph = Steered(control)
    latent, noise = graph.latent, "enable"
    for begin, stop, (positive, negative) in ((0, first, graph.plain),
                                              (first, last, (graph.positive, graph.negative)),
                                              (last, 10, graph.plain)):
        if begin == stop:
            continue
        latent = graph.add("KSamplerAdvanced", model=graph.model, add_noise=noise, noise_seed=0,
                           steps=10, cfg=4.5, sampler_name="euler", scheduler="simple",
                           positive=positive, negative=negative, latent_image=latent,
                           start_at_step=begin, end_at_step=stop,
                           return_with_leftover_noise="enable" if stop < 10 else "disable")
        noise = "disable"
    # handing latents on costs KSamplerAdvanced 1e-6 by itself; the steps above are exact
    assert relative(whole, latents(host, graph, latent)) < 1e-5


def test_strength_zero_is_no_control(host, control):
    assert torch.equal(euler(host, control, strength=0.0), euler(host, control, off=True))


def test_control_does_something(host, control):
    """What the tests here compare is not two plain pictures."""
    assert relative(euler(host, control), euler(host, control, off=True)) > 0.05


@pytest.fixture(scope="module")
def pipelines(control_file):
    return {name: pc.Pipeline.from_files(path, STARTER.t5_file, STARTER.vae, device="cpu",
                                         dtype=torch.float32, controlnet=control_file)
            for name, path in ((MODEL, STARTER.transformer), (LCM, STARTER.lcm))}


def same_picture(host, graph, samples, alone):
    shown = graph.picture(samples)
    image = host.picture(host.run(graph).images(shown)[0])
    return np.abs(np.asarray(image, np.int16) - np.asarray(alone, np.int16)).max() <= 1


@pytest.mark.parametrize("mode", ["balanced", "control matters more"])
def test_twenty_steps_with_guidance(host, control, pipelines, picture, mode):
    """bar: 1/255 against the standalone pipeline, image fitted to the size by both."""
    graph = Steered(control, width=72, height=56, mode=mode, strength=0.7)
    alone = pipelines[MODEL].generate(PROMPT, width=72, height=56, control_image=picture, seed=0,
                                      control_strength=0.7, control_mode=mode.split()[0])
    assert same_picture(host, graph, graph.ksampler(), alone)


def test_four_steps_of_lcm(host, control, pipelines, picture):
    """No guidance, no negative."""
    graph = Steered(control, negative_too=False, model=LCM)
    alone = pipelines[LCM].generate(PROMPT, control_image=picture, seed=0, **SMALL)
    assert same_picture(host, graph, graph.lcm(), alone)


def test_image_to_image(host, control, pipelines, picture):
    graph = Steered(control)
    latent = graph.add("VAEEncode", vae=graph.vae, pixels=graph.add(
        "EmptyImage", width=SIDE, height=SIDE, batch_size=1, color=0x1EA03C))
    samples = graph.ksampler(denoise=0.5, steps=10, latent_image=latent)
    alone = pipelines[MODEL].generate(
        PROMPT, steps=10, strength=0.5, seed=0, control_image=picture,
        image=Image.new("RGB", (SIDE, SIDE), (0x1E, 0xA0, 0x3C)), **SMALL)
    assert same_picture(host, graph, samples, alone)


def test_a_batch_is_steered_alike(host, control):
    """One hint for three pictures: each is what it would be alone."""
    three = euler(host, control, batch=3)
    graph = Steered(control, batch=3)
    part = graph.add("LatentFromBatch", samples=graph.latent, batch_index=2, length=1)
    one = latents(host, graph, graph.ksampler(sampler_name="euler", steps=10, latent_image=part))
    assert relative(three[2:], one) < 1e-4


def test_the_hint_is_encoded_once_and_nothing_is_kept(host, control):
    """20 runs at 512 px: one encoding in each, and neither tensors nor memory pile up."""
    def run(seed):
        graph = CountedGraph(control, width=512, height=512)
        done = graph.ksampler(seed=seed, steps=1, cfg=1.0)
        alive = graph.add("ProbeAlive", after=done, label="hint")
        return host.run(graph).json(alive)

    seen = [run(seed) for seed in range(20)]
    assert seen[0]["encoded"] == [[1, 512, 512, 3]]
    assert [len(report["encoded"]) for report in seen] == [*range(1, 21)]
    residuals = 3 * 32 * 32 * 192 * 4  # one set; a latent is a hundredth of it
    assert seen[-1]["bytes"] - seen[4]["bytes"] < residuals / 2
    assert seen[-1]["resident"] - seen[4]["resident"] < 8 * residuals, (
        "15 runs kept more than half a set of residuals each")


def test_a_cancelled_run_leaves_nothing_behind(host, control):
    """The host does not clean up then: the next run encodes the hint for itself, once."""
    graph = CountedGraph(control, label="cancelled")
    slow = graph.ksampler(steps=500)
    save(graph, slow, "cancelled")
    job = host.submit(graph)
    job.wait_for(lambda result: any(value > 2 for _, value, _ in result.progress))
    host.interrupt()
    assert job.wait().status == "interrupted"
    again = CountedGraph(control, label="cancelled")
    alive = again.add("ProbeAlive", after=again.ksampler(steps=3), label="cancelled")
    assert len(host.run(again).json(alive)["encoded"]) == 2


def test_dual_guidance_steers_the_positive_side_alone(host, control):
    """Its conditions come as negative, middle, positive; the order says nothing."""
    def sample(graph, positive, middle, negative):
        guider = graph.add("DualCFGGuider", model=graph.model, cond1=positive, cond2=middle,
                           negative=negative, cfg_conds=5.0, cfg_cond2_negative=3.0,
                           style="regular")
        noise = graph.add("RandomNoise", noise_seed=1)
        sampler = graph.add("KSamplerSelect", sampler_name="euler")
        sigmas = graph.add("BasicScheduler", model=graph.model, scheduler="simple", steps=3,
                           denoise=1.0)
        return latents(host, graph, graph.add(
            "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas,
            latent_image=graph.latent))

    all_through = Steered(control, cond_only=True)
    first = sample(all_through, all_through.positive, all_through.plain[0], all_through.negative)
    one = Steered(control, negative_too=False)
    second = sample(one, one.positive, one.plain[0], one.plain[1])
    assert relative(first, second) < 1e-5


def test_a_sampler_that_wants_a_negative_is_told_why_there_is_none(host, control, lives_on):
    graph = Steered(control, negative_too=False)
    save(graph, graph.ksampler(steps=2), "never")
    told = [data for kind, data in host.run(graph).events if kind == "execution_error"]
    assert "no negative to hand on" in told[0]["exception_message"]


class CountedGraph(Steered):
    """A steered graph whose ControlNet's VAE notes what it encodes."""

    def __init__(self, control, label="hint", **size):
        super().__init__(control, off=True, **size)
        vae = self.add("ProbeCountingVAE", vae=self.vae, label=label)
        steered = self.add("PixArtControlNetApply", positive=self.positive, image=self.image,
                           negative=self.negative, control_net=self.net, vae=vae, strength=1.0,
                           start_percent=0.0, end_percent=1.0)
        self.positive, self.negative = steered[0], steered[1]


def failure(host, graph, samples):
    save(graph, samples, "never")
    return host.run(graph, ok=False).error


def test_the_hosts_own_pixart_is_refused(host, control, tmp_path):
    """ComfyUI's PixArt would drop the control; ours says which loader to use."""
    config = pc.PRESETS["alpha-1024"].replace(depth=1)  # the host knows no other width
    shapes = pc.PixArtTransformer(config, device="meta").state_dict()
    zeros = {name: torch.zeros(t.shape, dtype=torch.float16) for name, t in shapes.items()}
    pc.write_checkpoint(tmp_path / "stock.safetensors", zeros, {})
    graph = Steered(control)
    stock = host.add_model("diffusion_models", tmp_path / "stock.safetensors")
    model = graph.add("UNETLoader", unet_name=stock, weight_dtype="default")
    error = failure(host, graph, graph.ksampler(model=model, steps=2))
    assert "PixArt Model Loader" in error.message
    assert host.alive()


def test_a_foreign_controlnet_is_refused(host, control, lives_on):
    """Alone, before ours and after ours, and in our apply node."""
    graph = Steered(control)
    foreign = graph.add("ProbeForeignControl")

    def stock(net, texts):
        return graph.add("ControlNetApplyAdvanced", positive=texts[0], negative=texts[1],
                         control_net=net, image=graph.image, vae=graph.vae, strength=1.0,
                         start_percent=0.0, end_percent=1.0)

    alone = stock(foreign, graph.plain)
    before = stock(graph.net, alone)
    after = stock(foreign, (graph.positive, graph.negative))
    for chain in (alone, before, after):
        again = Steered(control)
        again.prompt = dict(graph.prompt)
        error = failure(host, again, again.ksampler(positive=chain[0], negative=chain[1], steps=2))
        assert "load a PixArt ControlNet with PixArt ControlNet Loader" in error.message
    again = Steered(control)
    again.prompt = dict(graph.prompt)
    ours = again.add("PixArtControlNetApply", positive=graph.plain[0], control_net=foreign,
                     image=graph.image, vae=graph.vae, strength=1.0, start_percent=0.0,
                     end_percent=1.0)
    error = failure(host, again, again.ksampler(positive=ours[0], steps=2))
    assert error.node == ours.id
    assert "PixArt ControlNet Loader" in error.message


def test_no_vae_is_refused_at_the_apply_node(host, control, lives_on):
    graph = Steered(control, off=True)
    stock = graph.add("ControlNetApplyAdvanced", positive=graph.positive, negative=graph.negative,
                      control_net=graph.net, image=graph.image, strength=1.0, start_percent=0.0,
                      end_percent=1.0)
    error = failure(host, graph, graph.ksampler(positive=stock[0], negative=stock[1], steps=2))
    assert error.node == stock.id
    assert "needs the VAE" in error.message


def test_another_width_is_refused(host, control, make_control, lives_on):
    graph = Steered((make_control(hidden_size=96, depth=5, num_heads=4), control[1]))
    error = failure(host, graph, graph.ksampler(steps=2))
    assert "96 wide with 4 heads" in error.message


@pytest.fixture
def make_control(host, tmp_path):
    from pixart_core.config import PixArtConfig
    from pixart_core.model import PixArtControlNet, PixArtTransformer

    def make(**fields):
        small = {"mlp_hidden_size": 96, "caption_channels": 24}
        net = PixArtControlNet.from_base(PixArtTransformer(PixArtConfig(**small, **fields)), 2)
        file = tmp_path / "other_width.safetensors"
        pc.write_checkpoint(file, net.state_dict(), {METADATA_KEY: net.config.to_json()})
        return host.add_model("controlnet", file)

    return make


def test_files_that_are_no_controlnet(host, control, lives_on):
    """Said before the workflow starts, with the loader that takes the file."""
    name = host.add_model("controlnet", STARTER.transformer, "a_transformer.safetensors")
    graph = Steered((name, control[1]))
    error = failure(host, graph, graph.ksampler(steps=2))
    assert error.kind == "validation"
    assert error.node == graph.net.id
    assert "PixArt Model Loader" in error.message


def test_a_range_turned_round_is_refused(host, control, lives_on):
    graph = Steered(control, start_percent=0.6, end_percent=0.5)
    error = failure(host, graph, graph.ksampler(steps=2))
    assert "start_percent is 0.6" in error.message


def test_the_model_still_runs_plain_after_a_steered_run(host, control):
    """Nothing of a ControlNet sticks to the model."""
    before = euler(host, control, off=True)
    euler(host, control)
    graph = Steered(control, off=True)
    again = latents(host, graph, graph.ksampler(sampler_name="euler", steps=10))
    assert torch.equal(before, again)
