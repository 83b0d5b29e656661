"""What is begun to be saved is published or named."""

import errno
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from lcl_ds.errors import UserError
from lcl_ds.training.checkpoint import WEIGHTS, ManifestEntry
from lcl_ds.training.saver import RankFiles, Saver, _InFlight, write_files
from lcl_ds.training.slices import Slice
from tests.support.disks import no_file_larger_than
from tests.support.small import small_config


@pytest.fixture
def saver(only_rank, tmp_path) -> Saver:
    """A saver whose thread has met a full disk."""
    saver = Saver(None, small_config(), only_rank, tmp_path, 10)
    written: Future[dict[str, ManifestEntry]] = Future()
    written.set_exception(OSError(errno.ENOSPC, "No space left on device"))
    final = Path(tmp_path / "checkpoints" / "step_00000002")
    saver._in_flight = _InFlight(final, final.with_name(".partial_step_00000002"), time.perf_counter(), 0.0, written)
    return saver


def test_a_run_that_ends_for_another_reason_says_that_and_what_kept_its_last_checkpoint_from_being_written(saver):
    with pytest.raises(UserError) as error, saver.finishing():
        raise UserError("steps were skipped")
    assert error.value.problems[0] == "steps were skipped"
    (unsaved,) = error.value.problems[1:]
    assert unsaved.startswith("checkpoint step_00000002 could not be written: no space is left on the disk")


def test_a_disk_that_fills_within_a_large_file_is_named_though_small_files_find_room_afterwards(only_rank, tmp_path):
    final, partial = tmp_path / "step_00000002", tmp_path / ".partial_step_00000002"
    for name in ("weights", "moments"):
        (partial / name).mkdir(parents=True)
    large = Slice("weight", 0, (3_000_000,), torch.zeros(3_000_000))
    saver = Saver(None, small_config(), only_rank, tmp_path, 10)
    with no_file_larger_than(9_000_000):
        written = saver._threads.submit(write_files, RankFiles(partial, 0, 1, {WEIGHTS: [large]}, {}))
        saver._in_flight = _InFlight(final, partial, time.perf_counter(), 0.0, written)
        with pytest.raises(
            UserError, match=r"part_00000_of_00001.safetensors: the file would be larger than the system"
        ):
            saver.finish()
    saver.close()


def test_a_host_without_memory_for_the_copy_is_a_sentence_and_no_crash_of_one_rank(saver):
    with pytest.raises(UserError, match=r"no memory for the copy of weight \(4\.5e\+06 GB\) .*asynchronous=false"):
        saver._kept("weight", torch.zeros(1).expand(1 << 50))


def test_what_failed_is_said_once(saver):
    with pytest.raises(UserError) as error, saver.finishing():
        saver.finish()
    assert len(error.value.problems) == 1
