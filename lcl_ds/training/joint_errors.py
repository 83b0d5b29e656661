"""End all tasks of a run with one message. Imports neither torch nor DeepSpeed unless there is one to send."""

from collections.abc import Callable

from lcl_ds.cli import print_errors, problems_of
from lcl_ds.errors import UserError
from lcl_ds.tasks import task_count
from lcl_ds.training.pulse import PULSE
from lcl_ds.training.signals import STOP

LOST = 1
"""Exit code of a rank that ends because another one has ended."""


def heard_from_any_task(action: Callable[[], int]) -> int:
    """Do something as one of several tasks: what any of them finds wrong is printed once, with rank and host.

    Returns:
        The action's exit code; 1, or 128 + signal where one was received, if another task has gone.

    Raises:
        UserError: what is wrong; without a sentence where another task prints it.
    """
    try:
        return action()
    except Exception as error:
        if task_count() == 1:
            raise
        from lcl_ds.training.distributed import heard, is_lost_peer, leave_group, this_rank

        problems = problems_of(error)
        if problems is not None:
            raise UserError(heard(problems, isinstance(error, UserError) and error.on_every_rank)) from error
        is_lost = is_lost_peer(error)
        leave_group()
        if not is_lost:
            error.add_note(f"This was {this_rank()}, {PULSE.where()}.")
            raise
        print_errors([f"{this_rank()}: the connection to another rank was lost {PULSE.where()}; {_what_now()}"])
        return 128 + STOP.received if STOP.received else LOST


def _what_now() -> str:
    if STOP.received:
        return "it ended on the same signal, or before; the same command continues from the newest checkpoint"
    return "its own message says why"
