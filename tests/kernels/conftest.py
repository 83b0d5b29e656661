"""Kernel tests run on the GPU where there is one, else on the CPU with Triton in its interpreter."""

import os

import pytest
import torch

from tests.kernels.checks import DEVICE, running
from tests.kernels.ranks import results_of_ranks, run_ranks
from tests.support import interpreter
from tests.support.once import made_once

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to give the same bits every time
if DEVICE == "cpu":
    interpreter.speed_up()


@pytest.fixture(autouse=True)
def _on_the_device():
    """New tensors are on the device under test, and NaN until written, so that nothing unwritten passes."""
    torch.use_deterministic_algorithms(True)
    with torch.device(DEVICE):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """The backend of the test; `checks.on_backend` functions follow it."""
    running.backend = request.param
    yield request.param
    running.backend = "torch"


@pytest.fixture
def on_a_cpu():
    """Gloo, and so tests of several ranks, use the CPU also where there is a GPU."""
    with torch.device("cpu"):
        yield


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """What each of four gloo ranks got; see `ranks.py`."""

    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)  # as on a machine with a GPU: the ranks set it
            run_ranks(folder)

    return results_of_ranks(made_once(tmp_path_factory, "ranks", make))


def runs_in_quick(item):
    """Of Triton in its interpreter, which is slow, `make quick` only compares bfloat16 losses with the references."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("backend") != "triton" or DEVICE == "cuda":
        return True
    return item.originalname.startswith("test_equals_the_reference") and parameters["dtype"] == torch.bfloat16


@pytest.hookimpl(tryfirst=True)  # before xdist reads the mark
def pytest_collection_modifyitems(items):
    """With --dist loadgroup tests of several ranks run in one process, so that no other waits for the ranks."""
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ranks"))
        if not runs_in_quick(item):
            item.add_marker(pytest.mark.slow)
