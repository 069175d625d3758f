"""Nodes that take time, fail or count: for the harness's own tests."""

import time

import comfy.model_management
import comfy.utils
from PIL import Image
from server import PromptServer

from .common import ANY, CATEGORY, report


class ProbeSleep:
    """Takes `steps` steps of `seconds` each, with progress, previews and progress text; can be
    interrupted between steps."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"steps": ("INT", {"default": 2, "min": 1, "max": 10000}),
                             "seconds": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 10.0}),
                             "text": ("STRING", {"default": ""})},
                "hidden": {"node_id": "UNIQUE_ID"}}

    RETURN_TYPES = ("STRING",)
    OUTPUT_NODE = True
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, steps, seconds, text, node_id):
        bar = comfy.utils.ProgressBar(steps)
        for i in range(steps):
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(seconds)
            picture = Image.new("RGB", (8, 8), (i % 256, 0, 0))
            bar.update_absolute(i + 1, steps, ("JPEG", picture, 8))
        PromptServer.instance.send_progress_text(text, node_id)
        return {**report({"slept": steps * seconds}), "result": (text,)}


class ProbeFail:
    """Raises ValueError with the message it is given."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"message": ("STRING", {"default": "as asked"})},
                "optional": {"after": (ANY,)}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "run"
    CATEGORY = CATEGORY

    def run(self, message, after=None):
        raise ValueError(message)


NODES = (ProbeSleep, ProbeFail)
