"""The program ``lcl``: one name for all commands. ``lcl NAME`` is ``python -m lcl_ds.NAME``."""

import importlib
import sys

from lcl_ds import __version__
from lcl_ds.cli import run_command
from lcl_ds.errors import UserError
from lcl_ds.settings import suggest

COMMANDS = {
    "train": ("lcl_ds.train", "train a vision encoder, or continue a run; by default the embedded demo"),
    "data": ("lcl_ds.data.__main__", "make shards of your images or a corpus, look into them, write a recipe"),
    "convert": ("lcl_ds.convert", "release a trained encoder, or import a published checkpoint"),
    "evaluate": (
        "lcl_ds.evaluate",
        "measure an encoder: probes, neighbours, retrieval, zero-shot, fine-tuning, captions",
    ),
    "report": ("lcl_ds.report.__main__", "write the page about a run, or compare several runs"),
    "study": ("lcl_ds.study.__main__", "train variants of a recipe over seeds and budgets, and compare them on a page"),
    "plan": ("lcl_ds.plan.__main__", "say what a run needs before a GPU is rented: memory, time, money"),
    "bench": ("lcl_ds.bench.__main__", "compare losses, training steps and loading with other projects"),
}
"""The module of each command, which is imported only when it is called, and what the command does."""


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    return run_command(lambda: dispatch(words))


def dispatch(words: list[str]) -> int:
    """Run the command that the first word names; returns its exit code.

    Raises:
        UserError: there is no such command.
    """
    if not words or words[0] in ("-h", "--help"):
        print(help_text(), end="")
        return 0
    name, *rest = words
    if name == "--version":
        print(f"lcl {__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(
            f"lcl {name}: there is no such command{suggest(name, COMMANDS)}; there are {', '.join(COMMANDS)}"
        )
    module, _ = COMMANDS[name]
    return importlib.import_module(module).main(rest)


def help_text() -> str:
    """Write what ``lcl --help`` prints: the commands with a line about each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {sentence}" for name, (_, sentence) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lcl COMMAND ...    lcl COMMAND --help    lcl --version",
            "",
            "Pre-train vision encoders on interleaved image-text documents.",
            "",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
