"""End all tasks of a run with one message. Imports neither torch nor DeepSpeed unless there is one to send."""

from collections.abc import Callable

from lcl_ds.cli import problems_of
from lcl_ds.errors import UserError
from lcl_ds.tasks import task_count


def heard_from_any_task(action: Callable[[], int]) -> int:
    """Do something as one of several tasks: what any of them finds wrong is printed once, with rank and host.

    Raises:
        UserError: what is wrong; without a sentence where another task prints it.
    """
    try:
        return action()
    except Exception as error:
        problems = problems_of(error)
        if problems is None or task_count() == 1:
            raise
        from lcl_ds.training.distributed import heard

        raise UserError(heard(problems, isinstance(error, UserError) and error.on_every_rank)) from error
