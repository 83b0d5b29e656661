"""`lcl_kernels.compile_check` tells good kernels from bad ones. That ours are good is `make compile-check`."""

import pytest
from lcl_kernels.compile_check import COLUMNS, problem_of, table

GOOD = dict(zip(COLUMNS, ("sm_90", "kernel", "bfloat16 128x256x64", 200, 0, 200_000, True, None), strict=True))


def test_a_good_kernel_is_no_problem():
    assert problem_of(GOOD) is None
    assert problem_of(GOOD | {"hgmma": None}) is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spills": 8}, "sm_90 kernel bfloat16 128x256x64: spills 8 bytes"),
        ({"shared": 240_000}, "needs 240000 bytes of shared memory, sm_90 has 232448"),
        ({"hgmma": False}, "no HGMMA instruction"),
        ({"error": "CompilationError: at 3:4"}, "CompilationError: at 3:4"),
    ],
)
def test_problems_are_named(change, problem):
    assert problem in problem_of(GOOD | change)


def test_spills_of_the_rare_second_launch_are_shown_but_no_problem():
    row = GOOD | {"spills": 64, "setting": "bfloat16 128x256x64 retry"}
    assert problem_of(row) is None
    assert "64" in table([row]).splitlines()[1].split()
