"""`lcl_kernels.compile_check` tells good kernels from bad ones. That ours are good is `make compile-check`."""

import json
import os
import subprocess
import sys

import pytest
from lcl_kernels.compile_check import COLUMNS, problem_of, resident_programs, table

GOOD = dict(zip(COLUMNS, ("sm_90", "kernel", "bfloat16 128x256x64", 200, 0, 200_000, 8, 1, 1, True, None), strict=True))


def test_a_good_kernel_is_no_problem():
    assert problem_of(GOOD) is None
    assert problem_of(GOOD | {"hgmma": None}) is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spills": 8}, "sm_90 kernel bfloat16 128x256x64: spills 8 bytes"),
        ({"shared": 240_000}, "needs 240000 bytes of shared memory, sm_90 has 232448"),
        ({"started": 2}, "starts 2 programs on each multiprocessor, where 1 fit"),
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


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "programs"),
    [
        ("sm_90", 128, 8, 100_000, 2),  # 65,536 registers of 32 bits
        ("sm_90", 129, 8, 100_000, 1),  # handed out by eights
        ("sm_90", 32, 8, 116_736, 1),  # each program takes 1 KiB of shared memory more
        ("sm_90", 32, 8, 115_712, 2),
        ("sm_90", 16, 4, 0, 16),  # 64 warps
        ("sm_80", 255, 4, 0, 2),
        ("gfx942", 128, 8, 32_768, 2),
    ],
)
def test_programs_that_fit_on_a_multiprocessor(target, registers, warps, shared, programs):
    assert resident_programs(target, registers, warps, shared) == programs


SPECIALIZED = """
import json
from lcl_kernels import triton_contrastive_kernels, triton_linear_kernels, triton_sigmoid_contrastive
from triton.runtime import JITFunction
modules = (triton_contrastive_kernels, triton_linear_kernels, triton_sigmoid_contrastive)
kernels = {name: kernel for module in modules for name, kernel in vars(module).items() if name.endswith("_kernel")}
assert len(kernels) == 13 and all(isinstance(kernel, JITFunction) for kernel in kernels.values())
print(json.dumps({
    name: [p.name for p in kernel.params if not (p.is_constexpr or p.do_not_specialize)]
    for name, kernel in kernels.items()
}))
"""


def test_counts_of_rows_and_pairs_are_no_constants_of_the_kernels():
    """A constant makes a kernel for 1, for multiples of 16 and for other numbers, compiled in the middle of a run."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SPECIALIZED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    constants = json.loads(done.stdout.splitlines()[-1])
    counts = {"count", "expected", "pairs", "length", "bounded_tiles", "other_tiles", "first", "diagonal"}
    assert {kernel: counts & set(names) for kernel, names in constants.items()} == {
        kernel: set() for kernel in constants
    }
    assert "rows" not in constants["exp_logits_kernel"]  # in the others it is a pointer, or saves registers
