"""PixArt LoRA Loader against peft, the engine and the host's own LoRA nodes."""

import pytest
import torch
from checks import choices, refused, relative, save, saved, starter_file, write
from graphs import LCM, StarterGraph
from lora_checks import (
    CONFIG,
    apply,
    epsilon,
    install,
    install_converted,
    ours,
    random_lora,
    start,
    stock,
)

import pixart_core as pc
from pixart_core.checkpoint.lora_apply import apply_lora
from pixart_core.starter import find_starter

KINDS = ["alpha", "patterns", "rslora", "dora", "biases", "whole", "loha", "loha_kernel", "lokr",
         "lokr_full", "lokr_both"]


@pytest.mark.parametrize("kind", KINDS)
def test_node_equals_peft(host, peft_adapter, kind):
    """A PEFT folder on our MODEL, and the converted file by the host's own loader and by ours.

    bar: 1e-5 relative; the adapter itself moves epsilon by percents.
    """
    adapter = peft_adapter(kind)
    base, folder = install(host, adapter, kind)
    converted = install_converted(host, adapter, kind)
    graph, model = start(base)
    apply(host, graph, ours(graph, model, folder), adapter, "folder")
    apply(host, graph, ours(graph, model, converted), adapter, "converted")
    apply(host, graph, stock(graph, model, converted), adapter, "stock")
    host.run(graph)
    expected = adapter.out[:, :4]
    assert relative(expected, adapter.plain[:, :4]) > 0.02
    assert relative(epsilon(host, "folder"), expected) < 1e-5
    assert relative(epsilon(host, "converted"), expected) < 1e-5
    assert relative(epsilon(host, "stock"), expected) < 1e-5


@pytest.mark.parametrize("kind", ["alpha", "rslora", "dora"])
def test_what_the_host_makes_of_the_raw_file(host, peft_adapter, kind):
    """Why our node and `convert --lora` are there; fails once the host reads PEFT's alpha."""
    adapter = peft_adapter(kind)
    base, folder = install(host, adapter, kind)
    weights = (host.models_dir / "loras" / folder / "adapter_model.safetensors").read_bytes()
    (host.models_dir / "loras" / f"raw_{kind}.safetensors").write_bytes(weights)
    graph, model = start(base)
    apply(host, graph, stock(graph, model, f"raw_{kind}.safetensors"), adapter, "raw")
    host.run(graph)
    assert relative(epsilon(host, "raw"), adapter.out[:, :4]) > 0.05


def test_stacking_and_unloading(host, peft_adapter):
    """Halves add up to the whole, in either node; the model that came in stays as it is."""
    adapter = peft_adapter("alpha")
    base, folder = install(host, adapter, "alpha")
    converted = install_converted(host, adapter, "alpha")
    graph, model = start(base)
    twice = ours(graph, ours(graph, model, folder, 0.5), folder, 0.5)
    mixed = stock(graph, ours(graph, model, folder, 0.25), converted, 0.75)
    gone = ours(graph, ours(graph, model, folder), folder, -1.0)
    for name, chosen in (("twice", twice), ("mixed", mixed), ("gone", gone), ("plain", model)):
        apply(host, graph, chosen, adapter, name)
    host.run(graph)
    for name in ("twice", "mixed"):
        assert relative(epsilon(host, name), adapter.out[:, :4]) < 1e-5
    for name in ("gone", "plain"):
        assert relative(epsilon(host, name), adapter.plain[:, :4]) < 1e-5


def test_alpha_input(host, peft_adapter):
    """Rank 4: alpha 7 in the config, 14 is twice as strong."""
    adapter = peft_adapter("alpha")
    base, folder = install(host, adapter, "alpha")
    graph, model = start(base)
    apply(host, graph, ours(graph, model, folder, alpha=14.0), adapter, "alpha")
    apply(host, graph, ours(graph, model, folder, 2.0), adapter, "strength")
    host.run(graph)
    assert relative(epsilon(host, "alpha"), epsilon(host, "strength")) < 1e-6


@pytest.mark.parametrize("kind", ["alpha", "dora"])
def test_hooks_schedule_a_converted_file(host, peft_adapter, kind):
    """Create Hook LoRA on conditioning gives what the patched MODEL gives."""
    adapter = peft_adapter(kind)
    base, _ = install(host, adapter, kind)
    graph, model = start(base)
    hooks = graph.add("CreateHookLoraModelOnly", strength_model=1.0,
                      lora_name=install_converted(host, adapter, kind))
    caption = {"caption": adapter.inputs["caption"]}
    cond = graph.add("ProbeLoadConditioning", file=host.write_tensors("lora_caption", caption))
    hooked = graph.add("ConditioningSetProperties", cond_NEW=cond, strength=1.0,
                       set_cond_area="default", hooks=hooks)
    apply(host, graph, model, adapter, "hooked", positive=hooked, negative=hooked)
    host.run(graph)
    assert relative(epsilon(host, "hooked"), adapter.out[:, :4]) < 1e-5


def differences(weights):
    """Changes to what has no low-rank form: scale-shift tables and biases, fused ones, too."""
    generator = torch.Generator().manual_seed(2)
    names = {"blocks.0.scale_shift_table": "diff", "blocks.1.scale_shift_table": "diff",
             "final_layer.scale_shift_table": "diff", "blocks.0.attn.qkv.bias": "diff_b",
             "x_embedder.proj.bias": "diff_b", "t_block.1.bias": "diff_b"}
    return {f"diffusion_model.{name.removesuffix('.bias')}.{leaf}":
            torch.randn(weights[name].shape, generator=generator) * 0.3
            for name, leaf in names.items()}


def test_tables_and_biases(host, peft_adapter):
    """Our node, the host's node and the host's hooks against weights merged by the engine."""
    adapter = peft_adapter("alpha")
    base, _ = install(host, adapter, "alpha")
    changes = differences(adapter.weights)
    name = write(host, "loras", "tables.safetensors", changes)
    path = host.models_dir / "loras" / name
    merged = write(host, "diffusion_models", "merged_tables.safetensors",
                   apply_lora(adapter.weights, path), CONFIG)
    graph, model = start(base)
    expected = graph.add("PixArtLoader", model_name=merged, weight_dtype="float32")
    for label, chosen in (("merged", expected), ("ours", ours(graph, model, name)),
                          ("stock", stock(graph, model, name)), ("plain", model)):
        apply(host, graph, chosen, adapter, label)
    host.run(graph)
    expected = epsilon(host, "merged")
    assert relative(epsilon(host, "plain"), expected) > 0.05
    assert relative(epsilon(host, "ours"), expected) < 1e-5
    assert relative(epsilon(host, "stock"), expected) < 1e-5


def test_lcm_lora_with_the_lcm_sampler(host):
    """The teacher and a random LCM-LoRA through PixArt LCM Sampler: as with merged weights."""
    student, metadata = starter_file()
    weights = {name: tensor.float() for name, tensor in student.items()}
    names = [f"blocks.{i}.{part}" for i in range(6) for part in ("attn.qkv", "mlp.fc1")]
    lora = write(host, "loras", "lcm_lora.safetensors", random_lora(weights, names, scale=0.05))
    merged = write(host, "diffusion_models", "lcm_merged.safetensors",
                   apply_lora(weights, host.models_dir / "loras" / lora), metadata)
    graph = StarterGraph(model=LCM, weight_dtype="float32")
    save(graph, graph.lcm(), "lcm_plain")
    save(graph, graph.lcm(model=ours(graph, graph.model, lora)), "lcm_lora")
    other = StarterGraph(model=merged, weight_dtype="float32")
    save(other, other.lcm(), "lcm_merged")
    host.run(graph)
    host.run(other)
    expected = saved(host, "lcm_merged")
    assert relative(saved(host, "lcm_plain"), expected) > 0.02
    assert relative(saved(host, "lcm_lora"), expected) < 1e-4


def test_a_lora_on_the_hosts_own_pixart(host):
    """One real-width block, which is all that the stock loader builds: native names are the
    same, so our node patches it as the stock node does."""
    from pixart_core.config import PixArtConfig
    from pixart_core.model.transformer import PixArtTransformer

    network = PixArtTransformer(PixArtConfig(depth=1, variant="sigma"), device="meta")
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(tensor.shape, generator=generator) * 0.02
               for name, tensor in network.state_dict().items()}
    model_name = write(host, "diffusion_models", "one_block.safetensors",
                       {name: tensor.half() for name, tensor in weights.items()})
    lora = write(host, "loras", "one_block.safetensors", random_lora(
        weights, ["blocks.0.attn.qkv", "blocks.0.mlp.fc1", "t_block.1"]))
    graph = StarterGraph()
    model = graph.add("UNETLoader", unet_name=model_name, weight_dtype="default")
    file = host.write_tensors("one_block", {
        "x": torch.randn(1, 4, 64, 64, generator=generator), "timestep": torch.tensor([500.0]),
        "caption": torch.randn(1, 5, 4096, generator=generator)})
    for label, chosen in (("plain", model), ("ours", ours(graph, model, lora)),
                          ("stock", stock(graph, model, lora))):
        graph.add("ProbeApplyModel", model=chosen, name=label, file=file)
    host.run(graph)
    assert relative(epsilon(host, "plain"), epsilon(host, "stock")) > 0.01
    assert relative(epsilon(host, "ours"), epsilon(host, "stock")) < 1e-5


@pytest.mark.gguf
def test_a_packed_model(host):
    """On a GGUF model as the stock loader of LoRAs does it."""
    pytest.importorskip("gguf")
    from pixart_core.checkpoint.gguf_write import write_gguf

    weights, config = pc.open_transformer(find_starter().transformer)
    write_gguf(host.models_dir / "diffusion_models" / "lora_base.gguf", weights, config, "Q4_0")
    lora = write(host, "loras", "on_packed.safetensors",
                 random_lora(weights, ["blocks.0.attn.qkv", "blocks.3.mlp.fc1"]))
    graph = StarterGraph(model="lora_base.gguf")
    save(graph, graph.lcm(), "packed_plain")
    save(graph, graph.lcm(model=ours(graph, graph.model, lora)), "packed_ours")
    save(graph, graph.lcm(model=stock(graph, graph.model, lora)), "packed_stock")
    host.run(graph)
    expected = saved(host, "packed_stock")
    assert relative(saved(host, "packed_plain"), expected) > 0.02
    assert relative(saved(host, "packed_ours"), expected) < 1e-5


def test_one_lora_is_kept_in_memory(host, peft_adapter):
    """The last one read; not another file, and no older version of a file."""
    adapter = peft_adapter("alpha")
    base, _ = install(host, adapter, "alpha")
    for name, scale in (("kept", 0.1), ("kept", 0.2), ("other", 0.1)):
        file = write(host, "loras", f"{name}.safetensors", random_lora(
            adapter.weights, ["blocks.0.mlp.fc1"], rank=int(40 * scale), scale=scale))
        graph, model = start(base)
        graph.add("ProbeInstances", class_name="LoRA", after=ours(graph, model, file))
        assert host.run(graph).json("ProbeInstances") == 1


def test_a_folder_stands_for_its_files(host, peft_adapter):
    install(host, peft_adapter("alpha"), "alpha")
    listed = [name for name in choices(host, "PixArtLoRALoader", "lora_name")
              if name.startswith("peft_alpha")]
    assert listed == ["peft_alpha/"]


def test_unused_tensors_are_shown(host, peft_adapter):
    """Text encoder and unknown tensors are named on the node, and the rest is applied."""
    adapter = peft_adapter("alpha")
    base, _ = install(host, adapter, "alpha")
    tensors = random_lora(adapter.weights, ["blocks.0.mlp.fc1"])
    tensors["lora_te_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight"] = torch.zeros(2, 2)
    tensors["diffusion_model.blocks.0.mlp.fc3.lora_down.weight"] = torch.zeros(2, 2)
    name = write(host, "loras", "leftovers.safetensors", tensors)
    graph, model = start(base)
    node = ours(graph, model, name)
    graph.add("ProbeModelInfo", model=node)
    result = host.run(graph)
    shown = "".join(text for where, text in result.progress_text if where == node.id)
    assert "SelfAttention" in shown and "mlp.fc3" in shown
    assert result.json("ProbeModelInfo")["patches"] == 1


def foreign(kind, adapter):
    pair = {"lora_down.weight": torch.zeros(4, 64), "lora_up.weight": torch.zeros(64, 4)}
    if kind == "a model":
        return adapter.weights
    names = {"SDXL": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
             "Flux": "transformer.single_transformer_blocks.0.attn.to_q",
             "width": "transformer.transformer_blocks.0.attn1.to_q",
             "depth": "transformer.transformer_blocks.7.attn1.to_q"}
    return {f"{names[kind]}.{leaf}": tensor for leaf, tensor in pair.items()}


@pytest.mark.parametrize(("kind", "stage", "words"), [
    ("SDXL", "validation", ["is a LoRA for Stable Diffusion", "trained on PixArt"]),
    ("Flux", "validation", ["is a LoRA for Flux"]),
    ("a model", "validation", ["is no LoRA", "a PixArt transformer"]),
    ("width", "execution", ["another width", "blocks.0.attn.qkv"]),
    ("depth", "execution", ["8 blocks or more", "this one has 2"]),
])
def test_loras_that_do_not_fit(host, peft_adapter, kind, stage, words):
    adapter = peft_adapter("alpha")
    base, _ = install(host, adapter, "alpha")
    name = write(host, "loras", f"wrong_{kind.replace(' ', '_')}.safetensors",
                 foreign(kind, adapter))
    graph, model = start(base)
    node = ours(graph, model, name)
    graph.add("ProbeModelInfo", model=node)
    refused(host, graph, *words, kind=stage, node=node)
