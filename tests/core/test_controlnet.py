"""ControlNet-Transformer: wiring, layouts and what it refuses."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import pixart_core as pc
from pixart_core.checkpoint.controlnet import join_controlnet, split_controlnet
from pixart_core.config import METADATA_KEY
from pixart_core.load_control import read_controlnet
from pixart_core.model.controlnet import mode_weights

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("control_512", "control_1024")
INPUTS = ("x", "timestep", "caption", "caption_mask", "image_size", "aspect_ratio")


def read_golden(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


class Case:
    """A golden case: its official file, base, ControlNet and inputs."""

    def __init__(self, name):
        self.tensors = read_golden(name)
        self.file = {k.removeprefix("weights."): v for k, v in self.tensors.items()
                     if k.startswith("weights.")}
        self.base = pc.load_transformer(
            {k.removeprefix("base_model."): v for k, v in self.file.items()
             if k.startswith("base_model.")}, num_heads=2)
        self.net = pc.load_controlnet(self.file, num_heads=2)
        self.inputs = [self.tensors.get(f"in.{k}") for k in INPUTS]
        self.latent = self.tensors["in.control_latent"]
        self.out = self.tensors["out"]

    @torch.no_grad()
    def run(self, *controls, base=None):
        return (base or self.base)(*self.inputs, control=controls)

    def control(self, **settings):
        return pc.Control(self.net, self.latent, **settings)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def small():
    return Case("control_1024")


def relative(out, reference):
    return ((out - reference).norm() / reference.norm()).item()


def test_equals_the_official_code(case):
    """Frozen block 0 first, first copy reads its output, copy i enters block i + 1."""
    assert relative(case.run(case.control()), case.out) < 1e-5


def test_prepared_captions_serve_the_copies_too(case):
    prepared = case.base.prepare_caption(case.inputs[2], case.inputs[3])
    with torch.no_grad():
        out = case.base(case.inputs[0], case.inputs[1], prepared, None, *case.inputs[4:],
                        control=[case.control()])
    assert torch.equal(out, case.run(case.control()))


def test_strength_zero_is_no_control(case):
    assert torch.equal(case.run(case.control(strength=0.0)), case.run())


def test_two_halves_are_a_whole(case):
    half = case.control(strength=0.5)
    assert relative(case.run(half, half), case.run(case.control())) < 1e-6


def test_controls_add_up_whatever_their_depth(small):
    """A shallower control beside a deeper one steers the early blocks only."""
    one = {k: v for k, v in small.net.state_dict().items() if k.startswith("controlnet.0.")}
    shallow = pc.load_controlnet(one, num_heads=2)
    deep = small.control()
    both = small.run(deep, pc.Control(shallow, small.latent))
    swapped = small.run(pc.Control(shallow, small.latent), deep)
    assert relative(both, swapped) < 1e-6
    assert relative(both, small.run(deep)) > 1e-3


def test_a_control_of_batch_one_serves_every_sample(small):
    first = small.latent[:1]
    one = small.run(pc.Control(small.net, first))
    repeated = small.run(pc.Control(small.net, first.expand_as(small.latent)))
    assert relative(one, repeated) < 1e-6


def test_rows_steer_their_samples_alone(small):
    """Control on the conditional half of a guidance batch."""
    half = small.run(small.control(rows=slice(1, 2)))
    assert relative(half[1:], small.run(small.control())[1:]) < 1e-6
    assert relative(half[:1], small.run()[:1]) < 1e-6


def test_rows_take_prepared_captions_and_no_mask(small):
    caption = small.inputs[2][:, :5]
    inputs = [small.inputs[0], small.inputs[1], caption, None, *small.inputs[4:]]
    control = [small.control(rows=slice(0, 1))]
    with torch.no_grad():
        plain = small.base(*inputs, control=control)
        inputs[2] = small.base.prepare_caption(caption)
        prepared = small.base(*inputs, control=control)
    assert torch.equal(plain, prepared)


def test_modes_scale_each_residual(small):
    """prompt fades the early copies; the weights multiply the residuals one by one."""
    weights = mode_weights("prompt", 3)
    assert weights == pytest.approx((0.825**12, 0.825**6, 1.0))
    assert mode_weights("control", 13)[0] == pytest.approx(0.825**12)
    assert mode_weights("control", 13)[11] == pytest.approx(0.825)
    assert mode_weights("balanced", 3) == (1.0, 1.0, 1.0)
    assert mode_weights("prompt", 1) == (1.0,)
    scaled = {k: v.clone() for k, v in small.net.state_dict().items()}
    for i, weight in enumerate(weights):
        for part in ("weight", "bias"):
            scaled[f"controlnet.{i}.after_proj.{part}"] *= weight
    by_hand = pc.load_controlnet(scaled, num_heads=2)
    assert relative(small.run(small.control(weights=weights)),
                    small.run(pc.Control(by_hand, small.latent))) < 1e-5
    with pytest.raises(ValueError, match="balanced, prompt, control"):
        mode_weights("loud", 3)


@pytest.mark.parametrize("settings", [{}, {"strength": 0.5}, {"rows": slice(1, 2)}])
def test_one_set_of_residuals_is_alive(small, settings):
    """However many controls there are: what each copy gives is added up and let go."""
    given, most = [], 0

    def count(_, __, out):
        nonlocal most
        given.append(weakref.ref(out))
        most = max(most, sum(ref() is not None for ref in given))

    hooks = [block.after_proj.register_forward_hook(count) for block in small.net.controlnet]
    small.run(*[small.control(**settings)] * 3)
    for hook in hooks:
        hook.remove()
    depth = small.net.config.depth
    assert len(given) == 3 * depth
    # at strength 1 the first control's own tensors become the sums
    assert most <= (depth + 1 if not settings else 2)


def test_a_new_controlnet_changes_nothing(small):
    """Copies of the first blocks behind zero projections, as training starts."""
    net = pc.PixArtControlNet.from_base(small.base, depth=3)
    assert torch.equal(small.run(pc.Control(net, small.latent)), small.run())
    assert torch.equal(net.controlnet[2].copied_block.mlp.fc1.weight,
                       small.base.blocks[2].mlp.fc1.weight)
    assert net.controlnet[2].copied_block is not small.base.blocks[2]
    assert sum("before_proj" in name for name in net.state_dict()) == 2
    with pytest.raises(ValueError, match="1 to 3"):
        pc.PixArtControlNet.from_base(small.base, depth=4)


@pytest.mark.parametrize("fields", [
    {"variant": "sigma", "max_tokens": 300},
    {"variant": "sigma", "max_tokens": 300, "qk_norm": True,
     "kv_compression": {"sampling": "conv", "factor": 2, "layers": (1, 2)}},
])
def test_sigma_shapes(make_weights, tmp_path, fields):
    """Sigma's blocks, with q/k normalisation and token compression, through a file and back."""
    base = pc.load_transformer(make_weights(depth=4, **fields), num_heads=4, **fields)
    net = pc.PixArtControlNet.from_base(base, depth=2)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "_proj." in name:
                parameter.normal_(std=0.1)
    file = tmp_path / "control.safetensors"
    pc.write_checkpoint(file, net.state_dict(), {METADATA_KEY: net.config.to_json()})
    again = pc.load_controlnet(file)
    assert again.config == net.config
    x, caption = torch.randn(1, 4, 9, 12), torch.randn(1, 7, 24)
    latent = torch.randn(1, 4, 9, 12)
    with torch.no_grad():
        outs = [base(x, torch.tensor([500.0]), caption, control=[pc.Control(n, latent)])
                for n in (net, again)]
        plain = base(x, torch.tensor([500.0]), caption)
    assert torch.equal(*outs)
    assert relative(outs[0], plain) > 1e-3


def test_diffusers_layout_there_and_back(case):
    native = split_controlnet(case.file).control
    diffusers = join_controlnet(native, to="diffusers")
    assert all(name.startswith("controlnet_blocks.") for name in diffusers)
    parts = split_controlnet(diffusers)
    assert parts.layout == "diffusers"
    assert parts.control.keys() == native.keys()
    assert all(torch.equal(parts.control[k], native[k]) for k in native)
    net = pc.load_controlnet(diffusers, num_heads=2)
    assert torch.equal(case.run(pc.Control(net, case.latent)), case.run(case.control()))


class Adapter(nn.Module):
    """diffusers' research adapter, of diffusers' own blocks and under its names."""

    class Block(nn.Module):
        def __init__(self, first, size, heads):
            from diffusers.models.attention import BasicTransformerBlock

            super().__init__()
            if first:
                self.before_proj = nn.Linear(size, size)
            self.transformer_block = BasicTransformerBlock(
                size, heads, size // heads, cross_attention_dim=size, attention_bias=True,
                activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
                norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6)
            self.after_proj = nn.Linear(size, size)

    def __init__(self, depth, size, heads):
        super().__init__()
        self.controlnet_blocks = nn.ModuleList(
            self.Block(i == 0, size, heads) for i in range(depth))

    def steer(self, transformer, control):
        """Hook the skips in between the blocks of a diffusers transformer."""
        state = {}

        def after_first(_, args, kwargs, out):
            first = self.controlnet_blocks[0]
            hidden = out + first.before_proj(transformer.pos_embed(control))
            for index, block in enumerate(self.controlnet_blocks):
                hidden = block.transformer_block(hidden, **kwargs)
                state[index + 1] = block.after_proj(hidden)

        blocks = transformer.transformer_blocks
        blocks[0].register_forward_hook(after_first, with_kwargs=True)
        for index in range(1, len(self.controlnet_blocks) + 1):
            blocks[index].register_forward_pre_hook(
                lambda _, args, i=index: (args[0] + state[i], *args[1:]))


def test_diffusers_adapter_gives_the_same(small):
    """diffusers' transformer with its adapter blocks, loaded strictly from our conversion."""
    from diffusers import PixArtTransformer2DModel

    from pixart_core.export import diffusers_config

    net = small.net
    config = {k: v for k, v in diffusers_config(small.base.config).items() if k[0] != "_"}
    transformer = PixArtTransformer2DModel(**config).eval()
    transformer.load_state_dict(
        pc.convert_state_dict(small.base.state_dict(), to="diffusers"), strict=False)
    adapter = Adapter(net.config.depth, net.config.hidden_size, net.config.num_heads).eval()
    adapter.load_state_dict(join_controlnet(net.state_dict(), to="diffusers"), strict=True)
    adapter.steer(transformer, small.latent)
    x, timestep, caption, mask, size, ratio = small.inputs
    with torch.no_grad():
        theirs = transformer(x, caption, timestep, encoder_attention_mask=mask,
                             added_cond_kwargs={"resolution": size.float(),
                                                "aspect_ratio": ratio}).sample
    assert relative(small.run(small.control()), theirs) < 1e-5


def wrapped(state_dict, prefix):
    return {prefix + name: tensor for name, tensor in state_dict.items()}


def test_layouts_people_have(small, tmp_path):
    """Original .pth with its base, control only, prefixes, diffusers' wrapper and folder."""
    native = split_controlnet(small.file).control
    diffusers = join_controlnet(native, to="diffusers")
    torch.save({"state_dict": small.file, "epoch": 3}, tmp_path / "original.pth")
    torch.save({"state_dict": wrapped(native, "module.")}, tmp_path / "parallel.pth")
    save_file(native, tmp_path / "control_only.safetensors")
    save_file(wrapped(native, "model."), tmp_path / "prefixed.safetensors")
    base = pc.convert_state_dict(small.base.state_dict(), to="diffusers")
    pc.write_checkpoint(tmp_path / "wrapper.safetensors",
                        {**wrapped(diffusers, "controlnet."), **wrapped(base, "transformer.")}, {})
    folder = tmp_path / "simpletuner" / "controlnet"
    folder.mkdir(parents=True)
    pc.write_checkpoint(folder / "diffusion_pytorch_model.safetensors", diffusers, {})
    (folder / "config.json").write_text(json.dumps(
        {"_class_name": "PixArtControlNetAdapterModel", "num_layers": 3,
         "num_attention_heads": 2}))
    expected = small.run(small.control())
    for name in ("original.pth", "parallel.pth", "control_only.safetensors",
                 "prefixed.safetensors", "wrapper.safetensors"):
        net = pc.load_controlnet(tmp_path / name, num_heads=2)
        assert torch.equal(small.run(pc.Control(net, small.latent)), expected), name
    for path in (folder, folder.parent):
        net = pc.load_controlnet(path)
        assert torch.equal(small.run(pc.Control(net, small.latent)), expected), path


def test_what_it_was_trained_for_is_read_off_its_base(case):
    assert case.net.config.variant == "alpha"
    assert case.net.config.image_size == (1024 if case.inputs[4] is not None else None)


def test_the_base_in_the_file_is_kept_on_request_only(small):
    assert read_controlnet(small.file, {"num_heads": 2}).base == {}
    kept = read_controlnet(small.file, {"num_heads": 2}, keep_base=True).base
    assert "blocks.0.attn.qkv.weight" in kept


def test_dtype_is_the_callers(small):
    net = pc.load_controlnet(small.file, dtype=torch.bfloat16, num_heads=2)
    block = net.controlnet[0]
    assert block.before_proj.weight.dtype == torch.bfloat16
    assert block.copied_block.scale_shift_table.dtype == torch.float32


def broken(case, **changes):
    tensors = dict(case.file)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return tensors


@pytest.mark.parametrize(("make", "message"), [
    (lambda c: broken(c, controlnet__0__before_proj__weight=None), "lacks weights.*before_proj"),
    (lambda c: broken(c, controlnet__1__after_proj__weight=torch.zeros(48, 47)), "has shape"),
    (lambda c: broken(c, controlnet__1__after_proj__bias=torch.full((48,), torch.nan)), "NaN"),
    (lambda c: broken(c, something__else=torch.zeros(1)), "something.else"),
    (lambda c: {k: v for k, v in c.file.items() if ".1." not in k}, "blocks \\[1\\] are missing"),
    (lambda c: c.base.state_dict(), "PixArt Model Loader"),
    (lambda c: {"input_blocks.0.0.weight": torch.zeros(1)}, "Stable Diffusion"),
    (lambda c: {**c.file, **wrapped(c.file, "other.")}, "more than one ControlNet"),
])
def test_bad_files_say_what_is_wrong(small, make, message):
    with pytest.raises(pc.CheckpointError, match=message):
        pc.load_controlnet(make(small), num_heads=2)


def test_projections_keep_sixteen_bits(small):
    """Eight would round most of a trained projection, which started at zero, away."""
    net = pc.load_controlnet(small.file, dtype=torch.float8_e4m3fn, num_heads=2)
    block = net.controlnet[0]
    assert block.copied_block.mlp.fc1.weight.dtype == torch.float8_e4m3fn
    assert block.before_proj.weight.dtype == block.after_proj.bias.dtype == torch.bfloat16


def test_a_control_of_another_dtype_is_refused(small):
    half = pc.load_controlnet(small.file, dtype=torch.float16, num_heads=2)
    with pytest.raises(ValueError, match="one dtype"):
        small.run(pc.Control(half, small.latent))


def test_the_transformer_tells_heads_where_nothing_else_does(small, tmp_path):
    assert pc.load_controlnet(small.file, base=small.base.config).config.num_heads == 2
    header = {METADATA_KEY: json.dumps({"num_heads": 4})}
    pc.write_checkpoint(tmp_path / "four.safetensors", small.net.state_dict(), header)
    four = pc.load_controlnet(tmp_path / "four.safetensors", base=small.base.config)
    with pytest.raises(ValueError, match="with 4 heads"):
        small.run(pc.Control(four, small.latent))


def test_heads_are_never_guessed(small):
    with pytest.raises(pc.CheckpointError, match="num_heads"):
        pc.load_controlnet(small.file)
    with pytest.raises(pc.CheckpointError, match="depth=9"):
        pc.load_controlnet(small.file, num_heads=2, depth=9)
    with pytest.raises(pc.CheckpointError, match="max_tokens"):
        pc.load_controlnet(small.file, num_heads=2, max_tokens=120)


def test_a_control_that_does_not_fit_is_refused(small, make_weights):
    other = pc.load_transformer(make_weights(hidden_size=96, depth=5), num_heads=4)
    shallow = pc.load_transformer(make_weights(depth=3, num_heads=2), num_heads=2)
    x, caption = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 24)
    control = [pc.Control(small.net, torch.randn(1, 4, 8, 8))]
    for base, message in ((other, "48 wide with 2 heads, this one is 96"), (shallow, "3 copied")):
        with pytest.raises(ValueError, match=message):
            base(x, torch.tensor([1.0]), caption, control=control)


@pytest.mark.parametrize("shape", [(2, 4, 31, 20), (3, 4, 32, 20), (2, 16, 32, 20), (4, 32, 20)])
def test_a_latent_that_does_not_fit_is_refused(small, shape):
    with pytest.raises(ValueError, match="control latent of shape"):
        small.run(pc.Control(small.net, torch.zeros(shape)))
    with pytest.raises(ValueError, match="control weights"):
        small.run(small.control(weights=(1.0,)))


def test_control_compiles_into_one_graph(small):
    """No Python branch on tensor values: strength and latent are inputs of a static graph."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(small.base, backend=count, fullgraph=True)
    with torch.no_grad():
        out = compiled(*small.inputs, control=(small.control(),))
    assert len(graphs) == 1
    assert relative(out, small.out) < 1e-4
