"""What is to be encoded: the rows of a folder that a cache does not hold yet."""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ...checkpoint.header import CheckpointError
from .buckets import nearest_bucket
from .images import ImageRow, picture_size, read_folder
from .index import INDEX_NAME, NULL_NAME, CacheFacts, CacheIndex, ShardEntry, read_index
from .problems import Problems
from .samples import read_null
from .settings import CacheSettings
from .shard import ShardReader, Source

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_CHUNK = 1 << 20
_SKEW = 1.02  # control and picture may differ this much in shape: a pixel or two of rounding


@dataclass(frozen=True)
class PlannedRow:
    """A row to encode, and the bucket it goes to."""

    row: ImageRow
    height: int
    width: int

    def source(self, folder: Path) -> Source:
        """What the row is made of, with the sums of its files."""
        path, control = self.row.path, self.row.control
        found = (folder / path).stat()
        own = None
        if control is not None:
            stat = (folder / control).stat()
            own = (control, stat.st_size, stat.st_mtime_ns, file_sum(folder / control))
        return Source(path, found.st_size, found.st_mtime_ns, file_sum(folder / path),
                      self.row.captions, own)


@dataclass
class Plan:
    """`index` is that of the cache so far, None for a new one; `pending` comes bucket by bucket."""

    folder: Path
    out: Path
    index: CacheIndex | None
    null_is_sound: bool
    pending: list[PlannedRow] = field(default_factory=list)
    kept: int = 0
    dropped: int = 0
    grown: int = 0
    too_small: list[str] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)

    def refuse_other_facts(self, index: CacheIndex, facts: CacheFacts) -> None:
        """Raise ValueError where the cache was made with something else."""
        differences = index.facts.differences(facts)
        if differences:
            raise ValueError(f"the cache {self.out} was made with other settings: "
                             f"{'; '.join(differences)}. Use them again, or another folder")


@contextmanager
def plan_cache(folder: Path, out: Path, settings: CacheSettings) -> Iterator[Plan]:
    """Look through `folder` and the cache `out`, which is locked as long as the plan is used.

    Raises ValueError for an unusable folder or other settings, and CheckpointError where the
    cache cannot be read or written.
    """
    problems = Problems()
    rows = read_folder(folder, problems, settings.control == "folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"the folder {out} cannot be made: {error}") from error
    with _locked(out):
        plan = _open(folder, out, settings)
        plan.problems = problems
        known = _known(plan, settings) if plan.index is not None else {}
        _sort_out(plan, rows, known, settings)
        problems.settle(folder, settings.skip_bad,
                        "Mend these, or go on without them with --skip-bad")
        if plan.too_small:
            logger.warning("%d pictures would grow by more than %g times and are left out",
                           len(plan.too_small), settings.max_upscale)
        if plan.grown:
            logger.warning("%d pictures are smaller than what they are trained at and are "
                           "enlarged; max_upscale leaves such pictures out", plan.grown)
        if not plan.pending and not plan.kept:
            raise ValueError(f"nothing in {folder} can be used")
        if plan.index is not None:
            plan.index.write(out)
            _sweep(out, plan.index)
        yield plan


def _open(folder: Path, out: Path, settings: CacheSettings) -> Plan:
    if not (out / INDEX_NAME).exists():
        foreign = [path.name for path in out.iterdir()
                   if not path.name.startswith(".") and path.name != NULL_NAME]
        if foreign:
            raise ValueError(f"{out} holds {foreign[0]} and no cache; name an empty folder or one "
                             "that does not exist")
        return Plan(folder, out, None, False)
    index = read_index(out)
    try:
        read_null(out / NULL_NAME, index.null_digest)
        sound = True
    except CheckpointError as error:
        logger.warning("%s", error)
        sound = False
    plan = Plan(folder, out, index, sound)
    plan.refuse_other_facts(index, settings.facts(index.facts.caption_channels))
    return plan


def _known(plan: Plan, settings: CacheSettings) -> dict[str, list[tuple[ShardEntry, int, Source]]]:
    """Rows of sound shards by the path of their image; other shards are taken off the index."""
    known: dict[str, list[tuple[ShardEntry, int, Source]]] = {}
    sound = []
    for entry in plan.index.shards:
        try:
            reader = ShardReader(plan.out, entry)
            try:
                if settings.verify:
                    reader.check()
                sources = reader.sources()
            finally:
                reader.close()
        except CheckpointError as error:
            logger.warning("%s: it is made again now", str(error).partition("; run `pixart")[0])
            continue
        sound.append(entry)
        for row, source in enumerate(sources):
            known.setdefault(source.path, []).append((entry, row, source))
    plan.index.shards = sound
    return known


def _sort_out(plan: Plan, rows: list[ImageRow],
              known: dict[str, list[tuple[ShardEntry, int, Source]]],
              settings: CacheSettings) -> None:
    """Split rows into those that the cache has and those that are to be encoded."""
    used: dict[str, set[int]] = {}
    table = settings.bins()
    for row in rows:
        try:
            found = next(((entry, number) for entry, number, source in known.get(row.path, ())
                          if _is_same(plan.folder, row, source)), None)
            if found is not None:
                used.setdefault(found[0].file, set()).add(found[1])
                continue
            height, width = picture_size(plan.folder / row.path)
            if row.control is not None:
                _check_shape(plan.folder, row, height, width)
        except ValueError as error:
            plan.problems.add(str(error))
            continue
        bucket = nearest_bucket(table, height, width)
        factor = max(bucket[0] / height, bucket[1] / width)
        if settings.max_upscale is not None and factor > settings.max_upscale:
            plan.too_small.append(f"{plan.folder / row.path} is {width} x {height} px and would "
                                  f"grow {factor:.2f} times")
            continue
        plan.grown += factor > 1
        plan.pending.append(PlannedRow(row, *bucket))
    plan.pending.sort(key=lambda planned: (planned.height, planned.width))  # stable: by path within
    if plan.index is None:
        return
    before = sum(entry.rows for entry in plan.index.shards)
    plan.kept = sum(map(len, used.values()))
    plan.dropped = plan.index.rows - plan.kept
    if before and not plan.kept:
        raise ValueError(f"the cache {plan.out} holds {before} rows, none of which comes from "
                         f"{plan.folder} as it is now; name the folder it was made from, or "
                         "another cache")
    plan.index.shards = [
        dataclasses.replace(entry, skip=tuple(sorted(set(range(entry.rows)) - used[entry.file])))
        for entry in plan.index.shards if entry.file in used]


def _is_same(folder: Path, row: ImageRow, source: Source) -> bool:
    """Whether a cached row was made of these very files and captions."""
    if source.captions != row.captions or (source.control is None) != (row.control is None):
        return False
    pairs = [(row.path, source[:4])]
    if row.control is not None:
        pairs.append((row.control, source.control))
    for path, (name, size, mtime, total) in pairs:
        try:
            found = (folder / path).stat()
        except OSError as error:
            raise ValueError(f"{folder / path} cannot be read: {error}") from error
        if name != path or found.st_size != size:
            return False
        # a copy of the folder has other times and the same bytes
        if found.st_mtime_ns != mtime and file_sum(folder / path) != total:
            return False
    return True


def _check_shape(folder: Path, row: ImageRow, height: int, width: int) -> None:
    rows, columns = picture_size(folder / row.control)
    skew = (rows * width) / (columns * height)
    if not 1 / _SKEW <= skew <= _SKEW:
        raise ValueError(f"{folder / row.control} is {columns} x {rows} px and its picture "
                         f"{row.path} {width} x {height}; they need the same shape")


def file_sum(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            total = zlib.crc32(chunk, total)
    return total


def _sweep(out: Path, index: CacheIndex) -> None:
    """Remove shards that the index no longer names, and what an ended run left half written."""
    named = {entry.file for entry in index.shards}
    for path in [*out.glob("shard-*.safetensors"), *out.glob(".*.part")]:
        if path.name not in named:
            path.unlink(missing_ok=True)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep a second run out of the folder; the system frees the lock when the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (out / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run writes to {out} now; wait until it is done") from error
        except OSError as error:
            logger.info("%s has no locks (%s)", out, error)
        yield
