"""Kernel tests run on the GPU where there is one, else on the CPU with Triton in its interpreter."""

import fcntl
import os
from pathlib import Path

import pytest
import torch

from tests.kernels.checks import DEVICE, running
from tests.kernels.ranks import results_of_ranks, run_ranks
from tests.support import interpreter

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to give the same bits every time
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
    """What each of four gloo ranks got; see `ranks.py`. Made once, also where pytest-xdist runs several workers."""
    base = tmp_path_factory.getbasetemp()
    made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks_made"
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            folder = tmp_path_factory.mktemp("ranks")
            with pytest.MonkeyPatch.context() as patch:
                patch.delenv("TRITON_INTERPRET", raising=False)  # as on a machine with a GPU: the ranks set it
                run_ranks(folder)
            made.write_text(str(folder))
    return results_of_ranks(Path(made.read_text()))


@pytest.hookimpl(tryfirst=True)  # before xdist reads the mark
def pytest_collection_modifyitems(items):
    """With --dist loadgroup tests of several ranks run in one process, so that no other waits for the ranks."""
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ranks"))
