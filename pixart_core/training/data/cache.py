"""Encoding a folder of images into a cache, and going on with one."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoint.header import CheckpointError
from ...checkpoint.write import write_checkpoint
from ...text.encoder import T5TextEncoder
from ...vae import VAE
from .encode import CaptionEncoder, encode_pictures, find_edges, in_order
from .images import load_hint, load_picture
from .index import NULL_NAME, CacheIndex
from .plan import Plan, PlannedRow, plan_cache
from .problems import Problems
from .settings import DTYPES, CacheSettings
from .shard import EncodedCaption, ShardRow, Source, states_digest, write_shard

logger = logging.getLogger(__name__)

# progress("captions" | "images", done, total)
Progress = Callable[[str, int, int], None]

_GROUP_BYTES = 1 << 31  # of captions in memory while T5 and VAE take turns
_SPARE_BYTES = 1 << 20


@dataclass
class CacheReport:
    """What a run did.

    `rows` are those of the cache, `added` of this run, `kept` of earlier ones, `dropped` those
    whose image was changed or removed; `left_out` names what could not be used. `grown` pictures
    were smaller than their bucket, `too_small` ones were left out for it. `captions` is what T5
    read, `cut` how many of those were longer than `max_tokens`.
    """

    rows: int = 0
    added: int = 0
    kept: int = 0
    dropped: int = 0
    grown: int = 0
    too_small: int = 0
    captions: int = 0
    cut: int = 0
    bytes: int = 0
    caption_seconds: float = 0.0
    image_seconds: float = 0.0
    buckets: dict[tuple[int, int], int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def build_cache(
    folder: str | Path,
    out: str | Path,
    settings: CacheSettings,
    encoder: T5TextEncoder | Callable[[], T5TextEncoder],
    vae: VAE | Callable[[], VAE],
    detector: nn.Module | Callable[[], nn.Module] | None = None,
    progress: Progress | None = None,
) -> CacheReport:
    """Encode the images of `folder` into the cache `out`, or what a cache there still lacks.

    The encoders may be functions that load them; they are called when there is something to
    encode. A shard appears when it is whole and counts when the index names it, so a run can be
    ended at any time and started again. Shards that are damaged are made again, and rows whose
    image or captions have changed.

    Raises ValueError for a folder, settings or encoders that do not fit, before anything is
    encoded; where single pictures turn out to be damaged, after all others are done. Raises
    CheckpointError where nothing can be written.
    """
    if settings.control == "hed" and detector is None:
        raise ValueError("control is hed, but no HED detector was given")
    with plan_cache(Path(folder), Path(out), settings) as plan:
        run = _Run(plan, settings, encoder, vae, detector, progress)
        run.encode()
        return run.finish()


class _Run:
    """The state of one call of `build_cache`."""

    def __init__(self, plan: Plan, settings: CacheSettings, encoder: object, vae: object,
                 detector: object, progress: Progress | None) -> None:
        self.plan, self.settings, self.progress = plan, settings, progress
        self.report = CacheReport(kept=plan.kept, dropped=plan.dropped, grown=plan.grown,
                                  too_small=len(plan.too_small))
        self.problems = Problems()
        self.dtype = DTYPES[settings.dtype]
        self._encoder, self._vae, self._detector = encoder, vae, detector
        self._loaded: dict[str, object] = {}
        self._captions: CaptionEncoder | None = None

    def encode(self) -> None:
        """Everything that is pending, group by group."""
        if not self.plan.pending and self.plan.index is not None and self.plan.null_is_sound:
            return
        index = self._open_index()
        done = 0
        for group in self._groups():
            texts = [text for rows in group for row in rows for text in row.row.captions]
            self._turn("encoder")
            started = time.perf_counter()
            states = self._captions(texts, self._told("captions"))
            self.report.caption_seconds += time.perf_counter() - started
            self._turn("vae")
            for rows in group:
                started = time.perf_counter()
                self._shard(index, rows, states, done)
                self.report.image_seconds += time.perf_counter() - started
                done += len(rows)

    def finish(self) -> CacheReport:
        """The report; ValueError where pictures were damaged and `skip_bad` is off."""
        report, plan, settings = self.report, self.plan, self.settings
        index = plan.index
        if self._captions is not None:
            report.captions, report.cut = self._captions.encoded, self._captions.cut
        report.rows = index.rows
        report.bytes = sum(shard.bytes for shard in index.shards)
        for shard in index.shards:
            size = (shard.height, shard.width)
            report.buckets[size] = report.buckets.get(size, 0) + shard.rows - len(shard.skip)
        report.left_out = [*plan.problems.lines, *plan.too_small, *self.problems.lines]
        if report.cut:
            logger.warning("%d captions are longer than %d tokens and were cut", report.cut,
                           settings.tokens)
        self.problems.settle(
            plan.folder, settings.skip_bad,
            f"All other rows are in the cache ({report.rows}); mend or remove these files and run "
            "the same command again, or go on without them with --skip-bad")
        return report

    def _open_index(self) -> CacheIndex:
        """The index, with the null caption beside it, made where they are missing."""
        plan, settings = self.plan, self.settings
        self._turn("encoder")
        encoder = self._module("encoder")
        facts = settings.facts(encoder.caption_channels)
        if plan.index is not None:
            plan.refuse_other_facts(plan.index, facts)
        self._captions = CaptionEncoder(encoder, settings.tokens, settings.clean_caption,
                                        self.dtype)
        if plan.index is None or not plan.null_is_sound:
            null = self._captions([""])[""]
            write_checkpoint(plan.out / NULL_NAME, {"caption": null}, {})
            shards = [] if plan.index is None else plan.index.shards
            number = 0 if plan.index is None else plan.index.next_number
            plan.index = CacheIndex(facts, states_digest(null), shards, number)
            plan.index.write(plan.out)
        self._captions.encoded = 0
        return plan.index

    def _groups(self) -> Iterator[list[list[PlannedRow]]]:
        """Shards to write, one at a time, or many where T5 has to leave for the VAE."""
        group: list[list[PlannedRow]] = []
        total = 0
        for rows, size in self._shards():
            group.append(rows)
            total += size
            if not self.settings.low_memory or total >= _GROUP_BYTES:
                yield group
                group, total = [], 0
        if group:
            yield group

    def _shards(self) -> Iterator[tuple[list[PlannedRow], int]]:
        """Pending rows of one bucket, and the bytes of their captions."""
        settings = self.settings
        rows: list[PlannedRow] = []
        texts: set[str] = set()
        total = 0
        for row in self.plan.pending:
            pixels = 4 * row.height * row.width // 64
            size = pixels * self.dtype.itemsize * (1 if settings.control == "none" else 2)
            new = [text for text in row.row.captions if text not in texts]
            size += sum(map(self._captions.bytes, new))
            other = rows and (row.height, row.width) != (rows[0].height, rows[0].width)
            if other or len(rows) == settings.shard_rows or (
                    rows and total + size > settings.shard_bytes):
                yield rows, total
                rows, texts, total = [], set(), 0
            rows.append(row)
            texts.update(row.row.captions)
            total += size
        if rows:
            yield rows, total

    def _shard(self, index: CacheIndex, planned: Sequence[PlannedRow], states: dict[str, Tensor],
               before: int) -> None:
        """Encode the pictures of a shard and write it; on Ctrl-C, as far as it is."""
        texts = list(dict.fromkeys(text for row in planned for text in row.row.captions))
        numbers = {text: number for number, text in enumerate(texts)}
        rows: list[ShardRow] = []
        stopped: BaseException | None = None
        try:
            for done, row in self._encoded(planned, numbers):
                rows += row
                self._tell("images", before + done, len(self.plan.pending))
        except KeyboardInterrupt as interrupt:
            stopped = interrupt
        if rows:
            captions = [EncodedCaption(text, states[text]) for text in texts]
            self._write(index, rows, captions, planned[0])
        if stopped is not None:
            raise stopped

    def _encoded(self, planned: Sequence[PlannedRow], numbers: dict[str, int]
                 ) -> Iterator[tuple[int, list[ShardRow]]]:
        """Rows, a batch at a time, and how many are through; damaged pictures are left out."""
        settings, vae = self.settings, self._module("vae")
        batch: list[_Picture] = []
        with ThreadPoolExecutor(settings.workers) as pool:
            ahead = 2 * settings.batch_size
            loaded = in_order(pool, self._load, planned, ahead)
            for done, picture in enumerate(loaded, 1):
                if isinstance(picture, ValueError):
                    self.problems.add(str(picture))
                else:
                    batch.append(picture)
                if len(batch) < settings.batch_size and done < len(planned):
                    continue
                if batch:
                    yield done, self._rows(vae, batch, numbers)
                    batch = []

    def _rows(self, vae: VAE, batch: Sequence[_Picture], numbers: dict[str, int]
              ) -> list[ShardRow]:
        latents = encode_pictures(vae, [picture.pixels for picture in batch], self.dtype)
        controls: Sequence[Tensor | None] = [None] * len(batch)
        if self.settings.control == "hed":
            edges = find_edges(self._module("detector"), [picture.pixels for picture in batch])
            controls = encode_pictures(vae, edges, self.dtype)
        elif self.settings.control == "folder":
            controls = encode_pictures(vae, [picture.hint for picture in batch], self.dtype)
        return [ShardRow(picture.source, latent, control,
                         tuple(numbers[text] for text in picture.source.captions))
                for picture, latent, control in zip(batch, latents, controls, strict=True)]

    def _load(self, planned: PlannedRow) -> _Picture | ValueError:
        try:
            source = planned.source(self.plan.folder)
            size = (planned.height, planned.width)
            pixels = load_picture(self.plan.folder / planned.row.path, *size)
            hint = None
            if self.settings.control == "folder":
                hint = load_hint(self.plan.folder / planned.row.control, *size)
            return _Picture(source, pixels, hint)
        except ValueError as error:
            return error
        except OSError as error:
            return ValueError(f"{self.plan.folder / planned.row.path} cannot be read: {error}")

    def _write(self, index: CacheIndex, rows: Sequence[ShardRow],
               captions: Sequence[EncodedCaption], bucket: PlannedRow) -> None:
        out = self.plan.out
        used = sorted({number for row in rows for number in row.captions})
        place = {number: new for new, number in enumerate(used)}
        rows = [ShardRow(row.source, row.latents, row.control,
                         tuple(place[number] for number in row.captions)) for row in rows]
        captions = [captions[number] for number in used]
        needed = _SPARE_BYTES + sum(c.states.nbytes for c in captions) + sum(
            row.latents.nbytes * (1 if row.control is None else 2) for row in rows)
        try:
            if shutil.disk_usage(out).free < needed:
                raise _disk_full(out, needed)
            entry = write_shard(out / index.shard_name(), rows, captions, bucket.height,
                                bucket.width)
            index.shards.append(entry)
            index.next_number += 1
            index.write(out)
        except CheckpointError as error:
            if "o space left" in str(error):
                raise _disk_full(out, needed) from error
            raise
        self.report.added += len(rows)

    def _module(self, name: str) -> object:
        """An encoder, loaded when it is first asked for."""
        if name not in self._loaded:
            given = getattr(self, f"_{name}")
            ready = isinstance(given, T5TextEncoder | VAE | nn.Module)
            module = self._loaded[name] = given if ready else given()
            if isinstance(module, VAE) and not ready and self._on_cpu():
                module.network.to(memory_format=torch.channels_last)
        return self._loaded[name]

    def _on_cpu(self) -> bool:
        """Whether the VAE, now that it is loaded, works there: channels_last is a third faster."""
        return torch.device(self.settings.device or self._loaded["vae"].device).type == "cpu"

    def _turn(self, name: str) -> None:
        """Put T5, or VAE and edge detector, on the device; with low memory the others leave it."""
        device = self.settings.device
        works = [name] if name == "encoder" or self.settings.control != "hed" else [name,
                                                                                    "detector"]
        if self.settings.low_memory:
            for other, module in self._loaded.items():
                if other not in works:
                    module.to("cpu")
        for own in works:
            module = self._module(own)
            if device is not None:
                module.to(device)

    def _told(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self._tell(stage, done, total)

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)


@dataclass(frozen=True)
class _Picture:
    source: Source
    pixels: Tensor
    hint: Tensor | None


def _disk_full(out: Path, needed: int) -> CheckpointError:
    free = shutil.disk_usage(out).free
    return CheckpointError(f"the disk of {out} is full: the next shard takes about "
                           f"{needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free; make room "
                           "and run the same command again, it goes on where it stopped")
