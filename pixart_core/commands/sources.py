"""Which files a picture is drawn with, and whether they are the ones of another picture."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..checkpoint import sha256_file
from ..starter import find_starter
from .loras import ChosenLoRA, lora_files

if TYPE_CHECKING:
    from PIL.Image import Image

TILE = 1024  # pixels of the squares that edges of large pictures are found in


@dataclass(frozen=True)
class Sources:
    """Model files, and the picture to start from; `starter` where nobody named a model.

    `guidance` is what the transformer draws best with, where it is known.
    """

    transformer: Path
    t5: Path | None
    vae: Path | None
    tokenizer: Path | None
    image: Path | None
    starter: bool = False
    guidance: float | None = None
    controlnet: Path | None = None
    control_image: Path | None = None
    hed: Path | None = None
    loras: tuple[ChosenLoRA, ...] = ()
    embeddings: Path | None = None
    negative_embeddings: Path | None = None

    @property
    def text_encoder(self) -> bool:
        """Whether T5 is to be loaded: there is one, and something to encode."""
        if self.embeddings is None:
            return True
        known = self.t5 is not None or (self.transformer / "model_index.json").is_file()
        return known and self.negative_embeddings is None

    def open_image(self) -> Image | None:
        """The picture to start from; ValueError when it cannot be read as one."""
        return None if self.image is None else _open(self.image)

    def open_control_image(self) -> Image | None:
        """The control image: the edges of the picture where a HED file was named."""
        if self.control_image is None:
            return None
        picture = _open(self.control_image)
        return picture if self.hed is None else _edges(picture, self.hed)


def _open(path: Path) -> Image:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def _edges(picture: Image, hed: Path) -> Image:
    import numpy
    import torch
    from PIL import Image

    from ..model.hed import HEDDetector

    pixels = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        edges = HEDDetector.from_path(hed)(pixels, tile=TILE)[0, 0]
    return Image.fromarray((edges * 255).round().to(torch.uint8).numpy()).convert("RGB")


def with_control(sources: Sources, controlnet: Path | None, control_image: Path | None,
                 hed: Path | None) -> Sources:
    """`sources` with a ControlNet and what it looks at.

    Raises BadParameter when one is named without the other, ValueError for missing files.
    """
    for path in (controlnet, control_image, hed):
        if path is not None and not path.exists():
            raise ValueError(f"{path} does not exist")
    if (controlnet is None) != (control_image is None):
        raise typer.BadParameter("--controlnet and --control-image need each other")
    if hed is not None and control_image is None:
        raise typer.BadParameter("--hed needs --control-image, whose edges it finds")
    return dataclasses.replace(sources, controlnet=controlnet, control_image=control_image,
                               hed=hed)


def with_embeddings(sources: Sources, embeddings: Path | None,
                    negative_embeddings: Path | None) -> Sources:
    """`sources` with encoded prompts, and without the T5 that they leave nothing to do."""
    unused = embeddings is not None and negative_embeddings is not None
    return dataclasses.replace(
        sources, embeddings=embeddings, negative_embeddings=negative_embeddings,
        t5=None if unused else sources.t5, tokenizer=None if unused else sources.tokenizer)


def saved_prompt(embeddings: Path) -> str:
    """The prompt that a file of embeddings was made from, "" where it does not say.

    Raises CheckpointError for other files, ValueError for a file of several captions.
    """
    from ..text.embeddings import caption_rows, load_embeddings

    entries, info = load_embeddings(embeddings)
    count = len(caption_rows(entries, embeddings.name))
    if count != 1:
        raise ValueError(f"{embeddings.name} holds {count} captions, and this command draws one "
                         "picture; encode the prompts one by one, or load it in ComfyUI")
    prompt = info.get("prompt")
    return prompt if isinstance(prompt, str) else ""


def choose_files(model: Path | None, t5: Path | None, tokenizer: Path | None, vae: Path | None,
                 lcm: bool, image: Path | None, recorded: dict[str, Any]) -> Sources:
    """The files named, or the starter family's; `recorded` are the settings of --like.

    Raises BadParameter for options that do not go together, ValueError for missing files.
    """
    for path in (model, t5, tokenizer, vae, image):
        if path is not None and not path.exists():
            raise ValueError(f"{path} does not exist")
    if model is not None:
        if lcm:
            raise typer.BadParameter("--lcm is for the starter model; beside --model, choose the "
                                     "sampler with --sampler lcm")
        return Sources(model, t5, vae, tokenizer, image)
    if t5 or vae or tokenizer:
        raise typer.BadParameter("--t5, --vae and --tokenizer need --model")
    starter = find_starter()
    if starter is None:
        raise ValueError("no --model was given and the starter models are not in this "
                         "installation; name a transformer with --model, a T5 and a VAE")
    drawn_with = recorded.get("files", {}).get("transformer", {}).get("name")
    student = lcm or drawn_with == starter.lcm.name
    return Sources(starter.lcm if student else starter.transformer, starter.t5, starter.vae,
                   None, image, starter=True, guidance=None if student else starter.guidance)


def file_hashes(sources: Sources) -> dict[str, dict[str, str]]:
    """Name and SHA-256 of every file or folder, as a picture keeps them; no paths."""
    paths = {"transformer": sources.transformer, "t5": sources.t5, "vae": sources.vae,
             "tokenizer": sources.tokenizer, "image": sources.image,
             "controlnet": sources.controlnet, "control_image": sources.control_image,
             "hed": sources.hed, "embeddings": sources.embeddings,
             "negative_embeddings": sources.negative_embeddings,
             **lora_files([lora.path for lora in sources.loras])}
    return {part: {"name": path.name, "sha256": sha256_file(path)}
            for part, path in paths.items() if path is not None}


def compare_hashes(now: dict[str, dict[str, str]], then: Any, picture: Path) -> None:
    """Raise ValueError naming the first file that is not the one `picture` was drawn with."""
    if not isinstance(then, dict) or not all(
        isinstance(entry, dict) and {"name", "sha256"} <= entry.keys() for entry in then.values()
    ):
        raise ValueError(f"{picture.name} does not say which files it was drawn with; "
                         "--ignore-hashes draws with what is there")
    for part in sorted(now.keys() | then.keys()):
        if part not in now:
            raise ValueError(f"{picture.name} was drawn with the {part} {then[part]['name']}; name "
                             f"it with --{_option(part)}, or pass --ignore-hashes")
        if part not in then:
            raise ValueError(f"{picture.name} was drawn without {now[part]['name']}; leave out "
                             f"--{_option(part)}, or pass --ignore-hashes")
        if now[part]["sha256"] != then[part]["sha256"]:
            raise ValueError(f"{now[part]['name']} is not the {part} that {picture.name} was drawn "
                             f"with ({then[part]['name']}, SHA-256 {then[part]['sha256'][:12]}...);"
                             f" name that file with --{_option(part)}, or pass --ignore-hashes")


def _option(part: str) -> str:
    if part.startswith("lora_"):
        return "lora"
    return "model" if part == "transformer" else part.replace("_", "-")
