"""Shared by all tests."""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("WANDB_MODE", "disabled")
if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter, which must be asked for before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def no_graphs(monkeypatch):
    """Passes are run where they would be captured, and nothing is replayed."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(pool=lambda: None, replay=lambda: None)
    monkeypatch.setattr("torch.cuda.Stream", lambda: stream)
    monkeypatch.setattr("torch.cuda.current_stream", lambda: stream)
    monkeypatch.setattr("torch.cuda.stream", lambda stream: nullcontext())
    monkeypatch.setattr("torch.cuda.CUDAGraph", lambda: graph)
    monkeypatch.setattr("torch.cuda.graph", lambda *args, **how: nullcontext())
