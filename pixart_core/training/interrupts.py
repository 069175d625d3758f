"""Ctrl-C during a run: noted, and obeyed where nothing is lost."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ONE_PRESS = 2.0  # seconds; a launcher may hand on what the terminal has sent to all already


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets; a later one interrupts as usual."""
    event = threading.Event()
    first = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def note(number: int, _: Any) -> None:
        nonlocal first
        if not event.is_set():
            first = time.monotonic()
            event.set()
        elif time.monotonic() - first > _ONE_PRESS:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_interrupts(_: int) -> None:
    """For a process that reads samples: it goes on at Ctrl-C, which a terminal sends to all.

    The step that runs may need more of it; it ends with the run.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
