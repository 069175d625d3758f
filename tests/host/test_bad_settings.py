"""Wrong prompts, sizes, settings and wires: one clear error on the node; the server lives on."""


import pytest
import torch
from checks import refused, write
from graphs import MODEL, T5, TOKENS, Graph, StarterGraph

from pixart_core.starter import find_starter

STARTER = find_starter()
pytestmark = pytest.mark.usefixtures("lives_on")


# prompts: whatever is typed, a picture comes


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("text", ["", "   \n\t ", "</s>", "<pad>", "🎨🦄🔥" * 3, "((((:1.5", "{a|b",
                                  "\u0000\ufffd\u202e"],
                         ids=["empty", "spaces", "end_token", "pad_token", "emoji", "weights",
                              "dynamic", "odd_characters"])
def test_odd_prompts_work(host, text, clean):
    graph = StarterGraph()
    positive = graph.add("PixArtTextEncode", clip=graph.clip, text=text, clean_caption=clean,
                         max_tokens=TOKENS)
    graph.tensors(positive, "odd_prompt")
    graph.picture(graph.lcm(steps=1, positive=positive))
    assert str(TOKENS) in host.run(graph).text(positive)
    assert host.read_tensors("odd_prompt")["value.0.0"].isfinite().all()


def test_ten_thousand_words(host):
    """Cut at the limit; the node says how many tokens there were and what was left out."""
    graph = StarterGraph()
    positive = graph.encode(" ".join(["circle"] * 20 + ["lantern"] * 10_000))
    graph.tensors(positive, "long_prompt")
    graph.picture(graph.lcm(steps=1, positive=positive))
    report = host.run(graph).text(positive)
    assert f"the limit is {TOKENS}; cut:" in report and "lantern" in report
    assert int(report.split()[0]) > 10_000
    assert host.read_tensors("long_prompt")["value.0.0"].shape[1] == TOKENS


# sizes and settings


@pytest.mark.parametrize("width", [0, 7, 99999])
def test_sizes_that_no_picture_has(host, width):
    graph = Graph()
    node = graph.add("PixArtResolution", base="1024", aspect_ratio="from width and height",
                     width=width, height=1024, batch_size=1)
    graph.add("ProbeSaveTensors", value=node[2], name="size")
    refused(host, graph, "width", "8" if width < 8 else "16384", node=node)


@pytest.mark.parametrize("width", [0, 99999])
def test_sizes_that_come_by_wire(host, width):
    """Nothing checks a wire before it carries a value: the node does."""
    graph = Graph()
    number = graph.add("PrimitiveInt", value=width)
    node = graph.add("PixArtResolution", base="1024", aspect_ratio="from width and height",
                     width=number, height=1024, batch_size=1)
    graph.add("ProbeSaveTensors", value=node[2], name="size")
    refused(host, graph, f"width is {width} px", "1 to 16384", kind="execution", node=node)


@pytest.mark.parametrize(("width", "height"), [(24, 136), (72, 40)])
def test_odd_multiples_of_eight_work(host, width, height):
    """The latent is not a whole number of patches; the picture still has the size asked for."""
    graph = StarterGraph(width=width, height=height)
    save = graph.picture(graph.lcm(steps=1))
    picture = host.picture(host.run(graph).images(save)[0])
    assert picture.size == (width, height)


WRONG_SCHEDULES = [
    ({"steps": 0}, ["LCM steps is 0", "1 to 50"]),
    ({"steps": 51}, ["LCM steps is 51", "1 to 50"]),
    ({"strength": 0.0}, ["strength is 0.0", "above 0 and at most 1"]),
    ({"strength": 1.5}, ["strength is 1.5", "above 0 and at most 1"]),
    ({"strength": -1.0}, ["strength is -1.0", "above 0 and at most 1"]),
    ({"steps": 8, "strength": 0.05}, ["strength 0.05 leaves 2 of the 50", "smallest strength for "
                                      "8 is 0.16"]),
]


def schedule_graph(node_name, **values):
    """A graph that ends in one of the two LCM nodes, and that node."""
    graph = StarterGraph()
    if node_name == "PixArtLCMSampler":
        node = graph.lcm(**values)
        graph.tensors(node, "schedule")
    else:
        node = graph.add(node_name, **{"steps": 4, "strength": 1.0, "grid": "diffusers", **values})
        graph.tensors(node[1], "schedule")
    return graph, node


@pytest.mark.parametrize("node_name", ["PixArtLCMSampler", "PixArtLCMSchedule"])
@pytest.mark.parametrize(("values", "words"), WRONG_SCHEDULES)
def test_a_schedule_that_does_not_exist(host, node_name, values, words):
    graph, node = schedule_graph(node_name, **values)
    refused(host, graph, *words, node=node)


@pytest.mark.parametrize("node_name", ["PixArtLCMSampler", "PixArtLCMSchedule"])
@pytest.mark.parametrize(("values", "words"), WRONG_SCHEDULES)
def test_a_schedule_that_comes_by_wire(host, node_name, values, words):
    """The same message, when the value is there."""
    graph, node = schedule_graph(node_name)
    for name, value in values.items():
        kind = "PrimitiveInt" if name == "steps" else "PrimitiveFloat"
        graph.prompt[node.id]["inputs"][name] = graph.add(kind, value=value)[0]
    refused(host, graph, *words, kind="execution", node=node)


@pytest.mark.parametrize(("node_name", "key", "option"), [
    ("PixArtLoader", "weight_dtype", "bfloat16"), ("PixArtLoader", "variant", "sigma"),
    ("PixArtT5Loader", "device", "cpu"), ("PixArtResolution", "base", "2880"),
    ("PixArtResolution", "aspect_ratio", "16:9 wide"), ("PixArtLCMSchedule", "grid", "official"),
    ("PixArtLCMSampler", "grid", "official"),
])
def test_a_choice_that_does_not_exist(host, node_name, key, option):
    """Refused at once where the host checks the list, else by the node, with the choices."""
    graph = StarterGraph()
    size = graph.add("PixArtResolution", base="256", aspect_ratio="1:1 square", width=8, height=8,
                     batch_size=1)
    if node_name == "PixArtLCMSchedule":
        schedule = graph.add(node_name, steps=1, strength=1.0, grid="diffusers")
        graph.add("ProbeSaveTensors", value=schedule[1], name="choice")
    else:
        graph.picture(graph.lcm(latent=size[2]))
    node = next(i for i, n in graph.prompt.items() if n["class_type"] == node_name)
    graph.prompt[node]["inputs"][key] = "nonsense"
    error = host.run(graph, ok=False).error
    assert error.node == node, str(error)
    assert "'nonsense'" in error.message and key in error.message and option in error.message


def test_half_a_size(host):
    graph = StarterGraph()
    graph.positive = graph.encode("a red circle", width=512)
    graph.picture(graph.lcm(steps=1))
    refused(host, graph, "width is 512 and height is 0", "give both", kind="execution",
            node=graph.positive)


# a stock ControlNet


def t2i_adapter(wide=8):
    """A T2I-Adapter of Stable Diffusion, eight channels wide."""
    generator = torch.Generator().manual_seed(0)
    channels = [wide, 2 * wide, 4 * wide, 4 * wide]
    weights = {"conv_in": (wide, 64, 3, 3)}
    for i, (before, after) in enumerate(zip([wide, *channels[:3]], channels, strict=True)):
        for j in range(2):
            name = f"body.{2 * i + j}"
            if j == 0 and before != after:
                weights[f"{name}.in_conv"] = (after, before, 1, 1)
            weights[f"{name}.block1"] = (after, after, 3, 3)
            weights[f"{name}.block2"] = (after, after, 1, 1)
    tensors = {f"{k}.weight": torch.randn(s, generator=generator) for k, s in weights.items()}
    return tensors | {f"{k}.bias": torch.zeros(s[0]) for k, s in weights.items()}


def test_a_controlnet_of_another_kind(host):
    """It is not dropped in silence: the picture would ignore what was wired."""
    name = write(host, "controlnet", "t2i.safetensors", t2i_adapter())
    graph = StarterGraph()
    control = graph.add("ControlNetLoader", control_net_name=name)
    image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0)
    applied = graph.add("ControlNetApplyAdvanced", positive=graph.positive,
                        negative=graph.negative, control_net=control, image=image, strength=1.0,
                        start_percent=0.0, end_percent=1.0)
    node = graph.ksampler(steps=1, positive=applied[0], negative=applied[1])
    graph.picture(node)
    refused(host, graph, "ControlNet", "another kind of model", "take it out", kind="execution",
            node=node)


def test_the_starter_itself_is_good():
    """These tests change copies of it: it must be there, under the names they use."""
    assert (STARTER.transformer.name, STARTER.t5_file.name) == (MODEL, T5)
