"""What our own nodes give: against the engine, against the stock nodes, against each other."""

import json
import time

import pytest
import torch
from graphs import LCM, MODEL, PROMPT, T5, Graph, StarterGraph
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pixart_core as pc
from pixart_core.checkpoint.convert import convert_state_dict
from pixart_core.starter import find_starter

STARTER = find_starter()
SCALE = 0.18215  # of SD 1.5 latents: what the network sees is the host's latent times this
NODE_IDS = ["PixArtLCMSampler", "PixArtLCMSchedule", "PixArtLoader", "PixArtNullCaption",
            "PixArtResolution", "PixArtT5Loader", "PixArtTextEncode"]
LONG = "a small golden lantern on the left, a wide river below it and one bright star. " * 12


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def save(graph, value, name):
    return graph.add("ProbeSaveTensors", value=value, name=name)


def saved(host, name, key="value.samples"):
    return host.read_tensors(name)[key]


def lcm_latents(host, name="lcm", model=LCM, loader=None, **settings):
    """Latents of the LCM node on the starter's student."""
    graph = StarterGraph(model=model, **(loader or {}))
    save(graph, graph.lcm(**settings), name)
    host.run(graph)
    return saved(host, name)


def choices(host, node, name):
    """What a combo input offers."""
    definition = host.object_info(node)["input"]["required"][name]
    return definition[1]["options"] if isinstance(definition[0], str) else definition[0]


# definitions


def pixart_nodes(host):
    return {k: v for k, v in host.object_info().items() if k.startswith("PixArt")}


def test_every_node_is_there_and_described(host):
    """Names that workflows are saved with never change; each node says what it does."""
    nodes = pixart_nodes(host)
    assert sorted(nodes) == NODE_IDS
    for name, node in nodes.items():
        assert node["category"].split("/")[0] == "PixArt", name
        assert len(node["category"].split("/")) == 2, name
        assert node["display_name"].startswith("PixArt "), name
        assert len(node["description"]) > 40, name
        assert node["output_node"] is False, name


def test_every_socket_has_a_tooltip(host):
    for name, node in pixart_nodes(host).items():
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        for key, definition in inputs.items():
            assert len(definition[1].get("tooltip", "")) > 10, f"{name}.{key}"
        assert len(node["output_name"]) == len(node["output_tooltips"]) == len(node["output"])
        assert all(node["output_name"]) and all(node["output_tooltips"]), name


def test_only_core_socket_types(host):
    """Every socket fits a stock node."""
    core = {"MODEL", "CLIP", "CONDITIONING", "LATENT", "SAMPLER", "SIGMAS", "INT"}
    outputs = {kind for node in pixart_nodes(host).values() for kind in node["output"]}
    assert outputs <= core


# PixArtResolution


@pytest.mark.parametrize("base", [256, 512, 1024, 2048, 2880])
def test_resolution_is_the_engines_bin(host, base):
    """All ratios of a base and two free sizes: width, height and latent agree."""
    free = "from width and height"
    shapes = [(name, *map(int, name.split()[0].split(":")))
              for name in choices(host, "PixArtResolution", "aspect_ratio") if name != free]
    assert len(shapes) == 8
    shapes += [(free, 1920, 1080), (free, 8, 16384)]
    graph = Graph()
    for i, (name, width, height) in enumerate(shapes):
        size = (width, height) if name == free else (64, 640)  # not looked at
        node = graph.add("PixArtResolution", base=str(base), aspect_ratio=name, width=size[0],
                         height=size[1], batch_size=2)
        for output in range(3):
            save(graph, node[output], f"size_{i}_{output}")
    result = host.run(graph)
    values = [result.json(i) for i, n in graph.prompt.items()
              if n["class_type"] == "ProbeSaveTensors"]
    for i, (_, width, height) in enumerate(shapes):
        expected = pc.nearest_bin(base, height=height, width=width)
        width_out, height_out, latent = values[3 * i: 3 * i + 3]
        assert (height_out["values"]["value"], width_out["values"]["value"]) == expected
        assert latent["tensors"]["value.samples"][0] == [2, 4, expected[0] // 8, expected[1] // 8]
        assert not saved(host, f"size_{i}_2").any()


# text


@pytest.fixture(scope="module")
def encoder():
    """The engine's T5 of the same file: transformers, float32."""
    return pc.text.T5TextEncoder.from_path(STARTER.t5_file, dtype=torch.float32)


def encode(host, text, name="text", clean=True, max_tokens=300, t5=T5, model=False, **loader):
    """(states (1, L, D), what the node shows, the run) of PixArtTextEncode."""
    graph = Graph()
    clip = graph.add("PixArtT5Loader", t5_name=t5, **loader)
    extra = {"model": graph.add("PixArtLoader", model_name=MODEL)} if model else {}
    node = graph.add("PixArtTextEncode", clip=clip, text=text, clean_caption=clean,
                     max_tokens=max_tokens, **extra)
    save(graph, node, name)
    result = host.run(graph)
    return saved(host, name, "value.0.0"), result.text(node), result


@pytest.mark.parametrize(("text", "max_tokens"), [
    (PROMPT, 300), ("", 300), (LONG, 300), (LONG, 120), (PROMPT, 8),
    (PROMPT, 1),
], ids=["short", "empty", "long_300", "long_120", "cut_at_8", "end_alone"])
def test_text_equals_transformers(host, encoder, text, max_tokens):
    """bar: 1e-5 relative in float32. Cut prompts keep the end token, as transformers does."""
    states, report, _ = encode(host, text, clean=False, max_tokens=max_tokens)
    expected, mask = encoder(text, max_tokens=max_tokens)
    expected = expected[:, : int(mask.sum())]
    assert states.shape == expected.shape
    error = relative(states, expected)
    assert error < 1e-5, f"relative error {error:.2e}"
    total = encoder.tokenize(text, max_tokens)[0].total
    assert report.startswith(f"{total} of {max_tokens} tokens" if total <= max_tokens
                             else f"{total} tokens, the limit is {max_tokens}; cut: ")


def test_text_equals_the_stock_node(host):
    """CLIPTextEncode on the same CLIP, bit for bit, where nothing is cleaned or cut."""
    graph = StarterGraph()
    ours = graph.add("PixArtTextEncode", clip=graph.clip, text=PROMPT, clean_caption=False,
                     max_tokens=300)
    stock = graph.add("CLIPTextEncode", clip=graph.clip, text=PROMPT)
    save(graph, ours, "ours")
    save(graph, stock, "stock")
    host.run(graph)
    assert torch.equal(saved(host, "ours", "value.0.0"), saved(host, "stock", "value.0.0"))


def test_token_report(host, encoder):
    """On the node, and as progress text while the workflow runs."""
    _, report, result = encode(host, "a red circle on blue", name="report")
    total = encoder.tokenize("a red circle on blue", 300)[0].total
    assert report == f"{total} of 300 tokens"
    node = result.node_id("PixArtTextEncode")
    assert (node, report) in result.progress_text


def test_the_limit_of_a_connected_model(host):
    """24 for the starter, whatever max_tokens says; a smaller max_tokens still counts."""
    states, report, _ = encode(host, LONG, model=True)
    assert states.shape[1] == 24 and "the limit is 24" in report
    states, report, _ = encode(host, LONG, model=True, max_tokens=10)
    assert states.shape[1] == 10 and "the limit is 10" in report


def test_cleaning_changes_the_text(host):
    """As the captions were in training: lower case, no links."""
    shouted = "A LARGE RED CIRCLE https://example.com on a blue background"
    cleaned, _, _ = encode(host, shouted)
    by_hand, _, _ = encode(host, pc.text.clean_caption(shouted), clean=False)
    raw, _, _ = encode(host, shouted, clean=False)
    assert torch.equal(cleaned, by_hand)
    assert raw.shape != cleaned.shape or not torch.equal(raw, cleaned)


def test_prompt_weights_count_without_cleaning(host):
    """The host's (word:1.2) changes that word's states."""
    plain, _, _ = encode(host, "a red circle", clean=False)
    weighted, _, _ = encode(host, "a (red:1.5) circle", clean=False)
    assert weighted.shape == plain.shape and 1e-3 < relative(weighted, plain) < 1.0


def test_size_conditioning_goes_along(host):
    graph = StarterGraph()
    node = graph.encode(PROMPT, width=1024, height=512, aspect_ratio=0.5)
    probe = save(graph, node, "sized")
    values = host.run(graph).json(probe)["values"]
    assert (values["value.0.1.width"], values["value.0.1.height"]) == (1024, 512)
    assert values["value.0.1.aspect_ratio"] == 0.5


def test_t5_folder_and_device(host):
    """A Hugging Face folder is in the list and gives what the single file gives; so does cpu."""
    assert {"t5/", T5} <= set(choices(host, "PixArtT5Loader", "t5_name"))
    expected, _, _ = encode(host, PROMPT)
    assert torch.equal(encode(host, PROMPT, t5="t5/")[0], expected)
    assert torch.equal(encode(host, PROMPT, device="cpu")[0], expected)


# PixArtNullCaption


def null_caption(host, model, positive=None, name="null"):
    graph = StarterGraph(model=model)
    extra = {"positive": graph.encode(positive)} if positive is not None else {}
    save(graph, graph.add("PixArtNullCaption", model=graph.model, **extra), name)
    host.run(graph)
    return saved(host, name, "value.0.0")


def test_null_caption_is_that_of_the_file(host):
    """All of its rows, or as many as the prompt has tokens."""
    rows = load_file(STARTER.transformer)["y_embedder.y_embedding"].float()
    assert torch.equal(null_caption(host, MODEL)[0], rows)
    length = encode(host, "a red circle")[0].shape[1]
    assert length < len(rows)
    assert torch.equal(null_caption(host, MODEL, "a red circle")[0], rows[:length])


def test_null_caption_as_negative(host):
    """The starter learned its T5's empty prompt as null caption: both guide to one picture."""
    graph = StarterGraph()
    null = graph.add("PixArtNullCaption", model=graph.model, positive=graph.positive)
    save(graph, graph.ksampler(steps=3, negative=null), "null_negative")
    save(graph, graph.ksampler(steps=3), "empty_negative")
    save(graph, graph.ksampler(steps=3, negative=graph.positive), "no_guidance")
    host.run(graph)
    latent, expected = saved(host, "null_negative"), saved(host, "empty_negative")
    assert relative(latent, expected) < 1e-3
    assert relative(saved(host, "no_guidance"), expected) > 0.05


def test_null_caption_that_is_not_in_the_file(host):
    """diffusers files drop it: the error says so and what to do instead."""
    weights, metadata = starter_file()
    path = host.models_dir / "diffusion_models" / "no_null.safetensors"
    save_file(parted(convert_state_dict(weights, "diffusers")), path, metadata=metadata)
    graph = StarterGraph(model=path.name)
    save(graph, graph.add("PixArtNullCaption", model=graph.model), "no_null")
    error = host.run(graph, ok=False).error
    assert error.node_type == "PixArtNullCaption"
    assert "no null caption" in error.message and "empty prompt" in error.message


def test_null_caption_of_another_model(host):
    """A one-block SD3, built by the host from its first tensors."""
    shapes = {"joint_blocks.0.context_block.attn.qkv.weight": (192, 64),
              "x_embedder.proj.weight": (64, 16, 2, 2), "pos_embed": (1, 16, 64),
              "context_embedder.weight": (64, 4096), "final_layer.linear.weight": (64, 64),
              "y_embedder.mlp.0.weight": (64, 2048)}
    path = host.models_dir / "diffusion_models" / "sd3.safetensors"
    save_file({f"model.diffusion_model.{k}": torch.zeros(s) for k, s in shapes.items()}, path)
    graph = Graph()
    model = graph.add("UNETLoader", unet_name=path.name, weight_dtype="default")
    save(graph, graph.add("PixArtNullCaption", model=model), "sd3")
    error = host.run(graph, ok=False).error
    assert error.node_type == "PixArtNullCaption", str(error)
    assert "SD3" in error.message and "PixArt Model Loader" in error.message


# PixArtLCMSampler


@pytest.mark.parametrize("settings", [
    {}, {"steps": 6, "grid": "official", "seed": 11}, {"steps": 2, "strength": 0.5},
], ids=["default", "official", "strength"])
def test_lcm_equals_the_custom_samplers(host, settings):
    """PixArtLCMSchedule in SamplerCustom and SamplerCustomAdvanced at cfg 1, bit for bit."""
    settings = {"steps": 4, "strength": 1.0, "grid": "diffusers", "seed": 3, **settings}
    graph = StarterGraph(model=LCM)
    save(graph, graph.lcm(**settings), "node")
    seed = settings.pop("seed")
    schedule = graph.add("PixArtLCMSchedule", **settings)
    custom = graph.add("SamplerCustom", model=graph.model, add_noise=True, noise_seed=seed, cfg=1.0,
                       positive=graph.positive, negative=graph.negative, sampler=schedule[0],
                       sigmas=schedule[1], latent_image=graph.latent)
    guider = graph.add("BasicGuider", model=graph.model, conditioning=graph.positive)
    noise = graph.add("RandomNoise", noise_seed=seed)
    advanced = graph.add("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=schedule[0],
                         sigmas=schedule[1], latent_image=graph.latent)
    save(graph, custom, "custom")
    save(graph, advanced, "advanced")
    host.run(graph)
    expected = saved(host, "node")
    assert torch.equal(saved(host, "custom"), expected)
    assert torch.equal(saved(host, "advanced"), expected)


@pytest.fixture(scope="module")
def student(encoder):
    """The engine on the starter's student: latents (B, 4, 8, 8) of a seed and timesteps."""
    model = pc.load_transformer(STARTER.lcm, dtype=torch.float32)
    states, mask = encoder(PROMPT, max_tokens=24)
    caption = states[:, : int(mask.sum())]

    @torch.inference_mode()
    def sample(timesteps, seed):
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))

        def predict(x, t):
            return model(x, torch.tensor([t]), caption)[:, :4]

        return pc.sampling.sample_lcm(predict, noise, timesteps,
                                      pc.sampling.step_noise(noise.shape, seed))

    return sample


@pytest.mark.parametrize("grid", ["diffusers", "official"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
def test_lcm_equals_the_engine(host, student, grid, steps):
    """bar: 1e-4 relative, over the whole run with its own noise."""
    latent = lcm_latents(host, steps=steps, grid=grid, seed=9)
    expected = student(pc.sampling.lcm_timesteps(steps, grid), 9)
    error = relative(latent * SCALE, expected)
    assert error < 1e-4, f"relative error {error:.2e}"


@pytest.mark.parametrize("steps", [3, 4, 6, 8])
def test_grids_differ(host, steps):
    """Both published lists of timesteps give a picture, not the same one."""
    official = lcm_latents(host, steps=steps, grid="official")
    diffusers = lcm_latents(host, steps=steps, grid="diffusers")
    assert official.isfinite().all() and diffusers.isfinite().all()
    assert relative(official, diffusers) > 1e-3


def test_progress_and_previews(host):
    graph = StarterGraph(model=LCM)
    node = graph.lcm(steps=4, seed=21)
    graph.picture(node)
    result = host.run(graph)
    counts = [(value, total) for where, value, total in result.progress if where == node.id]
    assert counts[-1] == (4, 4)
    assert {total for _, total in counts} == {4}
    previews = [p for p in result.previews if p.node in ("", node.id)]
    assert previews and all(min(p.image.size) >= 8 for p in previews)


def test_interrupting(host):
    """The run ends with the step that it is in, and the next prompt works."""
    graph = StarterGraph(model=LCM, width=512, height=512, batch=4)
    node = graph.lcm(steps=50)
    graph.picture(node)
    job = host.submit(graph)
    seen = job.wait_for(lambda result: any(n == node.id for n, *_ in result.progress))
    host.interrupt()
    at = max(value for where, value, _ in seen.progress if where == node.id)
    result = job.wait()
    assert result.status == "interrupted" and result.error.node == node.id
    assert max(value for where, value, _ in result.progress if where == node.id) <= at + 2 < 50
    assert lcm_latents(host, "after_interrupt").isfinite().all()


def test_seed_and_batch(host):
    """A seed gives one picture, another seed another; a batch holds different pictures."""
    graph = StarterGraph(model=LCM)
    save(graph, graph.lcm(seed=1), "first")
    save(graph, graph.lcm(seed=2), "second")
    repeated = graph.add("RepeatLatentBatch", samples=graph.latent, amount=2)
    save(graph, graph.lcm(seed=1, latent=repeated), "batch")
    host.run(graph)
    first, second, batch = saved(host, "first"), saved(host, "second"), saved(host, "batch")
    assert relative(first, second) > 0.1
    assert batch.shape == (2, 4, 8, 8) and relative(batch[0], batch[1]) > 0.1
    assert torch.equal(lcm_latents(host, "again", seed=1), first)


def test_the_largest_seed(host):
    assert lcm_latents(host, "largest", seed=2**64 - 1).isfinite().all()


def encoded_picture(graph):
    """A LATENT with a picture in it: the stock teacher's, decoded and encoded again."""
    image = graph.add("VAEDecode", samples=graph.lcm(seed=5), vae=graph.vae)
    return graph.add("VAEEncode", pixels=image, vae=graph.vae)


def test_strength_keeps_the_picture(host):
    """The less strength, the nearer the encoded picture."""
    graph = StarterGraph(model=LCM)
    start = encoded_picture(graph)
    other = graph.encode("a small green square on a yellow background")
    save(graph, start, "start")
    for strength in (0.1, 0.5, 1.0):
        save(graph, graph.lcm(latent=start, positive=other, seed=6, strength=strength),
             f"strength_{strength}")
    host.run(graph)
    start = saved(host, "start")
    near, middle, far = (relative(saved(host, f"strength_{s}"), start) for s in (0.1, 0.5, 1.0))
    assert near < middle < far


def test_latent_mask(host):
    """Outside the mask the latent stays bit for bit, inside it changes."""
    graph = StarterGraph(model=LCM)
    start = encoded_picture(graph)
    mask = graph.add("SolidMask", value=0.0, width=64, height=64)
    hole = graph.add("SolidMask", value=1.0, width=32, height=64)
    mask = graph.add("MaskComposite", destination=mask, source=hole, x=0, y=0, operation="add")
    masked = graph.add("SetLatentNoiseMask", samples=start, mask=mask)
    save(graph, start, "before")
    save(graph, graph.lcm(latent=masked, seed=8,
                          positive=graph.encode("a small green square")), "after")
    host.run(graph)
    before, after = saved(host, "before"), saved(host, "after")
    assert relative(after[..., 4:], before[..., 4:]) < 1e-6
    assert relative(after[..., :4], before[..., :4]) > 0.1


def test_the_latent_that_came_in_is_not_changed(host):
    """It is used again by every other node that it is wired to."""
    graph = StarterGraph(model=LCM)
    start = encoded_picture(graph)
    save(graph, start, "once")
    host.run(graph)
    after = graph.lcm(latent=start, strength=0.5)
    save(graph, after, "sampled")
    host.run(graph)
    again = save(graph, start, "twice")
    graph.add("ProbeMemory", after=after)
    assert host.run(graph).ran(again)
    assert torch.equal(saved(host, "once"), saved(host, "twice"))


# PixArtLoader


def starter_file():
    """(weights, metadata) of the starter's student."""
    with safe_open(STARTER.lcm, "pt") as file:
        return load_file(STARTER.lcm), file.metadata()


def parted(tensors):
    """Tensors that share no memory, as safetensors wants them."""
    return {k: v.contiguous().clone() for k, v in tensors.items()}


CONFIG = {"_class_name": "PixArtTransformer2DModel", "num_attention_heads": 6,
          "attention_head_dim": 32, "sample_size": 8, "patch_size": 2, "interpolation_scale": 1.0,
          "_name_or_path": "PixArt-alpha"}


def write_layout(host, layout):
    """The student's weights in another container; (name, loader inputs)."""
    weights, metadata = starter_file()
    models = host.models_dir / "diffusion_models"
    if layout in ("pth", "pth_ema", "diffusers_folder"):
        folder = models / f"layout_{layout}"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        if layout == "diffusers_folder":
            save_file(parted(convert_state_dict(weights, "diffusers")),
                      folder / "diffusion_pytorch_model.safetensors")
            return "layout_diffusers_folder/", {}
        entry = "state_dict" if layout == "pth" else "state_dict_ema"
        torch.save({entry: weights, "epoch": 3}, folder / "student.pth")
        return f"layout_{layout}/student.pth", {}
    if layout == "prefixed":
        weights = {f"model.diffusion_model.{k}": v for k, v in weights.items()}
    if layout.startswith("diffusers"):
        weights = convert_state_dict(weights, "diffusers")
    path = models / f"layout_{layout}.safetensors"
    loader = {}
    if layout == "diffusers_variant":
        config = json.loads(metadata["pixart_config"])
        del config["variant"]
        metadata, loader = {"pixart_config": json.dumps(config)}, {"variant": "alpha"}
    save_file(parted(weights), path, metadata=metadata)
    return path.name, loader


@pytest.mark.parametrize("layout", ["pth", "pth_ema", "prefixed", "diffusers", "diffusers_variant",
                                    "diffusers_folder"])
def test_every_container_gives_the_same_latents(host, layout):
    """Bit for bit those of the native safetensors file. diffusers' need the head count from a
    config.json beside them or from the header."""
    expected = lcm_latents(host, "native")
    name, loader = write_layout(host, layout)
    assert name in choices(host, "PixArtLoader", "model_name")
    assert torch.equal(lcm_latents(host, "layout", model=name, loader=loader), expected)


def test_a_folder_stands_for_its_files_alone(host):
    """What is one model is listed once; what else lies there is still listed."""
    weights, metadata = starter_file()
    models = host.models_dir / "diffusion_models"
    for folder, names in (("one_model", ["diffusion_pytorch_model.safetensors", "other.pth"]),
                          ("two_models", ["first.safetensors", "second.safetensors"])):
        (models / folder).mkdir(exist_ok=True)
        (models / folder / "config.json").write_text(json.dumps(CONFIG))
        for name in names:
            save_file(parted(weights), models / folder / name, metadata=metadata)
    listed = [name for name in choices(host, "PixArtLoader", "model_name")
              if name.startswith(("one_model", "two_models"))]
    assert sorted(listed) == ["one_model/", "one_model/other.pth", "two_models/first.safetensors",
                              "two_models/second.safetensors"]


@pytest.mark.parametrize(("dtype", "bar"), [("float32", 1e-6), ("float16", 1e-3),
                                            ("bfloat16", 3e-3), ("float8_e4m3fn", 5e-2),
                                            ("float8_e5m2", 0.1)])
def test_weight_dtypes(host, student_states, dtype, bar):
    """Each choice is used, and its epsilon stays near float32's; the file itself is float16."""
    def epsilon(dtype):
        graph = Graph()
        model = graph.add("PixArtLoader", model_name=LCM, weight_dtype=dtype)
        file = host.write_tensors("dtypes", student_states)
        graph.add("ProbeApplyModel", model=model, file=file, name=dtype)
        info = graph.add("ProbeModelInfo", model=model)
        used = host.run(graph).json(info)["inference_dtype"]
        return saved(host, dtype, "eps"), used

    (expected, _), (eps, used) = epsilon("float32"), epsilon(dtype)
    assert used == f"torch.{dtype}"
    error = relative(eps, expected)
    assert error < bar, f"relative error {error:.2e}"


@pytest.fixture(scope="module")
def student_states(encoder):
    """Inputs in the middle of a run."""
    states, mask = encoder(PROMPT, max_tokens=24)
    return {"x": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
            "timestep": torch.tensor([499.0]), "caption": states[:, : int(mask.sum())]}


@pytest.mark.parametrize(("variant", "latents"), [("auto", "SD15"), ("alpha", "SD15"),
                                                  ("sigma", "SDXL")])
def test_variant_override(host, variant, latents):
    """What the user says counts more than the file."""
    graph = Graph()
    model = graph.add("PixArtLoader", model_name=MODEL, variant=variant)
    graph.add("ProbeModelInfo", model=model)
    assert host.run(graph).json("ProbeModelInfo")["latent_format"] == latents


# memory


def loaded(host, seed=None):
    """What the host holds loaded: after sampling with a new `seed`, or as it is."""
    graph = Graph()
    after = {}
    if seed is not None:
        graph = StarterGraph(model=LCM)
        after["after"] = graph.lcm(seed=seed)
    graph.add("ProbeMemory", **after)
    return host.run(graph).json("ProbeMemory")


def test_free_releases_everything(host):
    assert loaded(host, seed=200)["count"] > 0
    host.free()
    patience = time.monotonic() + 30
    while loaded(host)["count"] and time.monotonic() < patience:
        time.sleep(0.2)
    assert loaded(host)["count"] == 0
    assert loaded(host, seed=201)["count"] > 0


def test_repeated_runs_do_not_pile_up(host):
    """Five runs, each of which really samples, hold what one holds."""
    loaded(host, seed=100)  # whatever was there before is cached and dropped by now
    once = loaded(host, seed=101)
    again = [loaded(host, seed=seed) for seed in range(102, 107)]
    assert [(run["count"], run["bytes"]) for run in again] == [(once["count"], once["bytes"])] * 5
