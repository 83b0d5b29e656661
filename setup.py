"""Packaging: ``lcl_ds`` and, from ``kernels/``, the independent package ``lcl_kernels``.

``kernels/`` itself is not a package: one of that name on the path would hide the Hugging Face ``kernels`` package from
transformers.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "lcl_ds" / "__init__.py").read_text()).group(1)

setup(
    name="lcl_ds",
    version=VERSION,
    description="Open, efficient pre-training of vision encoders on interleaved image-text documents",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["lcl_ds", "lcl_ds.*"]), "lcl_kernels"],
    package_dir={"lcl_kernels": "kernels/lcl_kernels"},
    package_data={"lcl_ds": ["assets/*"], "lcl_kernels": ["tuned.json"]},
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
        "numpy",
        "pillow",
        "pydantic>=2",
        "tokenizers",
    ],
    extras_require={"parquet": ["pyarrow"]},
)
