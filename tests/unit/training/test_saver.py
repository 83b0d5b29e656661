"""What is begun to be saved is published or named."""

import errno
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from lcl_ds.errors import UserError
from lcl_ds.training.checkpoint import ManifestEntry
from lcl_ds.training.saver import Saver, _InFlight
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


def test_what_failed_is_said_once(saver):
    with pytest.raises(UserError) as error, saver.finishing():
        saver.finish()
    assert len(error.value.problems) == 1
