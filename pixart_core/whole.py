"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path, *, mode: int | None = None, sync: bool = True) -> Iterator[Path]:
    """A new empty file beside `path`, to be written, that takes its place when the block ends.

    When the block raises, what stood at `path` stays as it was and the new file is removed. It gets
    `mode`, by default that of any new file, whatever a writer made of it. `sync` waits until the
    bytes are on the disk, so that a power cut too leaves the old file or the new one; files by the
    thousand can do without.

    Raises OSError, as the block may.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode if mode is None else mode
        yield temporary
        if sync:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
