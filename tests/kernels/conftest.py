"""Kernel tests run on the GPU where there is one, else on the CPU with Triton in its interpreter."""

import pytest
import torch

from tests.kernels.checks import DEVICE, running


@pytest.fixture(autouse=True)
def _on_the_device():
    with torch.device(DEVICE):
        yield


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """The backend of the test; `checks.on_backend` functions follow it."""
    running.backend = request.param
    yield request.param
    running.backend = "torch"
