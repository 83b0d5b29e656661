"""Load releases of every family with every library: ``python -m tests.chaos.loading_matrix --transformers_4 FOLDER``.

Writes small encoders whose weights were all moved, in each format, loads them with the library itself, and runs the
code of each model card. A cell says how many weights were missing, the largest difference of any feature (patch tokens,
and what is pooled) to the training model, or why there is no such release.

Needs timm, open_clip_torch, onnx, onnxscript and onnxruntime beside the project's own packages, and transformers 4.57
in a folder of its own (``pip install --target FOLDER 'transformers==4.57.*'``).
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

OPERATORS = torch.library.Library("torchvision", "DEF")


def let_torchvision_load() -> None:
    """Declare torchvision's operators where its binary was built for another torch than this one.

    timm and open_clip import it, and transformers then does as well; none of them calls one of these operators here.
    """
    while True:
        try:
            import torchvision  # noqa: F401
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if not missing:
                raise
            OPERATORS.define(f"{missing[1]}(Tensor x) -> Tensor")
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
        else:
            return


let_torchvision_load()

import numpy as np  # noqa: E402
import transformers  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from lcl_ds.convert import RELEASES  # noqa: E402
from lcl_ds.environment import PACKAGES, machine, versions  # noqa: E402
from lcl_ds.errors import UserError  # noqa: E402
from lcl_ds.files import write_whole  # noqa: E402
from lcl_ds.models.network import LCLModel  # noqa: E402
from lcl_ds.models.vision import family_inputs  # noqa: E402
from lcl_ds.release.origin import WeightOrigin  # noqa: E402
from lcl_ds.release.parity import TrainedFeatures, trained_features  # noqa: E402
from tests.support.pages import blocks_of  # noqa: E402
from tests.support.small import IMAGE_SIZE, VISION_TOWERS, shake, small_config, small_model  # noqa: E402

Cell = dict[str, Any]
EXTRAS = ("timm", "open_clip_torch", "onnx", "onnxscript", "onnxruntime")
"""Packages that are needed beyond the project's own."""

READ = """
import json, sys, torch, transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel
folder, given = sys.argv[1], torch.load(sys.argv[2])
tower = getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0])
facts = AutoConfig.from_pretrained(folder).lcl_release
missing, differences = 0, []
for loader, options in ((AutoModel, {}), (tower, {}), (AutoModel, {"trust_remote_code": True})):
    model, loading = loader.from_pretrained(folder, output_loading_info=True, **options)
    missing += sum(len(names) for names in loading.values())
    with torch.no_grad():
        outputs = model.eval()(**given["inputs"])
        patches = outputs.last_hidden_state
        if options:
            differences.append((outputs.pooler_output - given["pooled"]).abs().max())
        else:
            patches = patches[:, facts["prefix_tokens"]:]
            if facts["final_norm"]:
                patches = getattr(getattr(model, "vision_model", model), facts["final_norm"])(patches)
        differences.append((patches - given["patches"]).abs().max())
AutoImageProcessor.from_pretrained(folder)
print(json.dumps({"version": transformers.__version__, "missing": missing, "difference": float(max(differences))}))
"""


def moved_model(family: str) -> LCLModel:
    """Build a small network of which no weight has its first value."""
    model = small_model(small_config(f"model.vision={VISION_TOWERS[family]}")).eval()
    shake(model.vision, model.pooling)
    return model


def run_card(folder: Path) -> None:
    """Run the code in a model card as it is printed."""
    with contextlib.chdir(folder.parent):
        for block in blocks_of(folder / "README.md"):
            if block.language == "python":
                exec(block.text, {})


def with_transformers(model: LCLModel, features: TrainedFeatures, folder: Path, packages: str | None) -> Cell:
    """Load as the family's class in three ways, in a process of its own; ``packages``: a folder put before others."""
    given = folder.parent / f"{folder.name}.pt"
    torch.save({"inputs": family_inputs(model.vision.model, features.images), **features.by_name()}, given)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if packages:
        environment["PYTHONPATH"] = packages
    command = [sys.executable, "-c", READ, str(folder), str(given)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr[-600:])
    return json.loads(done.stdout.splitlines()[-1])


def with_timm(features: TrainedFeatures, folder: Path) -> Cell:
    import timm

    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    weights = load_file(folder / "model.safetensors")
    patches = loaded.forward_features(features.images)[:, loaded.num_prefix_tokens :]
    pairs = [(features.patches, patches), (features.patches.mean(1), loaded(features.images))]
    return {"version": timm.__version__, **compared(loaded.state_dict().keys() ^ weights.keys(), pairs)}


def with_open_clip(features: TrainedFeatures, folder: Path) -> Cell:
    import open_clip

    loaded, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    weights = load_file(folder / "open_clip_model.safetensors")
    pairs = [(features.patches.mean(1), loaded.eval().encode_image(features.images))]
    return {"version": open_clip.__version__, **compared(loaded.state_dict().keys() ^ weights.keys(), pairs)}


def with_onnxruntime(features: TrainedFeatures, folder: Path) -> Cell:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, {"pixel_values": features.images.numpy()}), strict=True))
    pairs = [(ours, torch.from_numpy(outputs[name])) for name, ours in features.by_name().items()]
    return {"version": onnxruntime.__version__, **compared(features.by_name().keys() ^ outputs.keys(), pairs)}


def with_torch_export(features: TrainedFeatures, folder: Path) -> Cell:
    outputs = torch.export.load(folder / "model.pt2").module()(pixel_values=features.images)
    pairs = [(ours, outputs[name]) for name, ours in features.by_name().items()]
    return {"version": torch.__version__, **compared(features.by_name().keys() ^ outputs.keys(), pairs)}


def compared(misfits: set[str], pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Cell:
    return {"missing": len(misfits), "difference": max(float((one - other).abs().max()) for one, other in pairs)}


LIBRARIES: dict[str, tuple[str, Callable[[TrainedFeatures, Path], Cell]]] = {
    "timm": ("timm", with_timm),
    "open_clip": ("open_clip", with_open_clip),
    "onnxruntime": ("onnx", with_onnxruntime),
    "torch.export": ("torch", with_torch_export),
}
"""The format that each library loads, and how."""


def matrix(transformers_4: str | None, folder: Path) -> dict[str, dict[str, Cell]]:
    """Fill all cells: by library, then by family."""
    cells: dict[str, dict[str, Cell]] = {}
    for family in VISION_TOWERS:
        model = moved_model(family)
        pixels = np.random.default_rng(0).integers(0, 256, (3, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
        origin = WeightOrigin("small", "for the loading matrix", {}, pixels, "images of noise")
        features = trained_features(model, origin)
        written: dict[str, Path | str] = {}
        for layout, release in RELEASES.items():
            out = folder / family / layout
            out.mkdir(parents=True)
            try:
                release(model, origin, out)
            except UserError as error:
                written[layout] = str(error)
            else:
                written[layout] = out
                run_card(out)
        majors: dict[str, str | None] = {"5": None} | ({"4.57": transformers_4} if transformers_4 else {})
        for major, packages in majors.items():
            cells.setdefault(f"transformers {major}", {})[family] = with_transformers(
                model, features, Path(written["hf"]), packages
            )
        for library, (layout, load) in LIBRARIES.items():
            with torch.no_grad():
                out = written[layout]
                cells.setdefault(library, {})[family] = (
                    {"refused": out} if isinstance(out, str) else load(features, out)
                )
    return cells


def table_of(cells: dict[str, dict[str, Cell]]) -> Table:
    table = Table(title="missing weights, largest difference of a feature")
    for column in ("library", *VISION_TOWERS):
        table.add_column(column)
    for library, row in cells.items():
        found = [row[family] for family in VISION_TOWERS]
        shown = [c["refused"] if "refused" in c else f"{c['missing']}, {c['difference']:.1e}" for c in found]
        table.add_row(" ".join(dict.fromkeys([library, *(c["version"] for c in found if "version" in c)])), *shown)
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transformers_4", metavar="FOLDER", help="where transformers 4.57 lies")
    parser.add_argument("--json", type=Path, help="also write the cells to this file")
    arguments = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        cells = matrix(arguments.transformers_4, Path(folder))
    Console(width=160).print(table_of(cells))
    if arguments.json:
        tree = {"machine": machine(), "packages": versions([*PACKAGES, *EXTRAS]), "cells": cells}
        write_whole(arguments.json, json.dumps(tree, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
