"""One step of each published algorithm against a float64 calculation written from the papers.

`forward` below is the network in plain tensor arithmetic and shares no code with the engine, and
neither do the two losses; gradients come from autograd over that, checked by finite differences.
"""

import math

import pytest
import torch
from training_samples import MemorySamples

import pixart_core as pc
from pixart_core.training.draws import Draws
from pixart_core.training.recipes.base import Base, BaseSettings
from pixart_core.training.recipes.controlnet import ControlNet, ControlNetSettings
from pixart_core.training.recipes.lcm import LCM, LCMSettings

HEADS, SIZE, DEPTH, RANGE = 2, 16, 3, 32.0
CONFIG = pc.PixArtConfig(hidden_size=SIZE, depth=DEPTH, num_heads=HEADS, mlp_hidden_size=32,
                         caption_channels=24, max_tokens=5)


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def attend(q, k, v, mask=None):
    heads = []
    for part in range(HEADS):
        own = slice(part * SIZE // HEADS, (part + 1) * SIZE // HEADS)
        scores = q[..., own] @ k[..., own].transpose(1, 2) / math.sqrt(SIZE // HEADS)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], -math.inf)
        heads.append(scores.softmax(-1) @ v[..., own])
    return torch.cat(heads, -1)


def positions(rows, columns):
    omega = [10000.0 ** (-i / (SIZE // 4)) for i in range(SIZE // 4)]
    table = []
    for row in range(rows):
        for column in range(columns):
            entry = []
            for place in (column * RANGE / columns, row * RANGE / rows):
                entry += [math.sin(place * o) for o in omega] + [math.cos(place * o) for o in omega]
            table.append(entry)
    return torch.tensor(table, dtype=torch.float64)


def embed(w, x):
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2)  # (B, 4, h, w, 2, 2)
    tokens = torch.einsum("bchwpq,ocpq->bhwo", patches, w["x_embedder.proj.weight"])
    tokens = (tokens + w["x_embedder.proj.bias"]).flatten(1, 2)
    return tokens + positions(x.shape[2] // 2, x.shape[3] // 2)


def block(w, name, x, modulation, caption, mask):
    table = w[f"{name}.scale_shift_table"] + modulation  # (B, 6, C)
    shift1, scale1, gate1, shift2, scale2, gate2 = (table[:, i, None] for i in range(6))
    h = norm(x) * (1 + scale1) + shift1
    q, k, v = linear(w, f"{name}.attn.qkv", h).chunk(3, -1)
    x = x + gate1 * linear(w, f"{name}.attn.proj", attend(q, k, v))
    k, v = linear(w, f"{name}.cross_attn.kv_linear", caption).chunk(2, -1)
    q = linear(w, f"{name}.cross_attn.q_linear", x)
    x = x + linear(w, f"{name}.cross_attn.proj", attend(q, k, v, mask))
    h = norm(x) * (1 + scale2) + shift2
    h = linear(w, f"{name}.mlp.fc2", gelu(linear(w, f"{name}.mlp.fc1", h)))
    return x + gate2 * h


def forward(w, x, t, caption, mask, control=None, net=None):
    """The whole network from a dict of float64 weights; `net` are those of a ControlNet."""
    # sinusoids are float32 in every model, whatever else it computes in
    angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * (torch.arange(128) / 128))
    sinusoids = torch.cat([angles.cos(), angles.sin()], -1).double()
    time = linear(w, "t_embedder.mlp.0", sinusoids)
    time = linear(w, "t_embedder.mlp.2", time * time.sigmoid())
    shared = linear(w, "t_block.1", time * time.sigmoid()).view(len(x), 6, SIZE)
    caption = linear(w, "y_embedder.y_proj.fc2", gelu(linear(w, "y_embedder.y_proj.fc1", caption)))
    hidden = embed(w, x)
    copied = None
    for index in range(DEPTH):
        if net is not None and 1 <= index <= 2:
            if index == 1:
                hint = embed(w, control)
                copied = hidden + linear(net, "controlnet.0.before_proj", hint)
            name = f"controlnet.{index - 1}"
            copied = block(net, f"{name}.copied_block", copied, shared, caption, mask)
            hidden = hidden + linear(net, f"{name}.after_proj", copied)
        hidden = block(w, f"blocks.{index}", hidden, shared, caption, mask)
    table = w["final_layer.scale_shift_table"] + time[:, None]
    out = linear(w, "final_layer.linear", norm(hidden) * (1 + table[:, 1:2]) + table[:, :1])
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    out = out.view(len(x), rows, columns, 2, 2, 8).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(len(x), 8, 2 * rows, 2 * columns)


def alpha_bar(t):
    out, product = [], 1.0
    for i in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        out.append(product)
    return torch.tensor([out[i] for i in t.tolist()], dtype=torch.float64).view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights, none of them zero, so that a gradient reaches every one."""
    model = pc.PixArtTransformer(CONFIG)
    g = torch.Generator().manual_seed(3)
    for parameter in [*model.parameters(), *model.buffers()]:
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=g)
    path = tmp_path_factory.mktemp("gradients") / "tiny.safetensors"
    pc.write_checkpoint(path, model.state_dict(), {"pixart_config": CONFIG.to_json()})
    return path


@pytest.fixture
def samples():
    return MemorySamples(count=4, size=(6, 4), control=True)


def in_float64(recipe, samples):
    """The recipe with everything in float64, the sinusoids (float32 in any model) cast at once."""
    for module in recipe.every_module():
        module.double()
        for name, part in module.named_modules():
            if name.endswith("t_embedder.mlp"):
                part.register_forward_pre_hook(lambda _, args: (args[0].double(),))
    for name in ("latents", "caption", "control"):
        setattr(samples, name, getattr(samples, name).double())
    return recipe, samples.batch(0, 4), Draws(0, range(4))


def check(recipe, module, mine, loss_of, weights):
    """Loss and all gradients agree, and those of the reference are its finite differences."""
    for value in weights.values():
        value.requires_grad_(True)
    reference = loss_of(weights)
    reference.backward()
    mine.backward()
    assert abs(mine - reference) / reference < 1e-6
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert gradients.keys() == {n for n, v in weights.items() if v.grad is not None}
    for name, gradient in gradients.items():
        wanted = weights[name].grad
        assert (gradient - wanted).norm() <= 1e-6 * wanted.norm().clamp(min=1e-9), name
    g = torch.Generator().manual_seed(9)
    direction = {n: torch.randn(v.shape, generator=g, dtype=torch.float64)
                 for n, v in weights.items() if v.grad is not None}
    slope = sum((weights[n].grad * d).sum() for n, d in direction.items())
    step, ends = 1e-6, []
    for sign in (1, -1):
        moved = {n: v.detach() + sign * step * direction[n] if n in direction else v.detach()
                 for n, v in weights.items()}
        ends.append(loss_of(moved))
    assert abs((ends[0] - ends[1]) / (2 * step) - slope) / abs(slope) < 1e-6


def test_an_lcm_step_has_the_gradients_of_the_paper(checkpoint, samples, tmp_path):
    """Protects algorithm 1: hop, guidance, boundary scalings, distance, stop-gradients."""
    settings = LCMSettings(out=tmp_path, steps=1, data=tmp_path, teacher=checkpoint,
                           caption_dropout=0.0)
    recipe, batch, draws = in_float64(LCM(settings, samples), samples)
    with torch.no_grad():  # a target unlike the student and the teacher
        for parameter in recipe.target.parameters():
            parameter.mul_(1.01)
    mine = recipe.loss(recipe.trained, batch, draws).total
    drawn = Draws(0, range(4))
    start = 20 * drawn.integers(50) + 19
    noise = drawn.noise(batch.latents)
    w = {n: v.double().detach().clone() for n, v in recipe.student.state_dict().items()}
    teacher = {n: v.double() for n, v in recipe.teacher.state_dict().items()}
    target = {n: v.double() for n, v in recipe.target.state_dict().items()}
    null = teacher["y_embedder.y_embedding"].expand(4, -1, -1)

    def loss_of(weights):
        end = (start - 20).clamp(min=0)
        now, later = alpha_bar(start), alpha_bar(end)
        x = now.sqrt() * batch.latents + (1 - now).sqrt() * noise

        def clean(weights, x, t, level):
            eps = forward(weights, x, t, batch.caption, batch.mask)[:, :4]
            x0 = (x - (1 - level).sqrt() * eps) / level.sqrt()
            s = 10.0 * t.view(-1, 1, 1, 1)
            return 0.25 / (s**2 + 0.25) * x + s / (s**2 + 0.25).sqrt() * x0

        with torch.no_grad():
            cond = forward(teacher, x, start, batch.caption, batch.mask)[:, :4]
            uncond = forward(teacher, x, start, null, batch.mask)[:, :4]
            eps = 5.5 * cond - 4.5 * uncond
            x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
            hopped = later.sqrt() * x0 + (1 - later).sqrt() * eps
            wanted = clean(target, hopped, end, later)
        difference = clean(weights, x, start, now) - wanted
        return ((difference**2 + 1e-6).sqrt() - 1e-3).mean()

    check(recipe, recipe.student, mine, loss_of, w)


def test_a_controlnet_step_has_the_gradients_of_the_paper(checkpoint, samples, tmp_path):
    """Protects the wiring in training: copies and projections alone get gradients."""
    settings = ControlNetSettings(out=tmp_path, steps=1, data=tmp_path, model=checkpoint, depth=2,
                                  caption_dropout=0.0)
    recipe = ControlNet(settings, samples)
    g = torch.Generator().manual_seed(4)
    for parameter in recipe.net.parameters():  # projections away from zero
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=g)
    recipe, batch, draws = in_float64(recipe, samples)
    mine = recipe.loss(recipe.trained, batch, draws).total
    drawn = Draws(0, range(4))
    t, noise = drawn.integers(1000), drawn.noise(batch.latents)
    base = {n: v.double() for n, v in recipe.base.state_dict().items()}
    net = {n: v.double().detach().clone() for n, v in recipe.net.state_dict().items()}

    def loss_of(weights):
        level = alpha_bar(t)
        x = level.sqrt() * batch.latents + (1 - level).sqrt() * noise
        out = forward(base, x, t, batch.caption, batch.mask, batch.control, weights)
        return (out[:, :4] - noise).square().mean()

    check(recipe, recipe.net, mine, loss_of, net)
    assert all(p.grad is None for p in recipe.base.parameters())


def test_a_base_step_has_the_gradients_of_the_paper(checkpoint, samples, tmp_path):
    """Protects the noise loss of the base recipe and its weighting."""
    settings = BaseSettings(out=tmp_path, steps=1, data=tmp_path, model=checkpoint,
                            caption_dropout=0.0, learn_variance=False, weight_clip=30.0,
                            ema_decay=None)
    recipe, batch, draws = in_float64(Base(settings, samples), samples)
    mine = recipe.loss(recipe.trained, batch, draws).total
    drawn = Draws(0, range(4))
    t, noise = drawn.integers(1000), drawn.noise(batch.latents)
    w = {n: v.double().detach().clone() for n, v in recipe.trained.state_dict().items()}

    def loss_of(weights):
        level = alpha_bar(t)
        x = level.sqrt() * batch.latents + (1 - level).sqrt() * noise
        out = forward(weights, x, t, batch.caption, batch.mask)[:, :4]
        return ((1 / level).clamp(max=30) * (out - noise).square()).mean()

    check(recipe, recipe.trained, mine, loss_of, w)
