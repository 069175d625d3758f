"""Interleaved timing, and the words around the numbers: machine, versions, tables."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

GB = 1e9
MIB = 2**20


@dataclass
class Timing:
    """Seconds of every repeat, and on CUDA the most memory above what was there before."""

    seconds: list[float] = field(default_factory=list)
    peak: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        return f"{show(self.median)} ({show(min(self.seconds))} to {show(max(self.seconds))})"


def show(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def time_once(call: Callable[[], Any], device: torch.device,
              clock: Callable[[], float] = time.perf_counter) -> tuple[float, int | None]:
    """Seconds and, on CUDA, peak bytes of one call; there by events, with nothing else queued.

    `clock` time.process_time counts the seconds this process got, for a CPU that others use too.
    """
    if device.type != "cuda":
        start = clock()
        call()
        return clock() - start, None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated(device) - before


def interleave(calls: Mapping[str, Sequence[Callable[[], Any]]], repeats: int,
               device: torch.device,
               clock: Callable[[], float] = time.perf_counter) -> dict[str, Timing]:
    """Time contenders in turn, each with its inputs in rotation, starting at another each round.

    Turns, so that a machine that gets slower or faster under way does so for all of them.
    """
    names = list(calls)
    timings = {name: Timing() for name in names}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            inputs = calls[name]
            seconds, peak = time_once(inputs[turn % len(inputs)], device, clock)
            timings[name].seconds.append(seconds)
            if peak is not None:
                timings[name].peak = max(peak, timings[name].peak or 0)
    return timings


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def machine(device: torch.device) -> str:
    """One line: what it ran on, and on how many threads."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"{name}, CUDA {torch.version.cuda}, driver clocks as found"
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (f"{_cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} cores, "
            f"{torch.backends.cpu.get_cpu_capability()}{load}")


def versions(**others: str) -> str:
    """One line: Python, torch and what the contenders come from."""
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    for package in ("diffusers", "comfy-kitchen"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return ", ".join(f"{name} {number}" for name, number in (found | others).items())


def peak_memory() -> int:
    """Most resident memory of this program so far, in bytes; 0 where the system does not tell.

    Not getrusage, whose peak also counts the process that started this one.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM")), 0)


def command() -> str:
    """How this process was started, without the machine's own paths."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    name = f"-m {module.name}" if module else Path(sys.argv[0]).name
    return " ".join(["python", name, *sys.argv[1:]])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
