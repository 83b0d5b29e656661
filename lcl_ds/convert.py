"""Release a trained encoder: ``python -m lcl_ds.convert RUN|CHECKPOINT OUT [--part vision|full]``.

``vision`` (default) writes a folder that ``transformers`` loads by itself: config.json, model.safetensors,
preprocessor_config.json and a model card. ``full`` writes all weights of the training model as one safetensors file;
with ``--format reference`` in the layout of the published code. ``--from reference FILE --config JSON`` reads a
checkpoint of the published code in place of a run.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModel, CLIPImageProcessorPil, Siglip2ImageProcessorPil

from lcl_ds import __version__
from lcl_ds.config import Config
from lcl_ds.data.documents import read_document
from lcl_ds.data.images import decode_image
from lcl_ds.data.shards import Source, expand_paths, index_shard
from lcl_ds.errors import UserError
from lcl_ds.models.lcl import LCLModel
from lcl_ds.models.reference import (
    load_reference,
    read_reference_config,
    read_reference_json,
    to_reference,
    write_reference_config,
)
from lcl_ds.models.vision import image_tokens, released_patch_tokens
from lcl_ds.tokens import CONTROL_TOKENS, Vocabulary
from lcl_ds.training.checkpoint import load_config_of, load_model, read_state, resolve_checkpoint

PARITY_IMAGES = 16
PARITY_TOLERANCE = 1e-5
"""Largest difference of any fp32 feature between the training model and the release."""

MODEL_CARD = """---
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [lcl, vision, {model_type}]
---
# {name}

A vision encoder pre-trained by Latent Compression Learning ([arXiv 2406.07543](https://arxiv.org/abs/2406.07543))
{history}: {parameters:,} parameters, {size} px images, patches of {patch} px.

Training reads the **patch tokens after the final norm**; where there is a class token, no loss reads it.

```python
from transformers import {model_class}, {processor_class}

model = {model_class}.from_pretrained("{folder}")
processor = {processor_class}.from_pretrained("{folder}")
outputs = model(**processor(images=image, return_tensors="pt"))
patches = {features}  # [images, {patches}, {width}]
```

Checked at conversion: largest difference to the training model's patch tokens {difference:.1e} over {images} {kind}.

Settings:

```yaml
{settings}```
"""


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, for its card."""

    name: str
    history: str
    """One clause: what was trained, with what, how long."""
    settings: dict[str, Any]
    pixels: np.ndarray
    """uint8 [K, 3, H, W], what the release is compared on."""
    pixels_kind: str


def release_vision(model: LCLModel, origin: Origin, out: Path) -> str:
    """Write the encoder for ``transformers`` and compare it with the training model.

    Returns:
        One sentence with the largest difference.

    Raises:
        RuntimeError: the release computes other features than the training model.
    """
    encoder = model.vision.model
    encoder.save_pretrained(out, safe_serialization=True)
    processor = image_processor(encoder.config)
    processor.save_pretrained(out)
    released = AutoModel.from_pretrained(out).eval()
    with torch.no_grad():
        images = model.vision.normalize(torch.from_numpy(origin.pixels))
        ours = model.vision(images)
        theirs = released_patch_tokens(released, images)
    difference = float((ours - theirs).abs().max())
    if not difference <= PARITY_TOLERANCE:
        raise RuntimeError(f"{out}: the released encoder differs from the training model by {difference:.1e}")
    family = encoder.config.model_type
    tokens = "outputs.last_hidden_state" + ("" if family.startswith("siglip") else "[:, 1:]")
    card = MODEL_CARD.format(
        model_type=family,
        name=f"{origin.name}: LCL vision encoder",
        history=origin.history,
        parameters=sum(weight.numel() for weight in encoder.parameters()),
        size=encoder.config.image_size,
        patch=encoder.config.patch_size,
        model_class=type(encoder).__name__,
        processor_class=type(processor).__name__,
        folder=out.name,
        features=f"model.post_layernorm({tokens})" if family == "clip_vision_model" else tokens,
        patches=model.vision.patch_tokens,
        width=encoder.config.hidden_size,
        difference=difference,
        images=len(origin.pixels),
        kind=origin.pixels_kind,
        settings=yaml.safe_dump(origin.settings, sort_keys=False),
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    return (
        f"parity with the training model: max abs difference {difference:.1e} over {len(origin.pixels)} "
        f"{origin.pixels_kind}"
    )


def image_processor(config: Any) -> Any:
    """What makes the tower's inputs from pictures of any size: for SigLIP 2 flattened patches that keep their aspect,
    for the others a square in the middle."""
    statistics: dict[str, Any] = {"image_mean": list(config.image_mean), "image_std": list(config.image_std)}
    if config.model_type == "siglip2_vision_model":
        return Siglip2ImageProcessorPil(
            patch_size=config.patch_size, max_num_patches=image_tokens(config), **statistics
        )
    size = config.image_size
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **statistics)


def _pixels_of(config: Config, size: int) -> tuple[np.ndarray, str]:
    """Images of the run's own data; noise where its shards are no longer there."""
    paths = config.evaluation.shards or config.data.shards[0].paths
    try:
        source = Source("parity", [index_shard(expand_paths(paths)[0])])
    except UserError:
        return _noise(size), "images of noise (the run's shards are not here)"
    pixels: list[np.ndarray] = []
    for number in range(len(source)):
        document = read_document(source, number)
        pixels += [decode_image(source.read(number, suffix), size) for suffix in document.images]
        if len(pixels) >= PARITY_IMAGES:
            break
    return np.stack(pixels[:PARITY_IMAGES]), "real images"


def _noise(size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (PARITY_IMAGES, 3, size, size), dtype=np.uint8)


def read_run(source: Path) -> tuple[LCLModel, Origin, Vocabulary]:
    """The newest, or the named, checkpoint of a run."""
    checkpoint = resolve_checkpoint(source)
    config, state = load_config_of(checkpoint), read_state(checkpoint)
    model = load_model(checkpoint)
    step = state["progress"]["step"]
    history = f"with lcl_ds {__version__}, step {step} of {config.train.steps}"
    origin = Origin(
        config.name, history, config.model_dump(mode="json"), *_pixels_of(config, model.vision.model.config.image_size)
    )
    return model, origin, Vocabulary(state["vocab_size"] - len(CONTROL_TOKENS))


def read_reference(source: Path, config_file: Path | None) -> tuple[LCLModel, Origin, Vocabulary]:
    """A checkpoint of the published code."""
    if config_file is None:
        raise UserError("--from reference needs --config, the JSON model configuration of the published code")
    config = read_reference_json(config_file)
    vocabulary = read_reference_config(config, str(config_file)).vocabulary
    model = load_reference(source, config)
    history = f"with the published code, imported by lcl_ds {__version__}"
    size = model.vision.model.config.image_size
    return model, Origin(config_file.stem, history, config, _noise(size), "images of noise"), vocabulary


def write_all(model: LCLModel, origin: Origin, out: Path) -> None:
    """All weights under our names, with the settings beside them."""
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.yaml").write_text(yaml.safe_dump(origin.settings, sort_keys=False), encoding="utf-8")


def write_reference(model: LCLModel, vocabulary: Vocabulary, out: Path) -> None:
    """All weights in the layout of the published code, with its model configuration."""
    weights = to_reference(model.state_dict())
    config = write_reference_config(model, vocabulary)
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcl_ds.convert", description=__doc__)
    parser.add_argument("source", type=Path, metavar="RUN|CHECKPOINT|FILE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--part", choices=("vision", "full"), help="default: vision; with --format reference: full")
    parser.add_argument("--format", choices=("hf", "reference"), default="hf", help="layout that is written")
    parser.add_argument("--from", dest="origin", choices=("run", "reference"), default="run", help="what SOURCE is")
    parser.add_argument("--config", type=Path, metavar="JSON", help="model configuration of --from reference")
    arguments = parser.parse_args(argv)
    try:
        if arguments.out.exists() and any(arguments.out.iterdir()):
            raise UserError(f"{arguments.out}: is not empty; name a new folder")
        if arguments.format == "reference" and arguments.part == "vision":
            raise UserError("--format reference: the published layout holds the whole model; leave out --part vision")
        if arguments.origin == "reference":
            model, origin, vocabulary = read_reference(arguments.source, arguments.config)
        else:
            model, origin, vocabulary = read_run(arguments.source)
        if arguments.format == "reference":
            write_reference(model, vocabulary, arguments.out)
        elif arguments.part == "full":
            write_all(model, origin, arguments.out)
        else:
            print(release_vision(model, origin, arguments.out))
    except UserError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    print(f"{arguments.source} -> {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
