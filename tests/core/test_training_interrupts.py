"""Ctrl-C as a terminal sends it: to processes that read, too, and through a launcher twice."""

import os
import signal
import time

import pytest
from training_samples import MemorySamples, files_equal, losses, start, write_model

from pixart_core.training import interrupts
from pixart_core.training.loop import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("training") / "model.safetensors")


class Interrupting(MemorySamples):
    """A terminal's Ctrl-C, which the run and the process that reads for it both get."""

    def batch(self, index, size, rank=0, world=1):
        if index == 6:  # the run has begun, and its first step needs one more
            for process in (os.getppid(), os.getpid()):
                os.kill(process, signal.SIGINT)
            time.sleep(0.2)
        return super().batch(index, size, rank, world)


def test_readers_go_on_until_the_step_is_done(model, tmp_path):
    """Protects Ctrl-C with workers: the step may still need batches that they read."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    settings = {"steps": 3, "gradient_accumulation": 8, "workers": 1}
    outcome = train(start("base", parts, model, Interrupting(), **settings))
    assert outcome.stopped and outcome.step < 3
    train(start("base", parts, model, MemorySamples(), **settings | {"workers": 0}))
    train(start("base", whole, model, MemorySamples(), **settings | {"workers": 0}))
    assert losses(parts) == losses(whole) and files_equal(parts, whole)


def test_one_press_may_come_twice_and_a_second_one_breaks_off(monkeypatch):
    """Protects runs under a launcher, which hands the terminal's Ctrl-C on once more."""
    now = [100.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    with interrupts.interrupts() as event:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            now[0] += 0.5
        assert event.is_set()
        now[0] += 5
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
