"""When Python's garbage is collected."""

import gc
import weakref

from lcl_ds.training.garbage import EVERYTHING_EVERY, collect_garbage, garbage_between_steps


class Node:
    def __init__(self):
        self.itself = self


def test_garbage_stays_until_a_step_is_over_whatever_is_allocated_meanwhile():
    with garbage_between_steps():
        seen = weakref.ref(Node())
        kept = [[number] for number in range(10_000)]
        assert seen() is not None
        collect_garbage(1)
        assert seen() is None
        assert len(kept) == 10_000


def test_now_and_then_garbage_of_any_age_is_collected():
    with garbage_between_steps():
        node = Node()
        seen = weakref.ref(node)
        gc.collect()  # it is old now
        del node
        collect_garbage(EVERYTHING_EVERY - 1)
        assert seen() is not None
        collect_garbage(EVERYTHING_EVERY)
        assert seen() is None


def test_afterwards_python_collects_as_before():
    with garbage_between_steps():
        assert not gc.isenabled()
    assert gc.isenabled()
