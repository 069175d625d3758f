"""Our MODEL and CLIP among the host's own nodes: every graph runs and is right."""

import pytest
import torch
from graphs import LCM, MODEL, PROMPT, TRAINED, StarterGraph
from safetensors.torch import load_file, save_file
from test_golden import GOLDEN, add_model

LATER_BLOCKS = tuple(f"weights.blocks.{i}." for i in (1, 2, 3))


def samples(host, graph, node, name):
    graph.tensors(node, name)
    host.run(graph)
    return host.read_tensors(name)["value.samples"]


def reference(host, **changes):
    graph = StarterGraph()
    return samples(host, graph, graph.ksampler(steps=6, **changes), "reference")


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_one_batch_for_guidance(host):
    """Prompt and empty negative, of unequal length, make one call of the network a step."""
    graph = StarterGraph()
    patched = graph.add("ProbePatches", model=graph.model, label="batch")
    after = graph.ksampler(model=patched, steps=3)
    report = graph.add("ProbeReport", after=after, label="batch")
    record = host.run(graph).json(report)
    assert record["wrapper"] == 3
    assert all(sorted(call["cond_or_uncond"]) == [0, 1] for call in record["calls"])
    assert record["attention_masks"] == 3 * 6  # cross-attention of every block


def test_no_mask_when_nothing_is_padded(host):
    graph = StarterGraph(negative=PROMPT)
    patched = graph.add("ProbePatches", model=graph.model, label="unpadded")
    after = graph.ksampler(model=patched, steps=1)
    report = graph.add("ProbeReport", after=after, label="unpadded")
    assert host.run(graph).json(report)["attention_masks"] == 0


def test_one_batch_equals_two_calls(host, tmp_path):
    """Guidance of a padded batch is the formula on the two captions run alone, unpadded."""
    name = add_model(host, "sigma_512", tmp_path)
    inputs = {"x": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([500.0])}
    captions = {"caption": torch.randn(1, 9, 32), "uncond": torch.randn(1, 1, 32)}

    def epsilon(label, cfg, **tensors):
        graph = StarterGraph(model=name)
        graph.add("ProbeApplyModel", model=graph.model, name=label, cfg=cfg,
                  file=host.write_tensors(label, {**inputs, **tensors}))
        host.run(graph)
        return host.read_tensors(label)["eps"]

    guided = epsilon("guided", 4.5, **captions)
    cond = epsilon("cond", 1.0, caption=captions["caption"])
    uncond = epsilon("uncond", 1.0, caption=captions["uncond"])
    assert relative(guided, uncond + 4.5 * (cond - uncond)) < 1e-5


def test_patches_and_overrides_reach_every_block(host):
    """What caches, guidance and attention nodes need; recorders that change nothing."""
    plain = reference(host)
    graph = StarterGraph()
    patched = graph.add("ProbePatches", model=graph.model, label="all")
    latent = graph.ksampler(model=patched, steps=6)
    graph.add("ProbeReport", after=latent, label="all")
    graph.tensors(latent, "patched")
    record = host.run(graph).json("ProbeReport")
    assert relative(host.read_tensors("patched")["value.samples"], plain) < 1e-6
    assert sorted(map(int, record["blocks"])) == list(range(6))
    for index, seen in record["blocks"].items():
        assert seen["block_index"] == int(index)
        assert (seen["block_type"], seen["total_blocks"]) == ("double", 6)
        assert {"img", "txt", "vec"} <= set(seen["args"])
    assert record["attention"] == 6 * 6 * 2
    assert record["patches"]["post_input"]["calls"] == 6
    assert record["patches"]["double_block"]["calls"] == 36


@pytest.mark.parametrize("knob", ["block_scale", "attention_scale"])
def test_a_patch_that_changes_something_does(host, knob):
    plain = reference(host)
    graph = StarterGraph()
    patched = graph.add("ProbePatches", model=graph.model, label=knob, **{knob: 0.5})
    changed = samples(host, graph, graph.ksampler(model=patched, steps=6), knob)
    assert relative(changed, plain) > 0.05


def test_easy_cache_skips_steps(host):
    """The host's EasyCache works on the DIFFUSION_MODEL wrapper."""
    graph = StarterGraph()
    counted = graph.add("ProbePatches", model=graph.model, label="cached")
    cached = graph.add("EasyCache", model=counted, reuse_threshold=0.8, start_percent=0.1,
                       end_percent=0.95, verbose=False)
    latent = graph.ksampler(model=cached, steps=20)
    report = graph.add("ProbeReport", after=latent, label="cached")
    result = host.run(graph)
    attention = result.json(report)["attention"]
    assert 0 < attention < 20 * 6 * 2


def test_merge_at_the_ends_is_bit_exact(host):
    """ModelMergeSimple at ratio 1 and 0 gives either model."""
    def merged(ratio):
        graph = StarterGraph()
        other = graph.add("PixArtLoader", model_name=LCM)
        model = graph.add("ModelMergeSimple", model1=graph.model, model2=other, ratio=ratio)
        return samples(host, graph, graph.ksampler(model=model, steps=4), f"merge{ratio}")

    def single(name):
        graph = StarterGraph(model=name)
        return samples(host, graph, graph.ksampler(steps=4), "single")

    assert torch.equal(merged(1.0), single(MODEL))
    assert torch.equal(merged(0.0), single(LCM))
    middle = merged(0.5)
    assert middle.isfinite().all() and relative(middle, single(MODEL)) > 0.01


def test_torch_compile(host, tmp_path):
    """TorchCompileModel: the same latents to rounding (a model of one block: it is slow)."""
    weights = {k.removeprefix("weights."): v
               for k, v in load_file(GOLDEN / "sigma_512.safetensors").items()
               if k.startswith("weights.") and not k.startswith(LATER_BLOCKS)}
    save_file(weights, tmp_path / "one_block.safetensors",
              metadata={"pixart_config": '{"num_heads": 2}'})
    name = host.add_model("diffusion_models", tmp_path / "one_block.safetensors")
    caption = host.write_tensors("compile", {"embeds": torch.randn(1, 4, 32)})

    def run(compiled):
        graph = StarterGraph(model=name)
        model = graph.model
        if compiled:
            model = graph.add("TorchCompileModel", model=model, backend="inductor")
        positive = graph.add("ProbeLoadConditioning", file=caption)
        latent = graph.ksampler(model=model, steps=2, cfg=1.0, positive=positive,
                                negative=positive)
        return samples(host, graph, latent, "compile")

    assert relative(run(True), run(False)) < 1e-4


def test_latent_mask_keeps_what_it_covers(host):
    """SetLatentNoiseMask: outside the mask the latent stays, inside it changes."""
    graph = StarterGraph()
    first = graph.ksampler(steps=6)
    mask = graph.add("SolidMask", value=0.0, width=64, height=64)
    hole = graph.add("SolidMask", value=1.0, width=32, height=64)
    mask = graph.add("MaskComposite", destination=mask, source=hole, x=0, y=0, operation="add")
    masked = graph.add("SetLatentNoiseMask", samples=first, mask=mask)
    graph.tensors(first, "before")
    after = graph.ksampler(steps=6, latent_image=masked, seed=5,
                           positive=graph.encode("a large green square on a yellow background"))
    after = samples(host, graph, after, "after")
    before = host.read_tensors("before")["value.samples"]
    assert torch.equal(after[..., 4:], before[..., 4:])
    assert relative(after[..., :4], before[..., :4]) > 0.1


def test_area_conditioning(host):
    """ConditioningSetArea crops what a prompt sees: a step changes that half and no other."""
    graph = StarterGraph(**TRAINED)
    other = graph.encode("a small green square on a yellow background")
    area = graph.add("ConditioningSetArea", conditioning=other, width=128, height=64, x=0, y=64,
                     strength=4.0)
    both = graph.add("ConditioningCombine", conditioning_1=graph.positive, conditioning_2=area)
    graph.tensors(graph.ksampler(steps=1), "plain")
    latent = samples(host, graph, graph.ksampler(steps=1, positive=both), "area")
    change = (latent - host.read_tensors("plain")["value.samples"]).abs().mean(dim=(0, 1, 3))
    assert change[:8].max() < 1e-4 and change[8:].min() > 0.01


def test_mask_conditioning(host):
    graph = StarterGraph()
    other = graph.encode("a small green square on a yellow background")
    mask = graph.add("SolidMask", value=1.0, width=64, height=64)
    masked = graph.add("ConditioningSetMask", conditioning=other, mask=mask, strength=1.0,
                       set_cond_area="default")
    both = graph.add("ConditioningCombine", conditioning_1=graph.positive, conditioning_2=masked)
    latent = samples(host, graph, graph.ksampler(steps=6, positive=both), "mask")
    assert latent.isfinite().all() and relative(latent, reference(host)) > 0.05


def test_timestep_conditioning(host):
    """The same prompt split over two ranges of steps is the prompt."""
    graph = StarterGraph()
    first = graph.add("ConditioningSetTimestepRange", conditioning=graph.positive, start=0.0,
                      end=0.5)
    second = graph.add("ConditioningSetTimestepRange", conditioning=graph.positive, start=0.5,
                       end=1.0)
    both = graph.add("ConditioningCombine", conditioning_1=first, conditioning_2=second)
    latent = samples(host, graph, graph.ksampler(steps=6, positive=both), "ranges")
    assert relative(latent, reference(host)) < 1e-5


def test_tiled_decode(host):
    graph = StarterGraph(**TRAINED)
    latent = graph.ksampler(steps=2)
    tiled = graph.add("VAEDecodeTiled", samples=latent, vae=graph.vae, tile_size=64, overlap=16,
                      temporal_size=64, temporal_overlap=8)
    save = graph.add("SaveImage", images=tiled, filename_prefix="tiled")
    result = host.run(graph)
    assert host.picture(result.images(save)[0]).size == (128, 128)


@pytest.mark.parametrize(("width", "height"), [(56, 72), (64, 200), (16, 16), (248, 120)])
def test_any_multiple_of_eight(host, width, height):
    graph = StarterGraph(width=width, height=height, batch=2)
    save = graph.picture(graph.ksampler(steps=1))
    result = host.run(graph)
    assert [host.picture(i).size for i in result.images(save)] == [(width, height)] * 2


def test_a_batch_is_the_noise_of_one_seed(host):
    """Each picture of a batch is what its noise gives alone."""
    graph = StarterGraph(batch=3)
    batch = graph.ksampler(steps=4)
    one = graph.add("LatentFromBatch", samples=graph.latent, batch_index=1, length=1)
    single = graph.ksampler(steps=4, latent_image=one)
    graph.tensors(batch, "batch")
    graph.tensors(single, "single_of_batch")
    host.run(graph)
    batch = host.read_tensors("batch")["value.samples"]
    single = host.read_tensors("single_of_batch")["value.samples"]
    assert relative(single[0], batch[1]) < 1e-4


def test_stock_size_conditioning_reaches_micro_conditioned_models(host, tmp_path):
    """CLIPTextEncodePixArtAlpha sets width and height; they change an alpha-1024 model."""
    name = add_model(host, "alpha_1024_landscape", tmp_path)
    caption = host.write_tensors("micro", {"embeds": torch.randn(1, 4, 32)})

    def run(options):
        graph = StarterGraph(model=name)
        positive = graph.add("ProbeLoadConditioning", file=caption, options=options)
        latent = graph.ksampler(steps=1, cfg=1.0, positive=positive, negative=positive)
        return samples(host, graph, latent, "micro")

    plain = run("{}")
    assert torch.equal(run('{"width": 64, "height": 64}'), plain)
    assert not torch.equal(run('{"width": 1024, "height": 512}'), plain)
    assert not torch.equal(run('{"aspect_ratio": 2.0}'), plain)
