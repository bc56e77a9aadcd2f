"""Every run draws new random inputs; a failure prints the seed that repeats it."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

VARIABLE = "OTLOSS_TEST_SEED"


def pytest_configure(config: pytest.Config) -> None:
    # In the environment, so that the workers of pytest-xdist share it.
    os.environ.setdefault(VARIABLE, str(random.SystemRandom().randrange(10**6)))
    # One thread a worker: the problems are small, and OpenMP threads of several workers would wait
    # for one another. Tests of the threads set their own number.
    torch.set_num_threads(1)
    # Native code has no fixed speed, and the first example pays for the imports.
    settings.register_profile(
        "otloss", deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
    )
    settings.load_profile("otloss")


def pytest_report_header() -> str:
    return f"otloss inputs: {VARIABLE}={os.environ[VARIABLE]} repeats this run's"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:
        report.sections.append(("inputs", f"{VARIABLE}={os.environ[VARIABLE]} repeats them"))
    return report


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator of its own for each test, whichever tests run before it."""
    seed = int(os.environ[VARIABLE]) + zlib.crc32(request.node.nodeid.encode())
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads after a test that changes it."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)
