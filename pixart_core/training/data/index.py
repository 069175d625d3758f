"""The index of a cache: what it was made with, and which shards it consists of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...checkpoint.header import CheckpointError
from ...config import Variant
from ...whole import whole_file

FORMAT = 1
INDEX_NAME = "index.json"
NULL_NAME = "null.safetensors"
CONTROLS = ("none", "hed", "folder")

ControlKind = Literal["none", "hed", "folder"]


@dataclass(frozen=True)
class CacheFacts:
    """What every row of a cache was made with; rows made otherwise need another cache.

    Attributes:
        variant, latent_scale: whose latents these are, and the factor from the VAE's own.
        image_size: of the buckets, in pixels.
        buckets: (height, width) in pixels of every bucket that pictures may go to.
        caption_channels, max_tokens: width of the T5 states and the tokens of a caption at most.
        clean_caption: whether captions were cleaned before T5 read them.
        dtype: what the numbers are stored in.
        control: how control images came about.
        max_upscale: how much smaller than its bucket a picture may be; None for any.
        vae_sha256, t5_sha256, hed_sha256: of the files; None where none was named.
    """

    variant: Variant
    latent_scale: float
    image_size: int
    buckets: tuple[tuple[int, int], ...]
    caption_channels: int
    max_tokens: int
    clean_caption: bool
    dtype: str
    control: ControlKind
    max_upscale: float | None = None
    vae_sha256: str | None = None
    t5_sha256: str | None = None
    hed_sha256: str | None = None

    def differences(self, other: CacheFacts) -> list[str]:
        """What differs, each as "NAME is OURS, now THEIRS"."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        if mine["image_size"] != theirs["image_size"]:
            del mine["buckets"]
        return [f"{name} is {_short(mine[name])}, now {_short(theirs[name])}"
                for name in mine if mine[name] != theirs[name]]


@dataclass(frozen=True)
class ShardEntry:
    """A shard: rows of one bucket in one file.

    `digest` is of the tables through which every row is found and checked, `sources_digest` of
    the list of images. `skip` are rows that no longer count: their image was changed or removed.
    """

    file: str
    rows: int
    height: int
    width: int
    bytes: int
    digest: str
    sources_digest: str
    skip: tuple[int, ...] = ()


@dataclass
class CacheIndex:
    """Facts and shards. `next_number` is that of the next shard; numbers are not used twice."""

    facts: CacheFacts
    null_digest: str
    shards: list[ShardEntry] = field(default_factory=list)
    next_number: int = 0

    @property
    def rows(self) -> int:
        """Rows that count."""
        return sum(shard.rows - len(shard.skip) for shard in self.shards)

    def shard_name(self) -> str:
        return f"shard-{self.next_number:05d}.safetensors"

    def write(self, folder: Path) -> None:
        """Write index.json, whole or not at all. Raises CheckpointError where that fails."""
        target = folder / INDEX_NAME
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        try:
            with whole_file(target) as temporary:
                temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{target} could not be written: {error}") from error


def read_index(folder: Path) -> CacheIndex:
    """The index of a cache. Raises CheckpointError where there is none, or a damaged one."""
    path = folder / INDEX_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a training cache ({INDEX_NAME} is missing); make "
                              "one with `pixart train cache IMAGES OUT`")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format"]
        if found != FORMAT:
            raise CheckpointError(f"{path} has format {found!r} and this version reads {FORMAT}; "
                                  "make the cache again with `pixart train cache`")
        facts = dict(content["facts"])
        facts["buckets"] = tuple((int(h), int(w)) for h, w in facts["buckets"])
        shards = [_entry(shard) for shard in content["shards"]]
        return CacheIndex(CacheFacts(**facts), str(content["null_digest"]), shards,
                          int(content["next_number"]))
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); put it back "
                              "from a copy, or delete the folder and make the cache again with "
                              "`pixart train cache`") from error


def _entry(shard: Mapping[str, Any]) -> ShardEntry:
    fields = {**shard, "skip": tuple(int(row) for row in shard["skip"])}
    entry = ShardEntry(**fields)
    if (Path(entry.file).name != entry.file or entry.rows < 1
            or not all(0 <= row < entry.rows for row in entry.skip)):
        raise ValueError(f"shard {entry.file!r} cannot be")
    return entry


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
