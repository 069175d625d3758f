"""CONDITIONING from text, and the learned null caption."""

from __future__ import annotations

import comfy.model_management
from comfy_api.latest import io

from ..pixart_core.text.caption import clean_caption as clean
from ..pixart_core.text.weights import prompt_pieces, render
from .host.clip import encode, report_tokens
from .host.model import null_caption, pixart_config
from .host.schema import CATEGORY, advanced, schema

MAX_SIDE = 16384


def host_prompt(text: str, clean_caption: bool, weights: bool) -> str:
    """The prompt as the host's tokenizer takes it: cleaned piece by piece, weights kept."""
    return render(prompt_pieces(text, clean if clean_caption else None, weights))


def token_limit(max_tokens: int, model: object | None) -> int:
    """`max_tokens`, or the limit of `model` where that is a PixArt and lower."""
    config = pixart_config(model) if model is not None else None
    return max_tokens if config is None else min(max_tokens, config.max_tokens)


class PixArtTextEncode(io.ComfyNode):
    """Text as PixArt was trained on it: cleaned, cut at the token limit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PixArtTextEncode",
            display_name="PixArt Text Encode",
            category=f"{CATEGORY}/conditioning",
            description="Encodes a prompt the way PixArt was trained: cleaned, and cut at the "
                        "model's token limit. The node shows how many tokens the prompt takes.",
            search_aliases=["prompt", "text encode", "clip text encode", "t5 encode"],
            inputs=[
                io.Clip.Input("clip", tooltip="A T5 from PixArt T5 Loader or CLIPLoader "
                                              '(type "pixart").'),
                io.String.Input("text", multiline=True, dynamic_prompts=True,
                                placeholder="a prompt, or nothing for no negative",
                                tooltip="The prompt. Long descriptions are welcome."),
                io.Boolean.Input("clean_caption", default=True,
                                 tooltip="Lower-case the text and strip links, HTML and odd "
                                         "symbols, as in training."),
                io.Int.Input("max_tokens", default=300, min=1, max=300,
                             tooltip="Tokens beyond this are cut: 300 for Sigma, 120 for alpha "
                                     "and delta."),
                io.Model.Input("model", optional=True,
                               tooltip="Connect it and the limit is that of the model."),
                advanced(io.Int.Input, "width", default=0, min=0, max=MAX_SIDE, step=8,
                         tooltip="Width in pixels that alpha-1024 and delta are conditioned on; "
                                 "0 takes it from the latent. Other models ignore it."),
                advanced(io.Int.Input, "height", default=0, min=0, max=MAX_SIDE, step=8,
                         tooltip="Height in pixels that alpha-1024 and delta are conditioned on; "
                                 "0 takes it from the latent. Other models ignore it."),
                advanced(io.Float.Input, "aspect_ratio", default=0.0, min=0.0, max=16.0, step=0.01,
                         tooltip="Height over width that alpha-1024 and delta are conditioned on; "
                                 "0 takes it from the size. Other models ignore it."),
                advanced(io.Boolean.Input, "weights", default=True,
                         tooltip="(word:1.2) strengthens a word, (word:0.8) weakens it, (word) is "
                                 r"1.1. Off, or as \( and \), brackets are text."),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning",
                                            tooltip="Positive or negative input of a sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip, text, clean_caption=True, max_tokens=300, model=None, width=0, height=0,
                aspect_ratio=0.0, weights=True) -> io.NodeOutput:
        if bool(width) != bool(height):
            raise ValueError(f"width is {width} and height is {height}: give both, or 0 for both "
                             "to take them from the latent")
        size = {"width": width, "height": height} if width else {}
        if aspect_ratio:
            size["aspect_ratio"] = aspect_ratio
        text = host_prompt(text, clean_caption, weights)
        conditioning, report = encode(clip, text, token_limit(max_tokens, model), size)
        report_tokens(report, cls.hidden.unique_id)
        return io.NodeOutput(conditioning, ui={"text": [str(report)]})


class PixArtNullCaption(io.ComfyNode):
    """The learned "no caption" of the weights, as the original scripts use it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PixArtNullCaption",
            display_name="PixArt Null Caption",
            category=f"{CATEGORY}/conditioning",
            description="The null caption learned in training, for the negative input: what the "
                        "original PixArt-alpha scripts use in place of an empty prompt.",
            search_aliases=["unconditional", "empty prompt", "negative", "y_embedding"],
            inputs=[
                io.Model.Input("model", tooltip="A PixArt model whose file holds the null caption "
                                                "(original and ComfyUI files do, diffusers files "
                                                "do not)."),
                io.Conditioning.Input("positive", optional=True,
                                      tooltip="Cuts the null caption to the length of this prompt, "
                                              "as the original scripts do."),
            ],
            outputs=[io.Conditioning.Output(display_name="negative",
                                            tooltip="Negative input of a sampler.")],
        )

    @classmethod
    def execute(cls, model, positive=None) -> io.NodeOutput:
        states = null_caption(model).to(comfy.model_management.intermediate_device())
        if positive:
            states = states[: positive[0][0].shape[1]]
        return io.NodeOutput([[states[None].clone(), {"pooled_output": None}]])

