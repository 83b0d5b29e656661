"""Imports point downwards: what may know what."""

import ast
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.support.ranks import ROOT

LAYERS = [
    {"errors", "settings", "tokens", "grids", "batch", "files", "cli", "metrics", "environment", "tasks", "gpus"},
    {"data"},
    {"models"},
    {"objectives", "flops"},
    {"training.settings", "evaluation.settings"},
    {"config", "phases"},
    {"assembly"},
    {"report"},
    {"evaluation"},
    {"training"},
    {"release"},
    {"bench", "convert", "evaluate", "train", "plan", "new_recipe"},
    {"study"},
]
"""From the bottom; a module may import from its own layer and from those below it."""
APART = [("models", "data")]
"""Neighbours that do not know each other."""


def imports_of(path: Path) -> set[str]:
    """Full names of all modules that a file imports, also inside of functions."""
    actual: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            actual |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            actual |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return actual


def layer_of(module: str) -> int | None:
    """The number of the layer that names ``module`` or a package of it, the longest name first; None without one."""
    names = module.split(".")
    for length in range(len(names), 0, -1):
        for number, layer in enumerate(LAYERS):
            if ".".join(names[:length]) in layer:
                return number
    return None


def modules() -> dict[str, Path]:
    """Every module of lcl_ds but the commands, by its name without ``lcl_ds.``."""
    paths = sorted((ROOT / "lcl_ds").rglob("*.py"))
    named = {".".join(path.relative_to(ROOT / "lcl_ds").with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in named.items() if not name.endswith("__main__")}


def test_every_module_has_a_layer():
    assert [name for name in modules() if layer_of(name) is None and name != "__init__"] == []


def test_no_module_imports_from_a_higher_layer():
    wrong = [
        (name, imported)
        for name, path in modules().items()
        for imported in (full.removeprefix("lcl_ds.") for full in imports_of(path) if full.startswith("lcl_ds."))
        if (layer_of(imported) or 0) > (layer_of(name) or 0)
    ]
    assert wrong == []


@pytest.mark.parametrize(("one", "other"), APART)
def test_neighbours_do_not_know_each_other(one, other):
    for name, path in modules().items():
        if name.split(".")[0] == one:
            assert not [full for full in imports_of(path) if full.startswith(f"lcl_ds.{other}")], name


def test_no_modules_import_each_other_in_a_circle():
    known = modules()
    edges = defaultdict(set)
    for name, path in known.items():
        edges[name] = {f.removeprefix("lcl_ds.") for f in imports_of(path)} & set(known) - {name}
    done: set[str] = set()
    while free := {name for name in edges if name not in done and edges[name] <= done}:
        done |= free
    assert set(edges) - done == set()


def test_no_two_packages_import_each_other():
    """A package and one inside it are no pair: what they share is a matter of modules."""
    known = modules()
    packages = {name: name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in known.items()}
    edges = {
        (packages[name], packages[target])
        for name, path in known.items()
        for target in {full.removeprefix("lcl_ds.") for full in imports_of(path)} & set(known)
        if packages[name] and packages[target]
    }
    assert len(edges) > 20
    nested = {
        (one, other) for one, other in edges if f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")
    }
    assert [pair for pair in edges - nested if pair[::-1] in edges] == []


def test_only_training_imports_deepspeed():
    users = {
        name.split(".")[0]
        for name, path in modules().items()
        if any(f.split(".")[0] == "deepspeed" for f in imports_of(path))
    }
    assert users == {"training"}


def test_importing_the_package_changes_nothing_in_the_process():
    """Neither what is told to DeepSpeed, which reads settings need not load, nor what transformers knows."""
    script = """
import logging, os, sys, warnings
import transformers.modeling_utils as theirs
before = dict(os.environ), list(warnings.filters), list(theirs.ALL_ATTENTION_FUNCTIONS)
import lcl_ds.assembly, lcl_ds.convert, lcl_ds.training.checkpoint, lcl_ds.training.joint_errors
assert (dict(os.environ), list(warnings.filters), list(theirs.ALL_ATTENTION_FUNCTIONS)) == before
assert "deepspeed" not in sys.modules
assert logging.getLogger("DeepSpeed").level == logging.NOTSET
from lcl_ds.training.preparation import prepare_for_deepspeed
prepare_for_deepspeed()
assert logging.getLogger("DeepSpeed").level == logging.ERROR
assert theirs.torch.cuda.is_available() or os.environ["DS_ACCELERATOR"] == "cpu"
"""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_the_kernels_import_torch_and_triton_alone():
    for path in (ROOT / "kernels" / "lcl_kernels").glob("*.py"):
        others = {full.split(".")[0] for full in imports_of(path)} - set(sys.stdlib_module_names)
        assert others <= {"lcl_kernels", "torch", "triton"}, path.name
