"""Tokens of a T5 of any size in the host: those of the engine, whatever tokenizer it comes with."""

import json

import pytest
import torch
from checks import STARTER, relative, saved
from graphs import T5, Graph
from safetensors.torch import load_file, save_file

import pixart_core as pc


def states(host, text, t5=T5):
    """States (1, L, D) of the stock CLIPTextEncode."""
    graph = Graph()
    clip = graph.add("PixArtT5Loader", t5_name=t5)
    node = graph.add("CLIPTextEncode", clip=clip, text=text)
    graph.add("ProbeSaveTensors", value=node, name="small_t5")
    host.run(graph)
    return saved(host, "small_t5", "value.0.0")


def expected(encoder, text):
    out, mask = encoder(text, max_tokens=300)
    return out[:, : int(mask.sum())]


@pytest.mark.parametrize("text", ["a red </s> circle", "a red</s>circle", "</s>", "<pad> a star"])
def test_special_tokens_spelt_out(host, encoder, text):
    """They are those tokens, as the host's own T5 XXL has it and transformers too."""
    ours, reference = states(host, text), expected(encoder, text)
    assert ours.shape == reference.shape and relative(ours, reference) < 1e-5


def test_a_folder_with_a_tokenizer_json(host):
    """Words as whole tokens, which the starter's own SentencePiece model would split."""
    weights = load_file(STARTER.t5_file)
    weights.pop("spiece_model")
    folder = host.models_dir / "text_encoders" / "t5_json"
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "circle": 5}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
        "added_tokens": [{"id": i, "content": name, "special": True, "normalized": False,
                          "single_word": False, "lstrip": False, "rstrip": False}
                         for name, i in list(words.items())[:3]],
    }))
    encoder = pc.text.T5TextEncoder.from_path(folder, dtype=torch.float32)
    ours = states(host, "a red circle", t5="t5_json/")
    assert ours.shape[1] == 4  # three words and the end token
    assert relative(ours, expected(encoder, "a red circle")) < 1e-5
