"""Of several ranks the one that fails says why, and the others say that they lost it."""

import signal
import socket
import sys

import pytest

from tests.support.ranks import Ranks

HOST = socket.gethostname()
PROGRAM = """
import sys, time, torch
from torch import distributed as dist
from lcl_ds.cli import run_command
from lcl_ds.errors import UserError
from lcl_ds.training.joint_errors import heard_from_any_task
from lcl_ds.training.pulse import PULSE
from lcl_ds.training.signals import STOP

def train():
    dist.init_process_group("gloo")
    dist.new_group(backend="gloo")
    PULSE.begin("training", 12, 3)
    dist.barrier()
    if dist.get_rank() == 1:
        if sys.argv[1] == "bug":
            raise ValueError("a bug")
        raise UserError("the disk of this rank is full", on_every_rank=False)
    if sys.argv[1] == "stopped":
        STOP.received = 15
    dist.all_reduce(torch.zeros(1))

sys.exit(run_command(lambda: heard_from_any_task(train)))
"""
LOST = f"error: rank 0 on {HOST}: the connection to another rank was lost in step 12, micro-step 3; "


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "codes", "pointer"),
    [
        ("bug", [1, 1], "its own message says why"),
        ("stopped", [128 + signal.SIGTERM, 2], "it ended on the same signal, or before; the same command continues"),
    ],
)
def test_a_rank_that_lost_another_says_so_in_a_line_and_the_other_says_why(tmp_path, case, codes, pointer):
    ranks = Ranks(2, [sys.executable, "-c", PROGRAM, case], tmp_path / "log")
    assert ranks.wait() == codes, ranks.output()
    first, second = (log.read_text() for log in ranks.logs)
    assert first.startswith(LOST + pointer)
    assert first.count("\n") == 1
    if case == "bug":
        lines = second.replace("[rank1]: ", "").splitlines()  # torch's own mark
        assert lines[-2:] == ["ValueError: a bug", f"This was rank 1 on {HOST}, in step 12, micro-step 3."]
    else:
        assert second == f"error: rank 1 on {HOST}: the disk of this rank is full\n"
