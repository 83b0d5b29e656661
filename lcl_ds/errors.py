"""Define the one error that means that the user can put something right."""

from collections.abc import Iterable


class UserError(Exception):
    """A mistake in settings or input; commands print it without a traceback and exit with code 2.

    Args:
        problems: one sentence each, naming the file and the key and saying what to do.
        on_every_rank: whether all ranks of a run find it, so that one of them should print it.
    """

    def __init__(self, problems: str | Iterable[str], on_every_rank: bool = True):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.on_every_rank = on_every_rank
        super().__init__("\n".join(self.problems))
