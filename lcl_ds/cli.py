"""End every command in the same way: mistakes of user or machine with a sentence, our own with a traceback."""

import argparse
import signal
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TextIO

from lcl_ds.errors import UserError
from lcl_ds.files import sentence_of

USER_ERROR = 2
"""Exit code of a mistake in settings or input, and of a machine that cannot do what was asked."""
INTERRUPTED = 128 + signal.SIGINT


def run_command(action: Callable[[], int]) -> int:
    """Run a command and turn what went wrong outside this program into sentences on stderr.

    Returns:
        The action's exit code; 2 after an error that the user can put right; 130 after Ctrl-C.
    """
    print_any_name()
    try:
        return action()
    except KeyboardInterrupt:
        print_errors(["interrupted"])
        return INTERRUPTED
    except Exception as error:
        problems = problems_of(error)
        if problems is None:
            raise
        print_errors(problems)
        return USER_ERROR


def problems_of(error: BaseException) -> list[str] | None:
    """Write sentences about an error whose cause lies with the user or the machine; None for our own mistakes."""
    if isinstance(error, UserError):
        return error.problems
    if isinstance(error, BrokenProcessPool):
        return [
            "a worker process was killed, most likely because memory ran out; start again with fewer --workers "
            "or more memory"
        ]
    if isinstance(error, MemoryError):
        return ["there is not enough memory; use fewer workers or smaller settings"]
    if isinstance(error, BrokenPipeError):
        return ["the program that reads this output has ended"]
    if isinstance(error, OSError) and (sentence := sentence_of(error)):
        return [sentence]
    return None


def positive(text: str) -> int:
    """Read a number of things from the command line. Raises: ArgumentTypeError when it is not 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def program_name(command: str) -> str:
    """Say how a command was called, for its help: ``lcl NAME`` or ``python -m lcl_ds.NAME``."""
    return f"lcl {command}" if Path(sys.argv[0]).name == "lcl" else f"python -m lcl_ds.{command}"


def print_errors(problems: list[str]) -> None:
    print("".join(f"error: {problem}\n" for problem in problems), end="", file=sys.stderr, flush=True)


def print_any_name() -> None:
    """Let stdout and stderr take names that are not valid Unicode, as file names may be: they are shown escaped."""
    streams: tuple[TextIO, TextIO] = (sys.stdout, sys.stderr)
    for stream in streams:
        if hasattr(stream, "reconfigure"):  # a test's stand-in may lack it
            stream.reconfigure(errors="backslashreplace")
