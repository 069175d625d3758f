"""T5TextEncoder: equal to transformers' encoder whatever the file, and clear about its prompts."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_core.text import CaptionTokenizer, T5TextEncoder

STARTER = Path(__file__).parents[2] / "starter"
ENCODERS = STARTER / "text_encoders"
FILES = {"folder": ENCODERS / "t5", "single": ENCODERS / "t5_starter.safetensors"}
PROMPTS = ["a small red circle on the left on a blue background", "", "yellow star 🎨"]


@pytest.fixture(scope="module")
def encoder() -> T5TextEncoder:
    return T5TextEncoder.from_path(FILES["folder"], dtype=torch.float32)


@pytest.fixture(scope="module")
def reference():
    from transformers import T5EncoderModel

    return T5EncoderModel.from_pretrained(ENCODERS / "t5").float().eval()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("max_tokens", [24, 120, 300])
def test_equals_transformers(reference, kind, max_tokens):
    encoder = T5TextEncoder.from_path(FILES[kind], dtype=torch.float32)
    embeds, mask = encoder(PROMPTS, max_tokens)
    assert embeds.shape == (3, max_tokens, 128) and embeds.dtype == torch.float32
    assert mask.shape == (3, max_tokens) and mask.dtype == torch.bool
    ids = torch.zeros(3, max_tokens, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        tokens = encoder.tokenizer.encode(prompt, max_tokens).ids
        ids[row, : len(tokens)] = torch.tensor(tokens)
        assert mask[row].sum() == len(tokens) and mask[row, : len(tokens)].all()
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    assert relative(embeds, expected) < 1e-5


def test_padding_does_not_reach_the_tokens(encoder):
    """Padded and masked equals unpadded; a mask that T5 ignored would show here."""
    embeds, mask = encoder(PROMPTS, 120)
    for row, prompt in enumerate(PROMPTS):
        alone, _ = encoder(prompt, int(mask[row].sum()))
        torch.testing.assert_close(embeds[row, mask[row]], alone[0], rtol=1e-5, atol=1e-5)


def test_empty_prompt_is_one_end_token(encoder):
    _, mask = encoder("", 24)
    assert mask.sum() == 1 and mask[0, 0]


def test_a_spelt_out_pad_token_is_a_token(encoder):
    """The mask follows the prompt's length, not the ids: T5's pad id can stand inside a prompt."""
    _, mask = encoder("red <pad> circle", 24)
    assert mask[0].tolist() == sorted(mask[0].tolist(), reverse=True)
    assert mask.sum() == len(encoder.tokenizer.encode("red <pad> circle", 24).ids)


@pytest.mark.parametrize("source", ["stored", "cast"])
def test_float16_keeps_wo_in_float32(tmp_path, source):
    path = FILES["folder"]
    if source == "cast":
        weights = {k: v.float() for k, v in load_file(path / "model.safetensors").items()}
        save_file(weights, tmp_path / "t5.safetensors")
        path = tmp_path / "t5.safetensors"
    encoder = T5TextEncoder.from_path(path, None if source == "stored" else torch.float16,
                                      tokenizer=FILES["folder"])
    for name, parameter in encoder.model.named_parameters():
        wide = name.endswith(".wo.weight")
        assert parameter.dtype == (torch.float32 if wide else torch.float16), name
    assert encoder.dtype == torch.float16
    embeds, _ = encoder(PROMPTS[:1], 24)
    assert embeds.dtype == torch.float16
    exact, _ = T5TextEncoder.from_path(FILES["folder"], torch.float32)(PROMPTS[:1], 24)
    assert relative(embeds, exact) < 2e-3


def test_float16_survives_activations_that_overflow_without_it(tmp_path):
    """What wo in float32 is for: T5 XXL's middle activations pass 65504."""
    weights = load_file(FILES["folder"] / "model.safetensors")
    name = "encoder.block.0.layer.1.DenseReluDense.{}.weight"
    weights[name.format("wi_1")] *= 100
    weights[name.format("wo")] *= 100
    save_file(weights, tmp_path / "t5.safetensors")
    exact, half = (T5TextEncoder.from_path(tmp_path / "t5.safetensors", dtype,
                                           tokenizer=FILES["folder"])(PROMPTS[:1], 24)[0]
                   for dtype in (torch.float32, torch.float16))
    assert half.isfinite().all()
    assert relative(half, exact) < 0.01


def test_bfloat16(encoder):
    half = T5TextEncoder.from_path(FILES["single"], torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert relative(half(PROMPTS[:1], 24)[0], encoder(PROMPTS[:1], 24)[0]) < 0.03


@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_files_are_close(encoder, tmp_path, scaled):
    tensors = {}
    for name, tensor in load_file(FILES["single"]).items():
        if tensor.ndim == 2 and "block" in name and "bias" not in name:
            scale = tensor.float().abs().amax() / 448 if scaled else torch.ones(())
            tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            if scaled:
                tensors[name.replace(".weight", ".scale_weight")] = scale
        else:
            tensors[name] = tensor
    save_file(tensors, tmp_path / "t5_fp8.safetensors")
    rounded = T5TextEncoder.from_path(tmp_path / "t5_fp8.safetensors", torch.float32)
    error = relative(rounded(PROMPTS[:1], 24)[0], encoder(PROMPTS[:1], 24)[0])
    assert 1e-4 < error < 0.1
    assert T5TextEncoder.from_path(tmp_path / "t5_fp8.safetensors").dtype == torch.bfloat16


def test_weights_are_taken_without_a_copy():
    """T5 XXL is 9.5 GB: the model must hold the very tensors that were read, and one embedding."""
    from pixart_core.text.encoder import build_encoder
    from pixart_core.text.t5_file import read_t5

    file = read_t5(FILES["folder"], torch.bfloat16)
    model = build_encoder(file)
    read = {tensor.data_ptr() for tensor in file.state_dict.values()}
    assert {p.data_ptr() for p in model.parameters()} == read
    assert model.encoder.get_input_embeddings() is model.shared
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_long_prompts_warn_with_the_words_that_are_cut(encoder, caplog):
    long = "a red circle " * 20 + "with a golden crown"
    with caplog.at_level(logging.WARNING, logger="pixart_core"):
        _, mask = encoder(["a red circle", long], 24)
    assert mask[1].all()
    (record,) = caplog.records
    assert "prompt 1" in record.getMessage() and "PixArt reads 24" in record.getMessage()
    assert "golden crown" in record.getMessage()


def test_ten_thousand_words(encoder):
    embeds, mask = encoder("red circle " * 5000, 300)
    assert embeds.isfinite().all() and mask.all()


@pytest.mark.parametrize(("prompts", "error", "said"), [
    ([], ValueError, "no prompts"),
    (None, TypeError, "prompts is a NoneType"),
    (["a", None], TypeError, "prompt 1 is a NoneType"),
    (b"a", TypeError, "prompt 0 is a int"),
])
def test_wrong_prompts(encoder, prompts, error, said):
    with pytest.raises(error, match=said):
        encoder(prompts, 24)


def test_tokenizer_can_be_given_in_four_ways(tmp_path):
    weights = load_file(FILES["folder"] / "model.safetensors")
    save_file(weights, tmp_path / "t5.safetensors")
    spiece = FILES["folder"] / "spiece.model"
    for tokenizer in (spiece, str(spiece), FILES["folder"], CaptionTokenizer.from_path(spiece)):
        encoder = T5TextEncoder.from_path(tmp_path / "t5.safetensors", tokenizer=tokenizer)
        assert encoder("red", 24)[1].sum() > 1
    with pytest.raises(ValueError, match="three ways"):
        T5TextEncoder.from_path(tmp_path / "t5.safetensors")


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path):
    weights = load_file(FILES["folder"] / "model.safetensors")
    weights["shared.weight"] = weights["shared.weight"][:200].clone()
    save_file(weights, tmp_path / "t5.safetensors")
    with pytest.raises(ValueError, match="has 256 tokens and the T5 encoder 200"):
        T5TextEncoder.from_path(tmp_path / "t5.safetensors", tokenizer=FILES["folder"])


def test_wrong_dtype():
    with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
        T5TextEncoder.from_path(FILES["folder"], dtype=torch.int8)


def test_sizes_dtype_and_device(encoder):
    assert encoder.caption_channels == 128
    assert (encoder.dtype, encoder.device) == (torch.float32, torch.device("cpu"))
    assert encoder.to("cpu") is encoder


def test_importing_the_package_loads_no_heavy_module():
    """`import pixart_core.text` is part of every start of the host."""
    code = ("import sys, pixart_core.text as t; t.read_t5, t.clean_caption, t.CaptionTokenizer; "
            "print([m for m in ('transformers', 'bs4', 'ftfy', 'sentencepiece', 'tokenizers')"
            " if m in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            check=True, cwd=STARTER.parent)
    assert result.stdout.strip() == "[]"
