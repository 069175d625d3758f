"""ControlNets in the real host: the official outputs, strength, steps, batches, areas, memory."""

import json
from pathlib import Path

import pytest
import torch
from checks import relative
from graphs import Graph
from safetensors.torch import load_file, save_file

import pixart_core as pc
from pixart_core.config import METADATA_KEY
from pixart_core.model.controlnet import mode_weights

GOLDEN = Path(__file__).parents[1] / "golden"
SCALE = 0.18215  # of SD 1.5 latents, which the host applies to what a VAE encodes


class Case:
    """A golden ControlNet case as files of the host, and the engine on the same weights."""

    def __init__(self, host, name, folder):
        self.host, self.name = host, name
        tensors = load_file(GOLDEN / f"{name}.safetensors")
        weights = {k.removeprefix("weights."): v for k, v in tensors.items()
                   if k.startswith("weights.")}
        self.weights = {k.removeprefix("base_model."): v for k, v in weights.items()
                        if k.startswith("base_model.")}
        self.base = pc.load_transformer(self.weights, num_heads=2, variant="alpha")
        self.net = pc.load_controlnet(weights, num_heads=2)
        self.official = weights
        self.tensors = {k.removeprefix("in."): v for k, v in tensors.items() if k[:3] == "in."}
        self.latent, self.out = self.tensors["control_latent"], tensors["out"][:, :4]
        header = {METADATA_KEY: json.dumps({"num_heads": 2, "variant": "alpha"})}
        save_file(self.weights, folder / f"{name}_base.safetensors", header)
        save_file(weights, folder / f"{name}_control.safetensors", header)
        self.model = host.add_model("diffusion_models", folder / f"{name}_base.safetensors")
        self.control = host.add_model("controlnet", folder / f"{name}_control.safetensors")
        self.file = host.write_tensors(name, {k: v for k, v in self.tensors.items()
                                              if k not in ("image_size", "aspect_ratio")})
        self.options = {}
        if "image_size" in self.tensors:
            (height, width), ratio = self.tensors["image_size"][0], self.tensors["aspect_ratio"][0]
            self.options = {"height": int(height), "width": int(width),
                            "aspect_ratio": ratio.item()}

    @torch.no_grad()
    def engine(self, *controls, base=None, rows=slice(None), x=None):
        """epsilon of the engine for some samples of the golden batch."""
        inputs = {name: self.tensors[name][rows] for name in (
            "x", "timestep", "caption", "caption_mask")}
        inputs["x"] = inputs["x"] if x is None else x
        if self.options:
            inputs["image_size"] = self.tensors["image_size"][:1].expand(len(inputs["x"]), 2)
            inputs["aspect_ratio"] = self.tensors["aspect_ratio"][:1].expand(len(inputs["x"]), 1)
        return (base or self.base)(control=controls, **inputs)[:, :4]


class ControlGraph(Graph):
    """Model, ControlNet, a VAE that gives the golden latent, and the golden text."""

    def __init__(self, case, **options):
        super().__init__()
        self.case = case
        self.model = self.add("PixArtLoader", model_name=case.model, weight_dtype="float32")
        self.net = self.add("PixArtControlNetLoader", control_net_name=case.control,
                            weight_dtype="float32")
        self.vae = self.add("ProbeLatentVAE", file=case.file, scale=SCALE, label="golden")
        self.image = self.add("EmptyImage", width=160, height=96, batch_size=1, color=0)
        self.text = self.add("ProbeLoadConditioning", file=case.file,
                             options=json.dumps({**case.options, **options}))

    def steered(self, positive=None, **settings):
        return self.add("PixArtControlNetApply", **{
            "positive": positive or self.text, "control_net": self.net, "image": self.image,
            "vae": self.vae, "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0,
            **settings})

    def apply(self, positive, **inputs):
        self.add("ProbeApplyModel", **{"model": self.model, "name": "control",
                                       "file": self.case.file, "positive": positive,
                                       "options": "{}", **inputs})
        self.case.host.run(self)
        return self.case.host.read_tensors("control")["eps"]


@pytest.fixture(scope="module", params=["control_512", "control_1024"])
def case(request, host, tmp_path_factory):
    return Case(host, request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def small(host, tmp_path_factory):
    return Case(host, "control_1024", tmp_path_factory.mktemp("small"))


def test_official_outputs_through_the_sampling_path(case):
    """bar: 1e-5. Loader, our apply node, calc_cond_batch, apply_model; two hints in a batch."""
    graph = ControlGraph(case)
    assert relative(graph.apply(graph.steered()), case.out) < 1e-5


def test_the_stock_apply_node_does_the_same(small):
    graph = ControlGraph(small)
    stock = graph.add("ControlNetApplyAdvanced", positive=graph.text, negative=graph.text,
                      control_net=graph.net, image=graph.image, vae=graph.vae, strength=1.0,
                      start_percent=0.0, end_percent=1.0)
    assert relative(graph.apply(stock), small.out) < 1e-5


def steered_eps(case, **settings):
    graph = ControlGraph(case)
    return graph.apply(graph.steered(**settings))


def plain_eps(case):
    graph = ControlGraph(case)
    return graph.apply(graph.text)


def test_strength_zero_is_no_control(small):
    """At the node, which leaves the ControlNet out, and with one that runs at strength 0."""
    plain = plain_eps(small)
    assert torch.equal(steered_eps(small, strength=0.0), plain)
    graph = ControlGraph(small)
    zero = graph.add("ProbeControlStrength", conditioning=graph.steered(), strength=0.0)
    assert torch.equal(graph.apply(zero), plain)


def test_a_new_controlnet_changes_nothing(small, tmp_path):
    """Copies of the first blocks behind projections that are zero: the start of training."""
    net = pc.PixArtControlNet.from_base(small.base, depth=2)
    pc.write_checkpoint(tmp_path / "zero.safetensors", net.state_dict(),
                        {METADATA_KEY: net.config.to_json()})
    name = small.host.add_model("controlnet", tmp_path / "zero.safetensors")
    graph = ControlGraph(small)
    zero = graph.add("PixArtControlNetLoader", control_net_name=name, weight_dtype="float32")
    assert torch.equal(graph.apply(graph.steered(control_net=zero)), plain_eps(small))


def test_two_halves_are_a_whole(small):
    graph = ControlGraph(small)
    half = graph.steered(strength=0.5)
    assert relative(graph.apply(graph.steered(half, strength=0.5)), steered_eps(small)) < 1e-6


def test_ours_and_the_stock_node_chain(small):
    """Either way round; strengths are each their own."""
    expected = small.engine(pc.Control(small.net, small.latent, 0.9))
    graph = ControlGraph(small)
    ours = graph.steered(strength=0.3)
    stock = graph.add("ControlNetApplyAdvanced", positive=ours, negative=graph.text,
                      control_net=graph.net, image=graph.image, vae=graph.vae, strength=0.6,
                      start_percent=0.0, end_percent=1.0)
    assert relative(graph.apply(stock), expected) < 1e-5


@pytest.mark.parametrize(("mode", "cond_only", "halves"), [
    ("balanced", False, 2), ("prompt matters more", False, 2), ("control matters more", False, 1),
    ("balanced", True, 1),
])
def test_modes_at_guidance(small, mode, cond_only, halves):
    """What each mode does to both halves of one guidance batch, against the engine."""
    weights = mode_weights({"balanced": "balanced", "prompt matters more": "prompt",
                            "control matters more": "control"}[mode], small.net.config.depth)
    control = pc.Control(small.net, small.latent, 0.8, weights)
    positive, negative = small.engine(control), small.engine(*[control] * (halves - 1))
    graph = ControlGraph(small)
    steered = graph.steered(negative=graph.text, strength=0.8, mode=mode, cond_only=cond_only)
    eps = graph.apply(steered[0], negative=steered[1], cfg=3.0)
    assert relative(eps, negative + 3 * (positive - negative)) < 1e-5


def test_both_halves_run_as_one_batch(small):
    """One control object for positive and negative: the host batches them."""
    graph = ControlGraph(small)
    steered = graph.steered(negative=graph.text, cond_only=True)
    watched = graph.add("ProbePatches", model=graph.model, label="control")
    graph.add("ProbeReport", label="control", after=graph.add(
        "ProbeApplyModel", model=watched, name="control", file=small.file, positive=steered[0],
        negative=steered[1], cfg=3.0, options="{}"))
    calls = small.host.run(graph).json("ProbeReport")["calls"]
    assert [sorted(call["cond_or_uncond"]) for call in calls] == [[0, 1]]


def test_one_hint_serves_a_batch(small):
    first = {"control_latent": small.latent[:1]}
    file = small.host.write_tensors("one_hint", first)
    graph = ControlGraph(small)
    vae = graph.add("ProbeLatentVAE", file=file, scale=SCALE, label="one")
    steered = graph.steered(negative=graph.text, vae=vae)
    eps = graph.apply(steered[0], negative=steered[1], cfg=2.0)
    assert relative(eps, small.engine(pc.Control(small.net, small.latent[:1]))) < 1e-5


def test_hints_repeat_over_a_longer_batch(small):
    """Two hints, four latents: 0 1 0 1, in each half of the guidance batch."""
    x = small.tensors["x"].repeat(2, 1, 1, 1)
    timestep = small.tensors["timestep"][:1]
    file = small.host.write_tensors("four", {"x": x, "timestep": timestep})
    one = {k: small.tensors[k][:1] for k in ("caption", "caption_mask")}
    graph = ControlGraph(small)
    text = graph.add("ProbeLoadConditioning", options=json.dumps(small.options),
                     file=small.host.write_tensors("one_text", one))
    steered = graph.steered(text, negative=text)
    eps = graph.apply(steered[0], negative=steered[1], cfg=2.0, file=file)
    with torch.no_grad():
        expected = small.base(
            x, timestep.expand(4), one["caption"].expand(4, -1, -1),
            one["caption_mask"].expand(4, -1), small.tensors["image_size"][:1].expand(4, 2),
            small.tensors["aspect_ratio"][:1].expand(4, 1),
            control=[pc.Control(small.net, small.latent.repeat(2, 1, 1, 1))])[:, :4]
    assert relative(eps, expected) < 1e-5


def test_an_area_sees_its_part_of_the_hint(small):
    """The stock area node: the model gets a crop, and the hint is cropped, not squeezed."""
    top, left, rows, columns = 8, 4, 16, 12
    graph = ControlGraph(small)
    area = graph.add("ConditioningSetArea", conditioning=graph.text, width=columns * 8,
                     height=rows * 8, x=left * 8, y=top * 8, strength=1.0)
    steered = graph.steered(area, negative=graph.text, cond_only=True)
    eps = graph.apply(steered[0], negative=steered[1], cfg=1.0)
    part = (..., slice(top, top + rows), slice(left, left + columns))
    expected = small.engine(pc.Control(small.net, small.latent[part]), x=small.tensors["x"][part])
    assert relative(eps[part], expected) < 1e-5


def test_areas_of_one_size_share_a_batch(small):
    """Two areas of one control in two places: each its own part of the hint; and guidance."""
    corners = ((0, 0), (16, 8))
    graph = ControlGraph(small)
    parts = [graph.add("ConditioningSetArea", conditioning=graph.text, width=96, height=128,
                       x=left * 8, y=top * 8, strength=1.0) for top, left in corners]
    both = graph.add("ConditioningCombine", conditioning_1=parts[0], conditioning_2=parts[1])
    steered = graph.steered(both, negative=graph.text)
    eps = graph.apply(steered[0], negative=steered[1], cfg=1.0)
    for top, left in corners:
        part = (..., slice(top, top + 16), slice(left, left + 12))
        expected = small.engine(pc.Control(small.net, small.latent[part]),
                                x=small.tensors["x"][part])
        assert relative(eps[part], expected) < 1e-5


def test_masks_mix_steered_and_plain(small):
    """A mask over the whole picture: the steered text left, the plain one right."""
    graph = ControlGraph(small)
    height, width = small.latent.shape[-2] * 8, small.latent.shape[-1] * 8
    white = graph.add("SolidMask", value=1.0, width=width, height=height)
    black = graph.add("SolidMask", value=0.0, width=width, height=height)
    half = graph.add("SolidMask", value=1.0, width=width // 2, height=height)
    left = graph.add("MaskComposite", destination=black, source=half, x=0, y=0, operation="add")
    right = graph.add("MaskComposite", destination=white, source=left, x=0, y=0,
                      operation="subtract")
    texts = [graph.add("ConditioningSetMask", conditioning=text, mask=mask, strength=1.0,
                       set_cond_area="default")
             for text, mask in ((graph.steered(), left), (graph.text, right))]
    eps = graph.apply(graph.add("ConditioningCombine", conditioning_1=texts[0],
                                conditioning_2=texts[1]))
    middle = small.latent.shape[-1] // 2
    steered = small.engine(pc.Control(small.net, small.latent))
    assert relative(eps[..., : middle - 1], steered[..., : middle - 1]) < 1e-5
    assert relative(eps[..., middle + 1:], small.engine()[..., middle + 1:]) < 1e-5


def test_a_lora_on_the_base_is_seen_by_the_control(small, tmp_path):
    """The copies read what the patched first block gives."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 48, generator=generator), torch.randn(48, 4, generator=generator)
    key = "diffusion_model.blocks.0.cross_attn.proj"
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up * 0.1},
              tmp_path / "lora.safetensors")
    merged = dict(small.weights)
    merged["blocks.0.cross_attn.proj.weight"] = (
        merged["blocks.0.cross_attn.proj.weight"] + up * 0.1 @ down)
    base = pc.load_transformer(merged, num_heads=2, variant="alpha")
    graph = ControlGraph(small)
    patched = graph.add("LoraLoaderModelOnly", model=graph.model, strength_model=1.0,
                        lora_name=small.host.add_model("loras", tmp_path / "lora.safetensors"))
    eps = graph.apply(graph.steered(), model=patched)
    expected = small.engine(pc.Control(small.net, small.latent), base=base)
    assert relative(eps, expected) < 1e-5
    assert relative(expected, small.out) > 1e-2


def test_weights_in_eight_bits(small):
    graph = ControlGraph(small)
    net = graph.add("PixArtControlNetLoader", control_net_name=small.control,
                    weight_dtype="float8_e4m3fn")
    error = relative(graph.apply(graph.steered(control_net=net)), small.out)
    assert 1e-4 < error < 0.1


def test_a_model_in_half_precision_takes_a_float32_control(small):
    """The copies follow the activations, whatever their weights are kept in."""
    graph = ControlGraph(small)
    half = graph.add("PixArtLoader", model_name=small.model, weight_dtype="bfloat16")
    assert relative(graph.apply(graph.steered(), model=half), small.out) < 0.02


def test_a_clone_for_another_card_does_the_same(small):
    """deepclone_multigpu: weights, strength and network of its own."""
    graph = ControlGraph(small)
    clone = graph.add("ProbeControlClone", control_net=graph.net)
    assert relative(graph.apply(graph.steered(control_net=clone)), small.out) < 1e-5


def test_the_memory_estimate_knows_the_residuals(small):
    """One set for a chain, of the picture's size and not the hint's, in both estimates."""
    reports = []
    for chain, hint in ((0, 64), (1, 64), (1, 512), (2, 64)):
        graph = ControlGraph(small)
        image = graph.add("EmptyImage", width=hint, height=hint, batch_size=1, color=0)
        text = graph.text
        for _ in range(chain):
            text = graph.steered(text, image=image)
        latent = graph.add("EmptyLatentImage", width=640, height=384, batch_size=1)
        estimate = graph.add("ProbeEstimate", model=graph.model, positive=text, latent=latent)
        reports.append(small.host.run(graph).json(estimate))
    one_set = 2 * 3 * (40 * 24) * 48 * 4  # a guidance pair, 3 copies, tokens, width, bytes
    for name in ("first", "call"):
        plain, *steered = (report[name] for report in reports)
        assert [value - plain for value in steered] == pytest.approx([one_set] * 3)


@pytest.fixture(scope="module")
def sigma(host, tmp_path_factory):
    """A Sigma model of the golden weights with a ControlNet made from it."""
    folder = tmp_path_factory.mktemp("sigma")
    tensors = load_file(GOLDEN / "sigma_512.safetensors")
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k[:8] == "weights."}
    base = pc.load_transformer(weights, num_heads=2, variant="sigma")
    net = pc.PixArtControlNet.from_base(base, depth=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "_proj." in name and "copied_block" not in name:
                parameter.normal_(std=0.1, generator=generator)
    pc.write_checkpoint(folder / "sigma_base.safetensors", base.state_dict(),
                        {METADATA_KEY: base.config.to_json()})
    pc.write_checkpoint(folder / "sigma_control.safetensors", net.state_dict(),
                        {METADATA_KEY: net.config.to_json()})
    case = Case.__new__(Case)
    case.host, case.base, case.net, case.options = host, base, net, {}
    case.model = host.add_model("diffusion_models", folder / "sigma_base.safetensors")
    case.control = host.add_model("controlnet", folder / "sigma_control.safetensors")
    case.tensors = {k.removeprefix("in."): v for k, v in tensors.items() if k[:3] == "in."}
    case.latent = torch.randn(case.tensors["x"].shape, generator=generator)
    case.file = host.write_tensors("sigma_control_inputs",
                                   {**case.tensors, "control_latent": case.latent})
    return case


def test_a_sigma_controlnet(sigma):
    """Sigma's latent scale, captions of 300 tokens; no released one exists, SimpleTuner trains
    them."""
    graph = ControlGraph(sigma)
    vae = graph.add("ProbeLatentVAE", file=sigma.file, scale=0.13025, label="sigma")
    eps = graph.apply(graph.steered(vae=vae))
    assert relative(eps, sigma.engine(pc.Control(sigma.net, sigma.latent))) < 1e-5
    assert relative(eps, sigma.engine()) > 1e-2


def test_small_projections_survive_eight_bits(sigma, tmp_path):
    """Trained projections are small; e4m3 would round most of them to zero."""
    net = pc.load_controlnet(dict(sigma.net.state_dict()), num_heads=2)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "_proj." in name and "copied_block" not in name:
                parameter.mul_(0.01)
    pc.write_checkpoint(tmp_path / "small.safetensors", net.state_dict(),
                        {METADATA_KEY: net.config.to_json()})
    name = sigma.host.add_model("controlnet", tmp_path / "small.safetensors")
    plain = sigma.engine()
    expected = sigma.engine(pc.Control(net, sigma.latent)) - plain
    graph = ControlGraph(sigma)
    vae = graph.add("ProbeLatentVAE", file=sigma.file, scale=0.13025, label="sigma")
    eight = graph.add("PixArtControlNetLoader", control_net_name=name,
                      weight_dtype="float8_e4m3fn")
    found = graph.apply(graph.steered(control_net=eight, vae=vae)) - plain
    assert relative(found, expected) < 0.1
