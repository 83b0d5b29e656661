"""Collect Python's garbage between steps, on all ranks between the same ones, or each would wait for all others."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERYTHING_EVERY = 100
"""Steps after which all garbage is looked for, not only what is young."""


@contextmanager
def garbage_between_steps() -> Iterator[None]:
    """Leave the collection of garbage to :func:`collect_garbage`."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def collect_garbage(step: int) -> None:
    """Collect what garbage a step has left: a fraction of a millisecond, and some now and then."""
    gc.collect(2 if step % EVERYTHING_EVERY == 0 else 0)
