"""Fixtures for all tests: tiny pipelines, and those of the page."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from pipelines import make_pipe

pytest_plugins = ["page"]  # the server and the browser


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
