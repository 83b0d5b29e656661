"""Packaging: ``lcl_ds`` and, from ``kernels/``, the independent package ``lcl_kernels``.

``kernels/`` itself is not a package: one of that name on the path would hide the Hugging Face ``kernels`` package from
transformers.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "lcl_ds" / "__init__.py").read_text()).group(1)
SHIPPED_FOLDERS = {
    "lcl_ds.recipes": "launch/recipes",
    "lcl_ds.studies": "launch/studies",
    "lcl_ds.ds_configs": "ds_configs",
}
"""Folders of files beside the package in a checkout that lie inside it where it is installed; they hold no code. See
``lcl_ds.files.shipped_folder``."""

setup(
    name="lcl_ds",
    version=VERSION,
    description="Open, efficient pre-training of vision encoders on interleaved image-text documents",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["lcl_ds", "lcl_ds.*"]), *SHIPPED_FOLDERS, "lcl_kernels"],
    package_dir={**SHIPPED_FOLDERS, "lcl_kernels": "kernels/lcl_kernels"},
    package_data={
        "lcl_ds": ["py.typed"],
        "lcl_ds.report": ["templates/*"],
        **{package: ["*"] for package in SHIPPED_FOLDERS},
        "lcl_kernels": ["py.typed", "tuned.json"],
    },
    entry_points={"console_scripts": ["lcl = lcl_ds.__main__:main"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8",
        "transformers>=5.17",
        "accelerate",
        "webdataset",
        "braceexpand",
        "fsspec",
        "triton; platform_system == 'Linux'",
        "safetensors",
        "pyyaml",
        "rich",
        "matplotlib",
        "jinja2",
        "numpy",
        "pillow",
        "pydantic>=2",
        "tokenizers",
    ],
    extras_require={
        "caption": ["pycocoevalcap"],
        "onnx": ["onnx", "onnxscript", "onnxruntime"],
        "open_clip": ["open_clip_torch"],
        "parquet": ["pyarrow"],
        "timm": ["timm"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "trackio": ["trackio"],
    },
)
