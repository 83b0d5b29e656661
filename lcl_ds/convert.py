"""Release a trained encoder: ``python -m lcl_ds.convert RUN|CHECKPOINT OUT [--part vision|full]``.

``vision`` (default) writes a folder that ``transformers`` loads by itself: config.json, model.safetensors,
preprocessor_config.json and a model card. ``full`` writes all weights of the training model as one safetensors file.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModel, CLIPImageProcessorPil

from lcl_ds import __version__
from lcl_ds.config import Config
from lcl_ds.data.documents import read_document
from lcl_ds.data.images import decode_image
from lcl_ds.data.shards import Source, expand_paths, index_shard
from lcl_ds.errors import UserError
from lcl_ds.models.build import image_size
from lcl_ds.models.lcl import LCLModel
from lcl_ds.models.vision import IMAGE_MEAN, IMAGE_STD, normalize_images, patch_tokens
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

A vision encoder pre-trained from scratch by Latent Compression Learning ([arXiv 2406.07543](https://arxiv.org/abs/2406.07543))
with lcl_ds {version}: step {step} of {steps}, {parameters:,} parameters, {size} px images, patches of {patch} px.

Training reads the **patch tokens after the final norm**; the class token takes part in attention but no loss reads it.

```python
from transformers import {model_class}, {processor_class}

model = {model_class}.from_pretrained("{folder}")
processor = {processor_class}.from_pretrained("{folder}")
outputs = model(**processor(images=image, return_tensors="pt"))
patches = {features}  # [images, {patches}, {width}]
```

Checked at conversion: largest difference to the training model's patch tokens {difference:.1e} over {images} {kind}.

Settings of the run:

```yaml
{settings}```
"""


def release_vision(model: LCLModel, config: Config, step: int, out: Path) -> str:
    """Write the encoder for ``transformers`` and compare it with the training model.

    Returns:
        One sentence with the largest difference.

    Raises:
        RuntimeError: the release computes other features than the training model.
    """
    encoder = model.vision.model
    size = image_size(config.model)
    encoder.save_pretrained(out, safe_serialization=True)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    processor.save_pretrained(out)
    pixels, kind = _parity_pixels(config, size)
    released = AutoModel.from_pretrained(out).eval()
    with torch.no_grad():
        images = normalize_images(torch.from_numpy(pixels), torch.float32)
        ours = model.vision(images)
        theirs = patch_tokens(released, images)[:, -model.vision.patch_tokens :]
    difference = float((ours - theirs).abs().max())
    if not difference <= PARITY_TOLERANCE:
        raise RuntimeError(f"{out}: the released encoder differs from the training model by {difference:.1e}")
    is_clip = encoder.config.model_type == "clip_vision_model"
    tokens = "outputs.last_hidden_state[:, 1:]"
    card = MODEL_CARD.format(
        model_type=encoder.config.model_type,
        name=f"{config.name}: LCL vision encoder",
        version=__version__,
        step=step,
        steps=config.train.steps,
        parameters=sum(weight.numel() for weight in encoder.parameters()),
        size=size,
        patch=encoder.config.patch_size,
        model_class=type(encoder).__name__,
        processor_class=type(processor).__name__,
        folder=out.name,
        features=f"model.post_layernorm({tokens})" if is_clip else tokens,
        patches=model.vision.patch_tokens,
        width=encoder.config.hidden_size,
        difference=difference,
        images=len(pixels),
        kind=kind,
        settings=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    return f"parity with the training model: max abs difference {difference:.1e} over {len(pixels)} {kind}"


def _parity_pixels(config: Config, size: int) -> tuple[np.ndarray, str]:
    """Images of the run's own data; noise where its shards are no longer there."""
    paths = config.evaluation.shards or config.data.shards[0].paths
    try:
        source = Source("parity", [index_shard(expand_paths(paths)[0])])
    except UserError:
        rng = np.random.default_rng(0)
        noise = rng.integers(0, 256, (PARITY_IMAGES, 3, size, size), dtype=np.uint8)
        return noise, "images of noise (the run's shards are not here)"
    pixels: list[np.ndarray] = []
    for number in range(len(source)):
        document = read_document(source, number)
        pixels += [decode_image(source.read(number, suffix), size) for suffix in document.images]
        if len(pixels) >= PARITY_IMAGES:
            break
    return np.stack(pixels[:PARITY_IMAGES]), "real images"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcl_ds.convert", description=__doc__)
    parser.add_argument("source", type=Path, metavar="RUN|CHECKPOINT")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--part", choices=("vision", "full"), default="vision")
    arguments = parser.parse_args(argv)
    try:
        checkpoint = resolve_checkpoint(arguments.source)
        if arguments.out.exists() and any(arguments.out.iterdir()):
            raise UserError(f"{arguments.out}: is not empty; name a new folder")
        config, step = load_config_of(checkpoint), read_state(checkpoint)["progress"]["step"]
        model = load_model(checkpoint)
        arguments.out.mkdir(parents=True, exist_ok=True)
        if arguments.part == "full":
            weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
            save_file(weights, arguments.out / "model.safetensors", metadata={"format": "pt", "step": str(step)})
            (arguments.out / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        else:
            print(release_vision(model, config, step, arguments.out))
    except UserError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    print(f"{checkpoint} -> {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
