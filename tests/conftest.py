"""Fixtures for all tests: tiny pipelines, and those of the page."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from pipelines import make_pipe

pytest_plugins = ["page"]  # the server and the browser


def pytest_collection_modifyitems(items):
    """The files that take longest first, so that no worker is still at one when the other has nothing left: those
    whose tests wait for a browser, then those with many slow tests.
    """
    weights: Counter[Path] = Counter()
    for item in items:
        weights[item.path] += 1 + 20 * ("browser" in item.fixturenames) + 40 * bool(item.get_closest_marker("slow"))
    items.sort(key=lambda item: -weights[item.path])


@pytest.fixture(scope="session")
def tiny():
    """The SD 1 shaped pipeline, shared: tests that change a pipeline make their own."""
    return make_pipe()


@pytest.fixture(scope="session")
def tiny_sd2():
    return make_pipe("sd2")


@pytest.fixture
def fresh():
    return make_pipe()
