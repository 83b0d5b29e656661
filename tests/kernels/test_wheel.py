"""`lcl_kernels` is a package of its own: a wheel without lcl_ds that needs torch, and triton on a GPU."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lcl_ds", "deepspeed", "transformers", "accelerate", "webdataset", "yaml"):
            raise AssertionError(f"lcl_kernels imports {name}")

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import lcl_kernels
assert lcl_kernels.__file__.startswith(sys.argv[1]), lcl_kernels.__file__

import torch
torch.manual_seed(0)
weight = torch.randn(31, 8, requires_grad=True)
labels = torch.randint(31, (12,))
for backend in ("torch", "triton"):
    lcl_kernels.linear_cross_entropy(torch.randn(12, 8), weight, labels, backend=backend).backward()
    x = torch.nn.functional.normalize(torch.randn(12, 8), dim=1).requires_grad_()
    lcl_kernels.contrastive_loss(x, x.detach(), torch.tensor(10.0), backend=backend).backward()
from lcl_kernels.tiles import tuned_tiles
tuned_tiles()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, as `pip install ./kernels` does; setuptools leaves a build folder beside its source."""
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(KERNELS, folder / "kernels", ignore=shutil.ignore_patterns("__pycache__", "build"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*command, str(folder), str(source)], check=True, timeout=300)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    files = {str(path.relative_to(KERNELS)) for path in (KERNELS / "lcl_kernels").glob("*") if path.is_file()}
    assert names == files
    needs = [line.split()[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert [need.partition(">")[0].rstrip(";") for need in needs] == ["torch", "triton"]


def test_the_installed_package_runs_without_the_project(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", ALONE, str(site)], check=True, timeout=300, cwd=tmp_path, env=environment)
