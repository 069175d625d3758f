"""The starter family in the host: what is listed, the student in 4 bits, the Sigma model."""

import pytest
import torch
from checks import STARTER, choices, relative, require_kitchen, saved
from graphs import LCM, PROMPT, SIGMA, TOKENS, Graph, StarterGraph

SVDQUANT = STARTER.lcm_svdquant.name
SIDE = STARTER.image_size


@pytest.mark.parametrize(("node", "name", "files"), [
    ("PixArtLoader", "model_name", (STARTER.transformer, STARTER.lcm, STARTER.lcm_svdquant,
                                    STARTER.sigma)),
    ("PixArtT5Loader", "t5_name", (STARTER.t5_file,)),
    ("VAELoader", "vae_name", (STARTER.vae,)),
    ("PixArtControlNetLoader", "control_net_name", (STARTER.controlnet,)),
])
def test_the_whole_family_is_listed(host, node, name, files):
    """Protects the templates' file names."""
    assert {file.name for file in files} <= set(choices(host, node, name))


def test_the_4_bit_student_predicts_what_the_student_does(host, installation, encoder):
    """Within what 4 bits cost, and not the same."""
    require_kitchen(installation)
    states, mask = encoder(PROMPT, max_tokens=TOKENS)
    noise = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(0))
    file = host.write_tensors("family", {"x": noise, "timestep": torch.tensor([499.0]),
                                         "caption": states[:, : int(mask.sum())]})
    graph = Graph()
    for name in (LCM, SVDQUANT):
        model = graph.add("PixArtLoader", model_name=name)
        graph.add("ProbeApplyModel", model=model, file=file, name=name.split(".")[0])
    host.run(graph)
    student, packed = (saved(host, name.split(".")[0], "eps") for name in (LCM, SVDQUANT))
    assert 1e-3 < relative(packed, student) < 0.15


def test_the_sigma_model_is_taken_for_one(host):
    """Protects its colours: the host scales its latents as SDXL's, whatever VAE decodes them."""
    graph = Graph()
    graph.add("ProbeModelInfo", model=graph.add("PixArtLoader", model_name=SIGMA))
    assert host.run(graph).json("ProbeModelInfo")["latent_format"] == "SDXL"


def test_the_loader_says_what_runs_the_4_bit_student(host, installation):
    require_kitchen(installation)
    host.free()  # or the host would have the node's output still
    graph = StarterGraph(model=SVDQUANT)
    graph.picture(graph.lcm(steps=1))
    shown = "".join(text for _, text in host.run(graph).progress_text)
    assert "layers in svdquant_w4a4: eager (plain PyTorch on the CPU)" in shown
