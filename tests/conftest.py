"""Fixtures that several folders of tests share, and which tests `make quick` leaves out."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and threads of one that wait take them from others
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import torch

if not torch.cuda.is_available():  # Triton reads it when the kernels are imported
    os.environ["TRITON_INTERPRET"] = "1"

from lcl_ds.data.demo.corpus import build_demo

SLOW = (
    # Whole programs, and the measurements.
    "distributed",
    "system",
    "unit/test_gpu_check.py",
    "unit/test_bench.py",
    "unit/evaluation/test_final.py",
    "kernels/test_wheel.py",
    "unit/test_layers.py::test_importing_the_package_changes_nothing_in_the_process",
    "unit/test_user_errors.py::test_a_mistake_shows_no_traceback_in_a_process_of_its_own",
    "kernels/test_compile_check.py::test_counts_of_rows_and_pairs_are_no_constants_of_the_kernels",
    # Losses under torch.compile.
    "kernels/test_compile.py",
    "kernels/test_contrastive_pairs.py::test_groups_weights_and_statistics_in_one_graph",
    "kernels/test_transforms.py::test_dual_tensors_are_refused_when_compiled",
    "kernels/test_transforms.py::test_forward_mode_is_refused_when_compiled",
    # Processes that build, check or load.
    "unit/data/test_build.py::test_a_killed_build_goes_on_and_gives_the_same_bytes",
    "unit/data/test_build.py::test_a_worker_that_is_killed_is_a_sentence_and_the_next_try_goes_on",
    "unit/data/test_build.py::test_the_bytes_do_not_depend_on_the_number_of_processes",
    "unit/data/test_check.py::test_the_check_reads_shards_in_several_processes",
    "unit/data/test_lanes.py::test_lanes_need_not_be_a_multiple_of_ranks_and_workers",
    "unit/data/test_lanes.py::test_the_global_stream_is_the_same_for_any_ranks_and_workers",
    "unit/data/test_lanes.py::test_a_position_continues_on_other_ranks_and_workers",
    "unit/data/test_mixing.py::test_the_stream_of_groups_is_the_same_for_any_ranks_and_workers",
    "unit/data/test_resume.py::test_another_world_size_keeps_the_global_order",
    "unit/data/test_resume.py::test_what_follows_a_cut_equals_the_uninterrupted_stream",
    "unit/data/test_skips.py::test_a_trainer_that_fails_does_not_wait_for_its_loader_processes",
    "unit/study/test_study.py::test_variants_see_as_many_images_in_as_large_steps",
    "unit/study/test_study.py::test_variants_spend_the_arithmetic_of_the_first_within_a_percent",
    # Many cases, or a long stream.
    "kernels/test_linear_cross_entropy_options.py::test_cases_of_other_projects",
    "unit/data/test_mixing.py::test_a_lane_with_groups_continues_exactly_from_any_row",
    "unit/data/test_mixing.py::test_the_curriculum_changes_the_sources_at_its_step",
    "unit/data/test_sampling.py",
    "unit/data/test_shards.py::test_few_shards_are_open_at_a_time",
    "unit/evaluation/test_held_out.py::test_what_passes_the_check_before_training_is_evaluated_after_it",
    "unit/test_fuzz.py::test_mutated_input_neither_crashes_nor_hangs_nor_goes_uncounted",
    "unit/models/test_native.py::test_a_given_naflex_tower_equals_the_padded_run_of_transformers",
    # Figures.
    "unit/test_report.py::test_runs_whose_names_are_not_unicode_are_drawn",
    "unit/test_report.py::test_one_run",
    "unit/test_report.py::test_several_runs_are_compared",
    "unit/test_report.py::test_a_comparison_leaves_reports_of_its_runs_alone",
    "unit/test_pages_in_a_browser.py",
)
"""Files and tests that ``make quick`` leaves out: they start programs or processes, or take more than half a second.

So do tests that need what ranks did, and kernels in Triton's interpreter but for one comparison of each loss
(``kernels/conftest.py``).
"""
RANKS = {"saved_run", "whole_run", "ranks"}
"""Fixtures for which ranks are started."""
FIRST = ("unit/test_gpu_check.py", "distributed", "system", "kernels/test_exchange.py", "kernels")
"""What takes longest begins first, so that no worker is left with it at the end."""


def place_of(path: Path) -> str:
    return str(path.relative_to(Path(__file__).parent))


def pytest_ignore_collect(collection_path, config):
    """Leave files alone of which `make quick` runs nothing: to read them takes seconds."""
    return True if config.option.markexpr == "not slow" and place_of(collection_path) in SLOW else None


def pytest_collection_modifyitems(items):
    """Mark what is slow, and put the longest files first."""
    names = {item: f"{place_of(item.path)}::{item.name}" for item in items}
    for item in items:
        if names[item].startswith(SLOW) or RANKS & {*item.fixturenames}:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: next((i for i, first in enumerate(FIRST) if names[item].startswith(first)), len(FIRST)))


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
