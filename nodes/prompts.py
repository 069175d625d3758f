"""CONDITIONING of several prompts, one for each picture of a batch."""

from __future__ import annotations

from comfy_api.latest import io

from .conditioning import host_prompt, token_limit
from .host.clip import encode, report_tokens
from .host.conds import join_captions
from .host.schema import CATEGORY, advanced, schema


class PixArtPromptBatch(io.ComfyNode):
    """One prompt a line: prompt i draws picture i of the latent batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PixArtPromptBatch",
            display_name="PixArt Prompt Batch",
            category=f"{CATEGORY}/conditioning",
            description="Encodes one prompt a line for a batch of as many pictures: the first "
                        "line draws the first picture, and so on, all in one run.",
            search_aliases=["prompt list", "batch prompts", "multiple prompts", "prompt schedule"],
            inputs=[
                io.Clip.Input("clip", tooltip="A T5 from PixArt T5 Loader or CLIPLoader "
                                              '(type "pixart").'),
                io.String.Input("prompts", multiline=True, dynamic_prompts=True,
                                placeholder="one prompt a line",
                                tooltip="One prompt a line; blank lines are left out."),
                io.Boolean.Input("clean_caption", default=True,
                                 tooltip="Lower-case the text and strip links, HTML and odd "
                                         "symbols, as in training."),
                io.Int.Input("max_tokens", default=300, min=1, max=300,
                             tooltip="Tokens beyond this are cut: 300 for Sigma, 120 for alpha "
                                     "and delta."),
                io.Model.Input("model", optional=True,
                               tooltip="Connect it and the limit is that of the model."),
                advanced(io.Boolean.Input, "weights", default=True,
                         tooltip="(word:1.2) strengthens a word, (word:0.8) weakens it, (word) is "
                                 r"1.1. Off, or as \( and \), brackets are text."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning",
                                       tooltip="Positive or negative input of a sampler, for "
                                               "models from PixArt Model Loader."),
                io.Int.Output(display_name="count",
                              tooltip="The number of prompts: the batch_size of the latent."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip, prompts, clean_caption=True, max_tokens=300, model=None,
                weights=True) -> io.NodeOutput:
        lines = [line for line in prompts.splitlines() if line.strip()]
        if not lines:
            raise ValueError("there is no prompt: write one prompt a line; for pictures without a "
                             "prompt use PixArt Text Encode with an empty text")
        limit = token_limit(max_tokens, model)
        encoded = [encode(clip, host_prompt(line, clean_caption, weights), limit, {})
                   for line in lines]
        reports = [str(report) for _, report in encoded]
        text = "\n".join(f"{i}: {report}" for i, report in enumerate(reports, 1))
        report_tokens(text, cls.hidden.unique_id)
        return io.NodeOutput(join_captions([conditioning for conditioning, _ in encoded]),
                             len(lines), ui={"text": [text]})
