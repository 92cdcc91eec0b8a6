"""Settings for all tests: one thread, a fixed seed, no network, a time limit. Warnings are errors (pyproject.toml)."""

import os
import shutil
import signal
import tempfile
from collections.abc import Generator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start, too: threads that spin for a busy core crawl

import hypothesis
import torch

QUICK_LIMIT, SLOW_LIMIT = 300, 1200
CAPTURED = "DEPTHC_CAPTURED"  # names the folder of what tests capture, for all processes of a run

torch.set_num_threads(1)
hypothesis.settings.register_profile("depthc", deadline=None, derandomize=True)
hypothesis.settings.load_profile("depthc")


def pytest_configure(config: pytest.Config) -> None:
    if CAPTURED not in os.environ:
        os.environ[CAPTURED] = folder = tempfile.mkdtemp(prefix="depthc-")
        config.add_cleanup(lambda: shutil.rmtree(folder))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    limit = item.get_closest_marker("limit")
    seconds = limit.args[0] if limit else SLOW_LIMIT if item.get_closest_marker("slow") else QUICK_LIMIT

    def expired(*_: object) -> None:
        pytest.fail(f"took longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
