"""Write encoder and pooling as one graph with named inputs and outputs, for ONNX runtimes and for torch.export.

The graph takes ``pixel_values``, normalised square images of the size of training, any number of them, and gives
``patches`` and, where one was trained, ``pooled``. It is fp32.
"""

import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lcl_ds.models.network import LCLModel
from lcl_ds.release.card import write_card
from lcl_ds.release.options import DEFAULTS, ReleaseOptions
from lcl_ds.release.origin import WeightOrigin
from lcl_ds.release.parity import OTHER_CODE, largest_difference, parity_sentence, trained_features
from lcl_ds.release.vision import image_processor

ONNX_FILE, TORCH_FILE = "model.onnx", "model.pt2"
PRIVATE = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node")
"""What torch notes at each operation of a graph; it names files of the machine that exported it."""
USAGE = """\
```python
{imports}
from PIL import Image
from transformers import AutoImageProcessor  # or scale to {size} px, cut out the middle, normalise

image = Image.new("RGB", (640, 480), "red")  # yours: Image.open("photo.jpg")
processor = AutoImageProcessor.from_pretrained("{folder}")
pixel_values = processor(images=image, return_tensors="{tensors}")["pixel_values"]  # [images, 3, {size}, {size}]
{run}
patches = outputs["patches"]  # [images, {patches}, {width}], after the final norm: what training reads
{pooled}```
"""
POOLED = 'features = outputs["pooled"]  # [images, {width}], what the attentive pooling makes of the patches\n'
RUN_ONNX = """\
session = onnxruntime.InferenceSession("{folder}/model.onnx")
names = [output.name for output in session.get_outputs()]
outputs = dict(zip(names, session.run(names, {{"pixel_values": pixel_values}})))"""
RUN_TORCH = """\
model = torch.export.load("{folder}/model.pt2").module()
with torch.no_grad():
    outputs = model(pixel_values=pixel_values)"""


class EncoderWithPooling(nn.Module):
    """What is exported: named features of normalised images."""

    def __init__(self, model: LCLModel, pools: bool):
        super().__init__()
        self.vision = model.vision
        self.pooling = model.pooling if pools else None

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Encode images [M, 3, H, W]: ``patches`` [M, N, width] and ``pooled`` [M, D]."""
        patches = self.vision(pixel_values)
        return {"patches": patches} | ({"pooled": self.pooling(patches)[0]} if self.pooling is not None else {})


def exported_program(model: LCLModel, pools: bool) -> ExportedProgram:
    """Trace encoder and pooling for any number of images, without a word about this machine."""
    size = model.vision.model.config.image_size
    example = torch.zeros(2, 3, size, size, device=next(model.vision.parameters()).device)
    with torch.no_grad():
        program = torch.export.export(
            EncoderWithPooling(model, pools).eval(),
            (),
            {"pixel_values": example},
            dynamic_shapes={"pixel_values": {0: Dim("images", min=1, max=1 << 16)}},
        )
    for node in program.graph.nodes:
        for key in PRIVATE:
            node.meta.pop(key, None)
    return program


def release_torch(model: LCLModel, origin: WeightOrigin, folder: Path, options: ReleaseOptions = DEFAULTS) -> str:
    """Write a file for ``torch.export.load`` and compare what it computes. Errors as :func:`release_onnx`."""

    def write(program: ExportedProgram) -> None:
        archive = io.BytesIO()  # torch's own writer ends the process where the disk is full
        torch.export.save(program, archive)
        (folder / TORCH_FILE).write_bytes(archive.getbuffer())

    def run(images: Tensor) -> dict[str, Tensor]:
        return torch.export.load(folder / TORCH_FILE).module()(pixel_values=images)

    usage = {"imports": "import torch", "tensors": "pt", "run": RUN_TORCH}
    return _release(model, origin, folder, options, write, run, usage, library="pytorch")


def release_onnx(model: LCLModel, origin: WeightOrigin, folder: Path, options: ReleaseOptions = DEFAULTS) -> str:
    """Write an ONNX file and compare what onnxruntime computes.

    Returns:
        One sentence with the largest difference.

    Raises:
        UserError: the features are not finite.
        RuntimeError: the graph computes other features than the training model.
    """
    import onnxruntime

    def write(program: ExportedProgram) -> None:
        names = ["patches", "pooled"] if origin.pools else ["patches"]
        # What they say of their own workings is no help to the user.
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        with warnings.catch_warnings(action="ignore"):
            torch.onnx.export(program, (), str(folder / ONNX_FILE), output_names=names, dynamo=True, verbose=False)

    def run(images: Tensor) -> dict[str, Tensor]:
        session = onnxruntime.InferenceSession(str(folder / ONNX_FILE))
        names = [output.name for output in session.get_outputs()]
        outputs = session.run(names, {"pixel_values": images.numpy()})
        return {name: torch.from_numpy(values) for name, values in zip(names, outputs, strict=True)}

    usage = {"imports": "import onnxruntime", "tensors": "np", "run": RUN_ONNX}
    return _release(model, origin, folder, options, write, run, usage, library="onnx")


def _release(
    model: LCLModel,
    origin: WeightOrigin,
    folder: Path,
    options: ReleaseOptions,
    write: Callable[[ExportedProgram], None],
    run: Callable[[Tensor], dict[str, Tensor]],
    usage: dict[str, str],
    library: str,
) -> str:
    features = trained_features(model, origin)
    write(exported_program(model, origin.pools))
    config = model.vision.model.config
    image_processor(config, flat_patches=False).save_pretrained(folder)
    with torch.no_grad():
        theirs = run(features.images)
        # Another number of images than the graph was traced with.
        single = {name: values[:1] for name, values in features.by_name().items()}
        largest_difference(single, run(features.images[:1]), OTHER_CODE, f"the {library} graph of one image")
    difference = largest_difference(features.by_name(), theirs, OTHER_CODE, f"the {library} graph")
    checked = parity_sentence(difference, OTHER_CODE, origin)
    name = options.name_in_code(folder)
    text = USAGE.format(
        folder=name,
        size=config.image_size,
        patches=model.vision.patch_tokens,
        width=config.hidden_size,
        pooled=POOLED.format(width=model.pooling.q.out_features) if origin.pools else "",
        **{**usage, "run": usage["run"].format(folder=name)},
    )
    write_card(folder, model, origin, options, text, checked, library=library)
    return checked
