"""What is where, and how to run part of it.

    make test                               what an install is trusted by: all but the slow tests
    make test-all                           with them: emulated CUDA kernels, more combinations
    pytest -k "emulated"                    one backend: reference, dense, streamed, emulated, cuda
    pytest tests/test_parity.py -m ""       one file, its slow tests too

Tests are by property: parity (values and gradients against oracle.py, a brute force in float64),
gradients (finite differences, every mode, second order), properties (hypothesis), limits (closed
forms), batching, dtypes, results, errors, interruption, streamed (no matrices), newton,
distributed, compile, kernels (the registered operations), regimes (the operations wherever costs
are kept). They run over the backends of backends.py: plain torch, the CPU kernels, the CUDA kernels
emulated on the host, a GPU. cuda holds what only a real GPU shows; examples, benchmarks and docs
what is around the library. docs/testing.md says what is promised and which test watches it.

fuzz/ tries random problems over all that is accepted against an oracle that proves itself
(certified.py): `python -m tests.fuzz`, a minute of it among the slow tests.

Every run draws new random inputs; a failure prints the seed that repeats it.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from backends import HAS_GPU, backend  # noqa: F401  (backend is a fixture)
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


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without a GPU its tests are listed, but not skipped one by one."""
    needs_gpu = collection_path.name == "test_cuda.py" and not HAS_GPU
    return True if needs_gpu and not config.option.collectonly else None


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
