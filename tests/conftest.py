"""Fixtures that several folders of tests share."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when the kernels are imported
    os.environ["TRITON_INTERPRET"] = "1"

from lcl_ds.data.demo.corpus import build_demo

SLOW = (
    "unit/test_bench.py",
    "unit/test_gpu_check.py",
    "unit/evaluation/test_final.py",
    "unit/data/test_build.py::test_a_killed_build_goes_on_and_gives_the_same_bytes",
    "unit/data/test_build.py::test_a_worker_that_is_killed_is_a_sentence_and_the_next_try_goes_on",
    "unit/data/test_sampling.py::test_weights_that_change_by_step_take_effect_at_that_step",
    "unit/data/test_skips.py::test_a_trainer_that_fails_does_not_wait_for_its_loader_processes",
    "unit/data/test_resume.py::test_what_follows_a_cut_equals_the_uninterrupted_stream",
    "unit/test_layers.py::test_importing_the_package_changes_nothing_in_the_process",
    "unit/test_user_errors.py::test_a_mistake_shows_no_traceback_in_a_process_of_its_own",
    "kernels/test_compile.py",
    "kernels/test_compile_check.py",
    "kernels/test_contrastive_ranks.py",
    "kernels/test_wheel.py",
)
"""Files and tests that take more than two seconds, beside the folders that say so in their own ``conftest.py``."""


def pytest_collection_modifyitems(items):
    """Mark the tests of ``SLOW``, and those that need what a run of one rank left."""
    for item in items:
        name = f"{item.path.relative_to(Path(__file__).parent)}::{item.name}"
        if name.startswith(SLOW) or "saved_run" in item.fixturenames:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory) -> Path:
    """A small demo corpus: 160 documents, 120 pairs, 40 held-out documents."""
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    build_demo(folder, documents=160, pairs=120, heldout_documents=40, shard_size=64)
    return folder


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """Leave no test what a launcher would set: a run that was started within the process puts it there and it stays."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
