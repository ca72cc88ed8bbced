"""Fixtures for all tests: a private cache, and few threads so that tests do not fight each other."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # whatever the process that started the worker has set for itself, below
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache folder for the whole session and all its processes, so that no test reads or writes the user's own."""
    folder = tmp_path_factory.getbasetemp().parent / "cache" if "PYTEST_XDIST_WORKER" in os.environ else None
    folder = folder or tmp_path_factory.mktemp("cache")
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MM_CACHE", str(folder))
        patch.setenv("MM_PRECISION", "fp32")  # the same figures on machines with and without bf16 units
        yield folder
