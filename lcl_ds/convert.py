"""Release a trained encoder: ``python -m lcl_ds.convert RUN|CHECKPOINT OUT [--part vision|full] [--ema]``.

``vision`` (default) writes a folder that ``transformers`` loads by itself: config.json, model.safetensors,
preprocessor_config.json and a model card; with ``trust_remote_code=True`` its pooled output is the attentive pooling.
``full`` writes all weights of the training model as one safetensors file; with ``--format reference`` in the layout of
the published code. ``--from reference FILE --config JSON`` reads a checkpoint of the published code instead of a run.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, CLIPImageProcessorPil, Siglip2ImageProcessorPil
from transformers.utils import logging as transformers_logging

from lcl_ds import __version__
from lcl_ds.cli import program_name, run_command
from lcl_ds.config import Config
from lcl_ds.data.documents import BadSampleError, read_document
from lcl_ds.data.images import decode_image
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.storage import expand_paths
from lcl_ds.errors import UserError
from lcl_ds.files import plain_name, system_error, whole_folder
from lcl_ds.models.encoders import family_of
from lcl_ds.models.network import LCLModel
from lcl_ds.models.settings import Part
from lcl_ds.models.vision import family_inputs, image_tokens, released_patch_tokens, released_weights
from lcl_ds.models.weights.published import (
    load_published,
    read_published_config,
    read_published_json,
    to_published,
    write_published_config,
)
from lcl_ds.phases import config_of_step
from lcl_ds.remote_code import modeling_lcl
from lcl_ds.remote_code.modeling_lcl import POOLING_FILE
from lcl_ds.tokens import CONTROL_TOKENS, Vocabulary
from lcl_ds.training.checkpoint import load_config_of, load_model, read_state, resolve_checkpoint

PARITY_IMAGES = 16
PARITY_SHARDS, PARITY_SAMPLES = 8, 64
"""Shards of a source, and samples of a shard, in which pictures for the parity check are looked for."""
PARITY_TOLERANCE = 1e-5
"""Largest difference of any fp32 feature between the training model and the release, in units of the largest feature
where that is above 1."""

MODEL_CARD = """---
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [lcl, vision, {model_type}]
---
# {name}

A vision encoder pre-trained by Latent Compression Learning ([arXiv 2406.07543](https://arxiv.org/abs/2406.07543))
{history}: {parameters:,} parameters, {size} px images, patches of {patch} px.

Training reads the **patch tokens after the final norm** and an **attentive pooling** of them; where there is a class
token, no loss reads it. Code in this folder computes both:

```python
from transformers import AutoImageProcessor, AutoModel  # version 4.57 or later

model = AutoModel.from_pretrained("{folder}", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("{folder}")
outputs = model(**processor(images=image, return_tensors="pt"))
features = outputs.pooler_output  # [images, {pooled}]
patches = outputs.last_hidden_state  # [images, {patches}, {width}]
```

Without that code it is a model of transformers:

```python
from transformers import AutoImageProcessor, {model_class}  # version 4.57 or later

model = {model_class}.from_pretrained("{folder}")
processor = AutoImageProcessor.from_pretrained("{folder}")
outputs = model(**processor(images=image, return_tensors="pt"))
patches = {features}  # [images, {patches}, {width}]
```

Checked at conversion: largest difference to the training model's features {difference:.1e} over {images} {kind}.

Settings:

```yaml
{settings}```
"""


@dataclass(frozen=True)
class WeightOrigin:
    """Where a model comes from, for its card."""

    name: str
    history: str
    """One clause: what was trained, with what, how long."""
    settings: dict[str, Any]
    pixels: np.ndarray
    """uint8 [K, 3, H, W], what the release is compared on."""
    pixels_kind: str


def release_vision(model: LCLModel, origin: WeightOrigin, folder: Path, name: str = "") -> str:
    """Write the encoder for ``transformers`` and compare it with the training model.

    Args:
        folder: where to write.
        name: of the folder in the model card, where it will be renamed.

    Returns:
        One sentence with the largest difference.

    Raises:
        UserError: the features are not finite.
        RuntimeError: the release computes other features than the training model.
    """
    encoder = model.vision.model
    transformers_logging.disable_progress_bar()
    encoder.save_pretrained(folder, state_dict=released_weights(encoder))
    processor = image_processor(encoder.config)
    processor.save_pretrained(folder)
    write_pooling(model, folder)
    difference = _largest_difference(model, origin.pixels, folder)
    difference = max(difference, _difference_of_pooling(model, origin.pixels, folder))
    family = family_of(encoder.config)
    tokens = "outputs.last_hidden_state" + ("[:, 1:]" if family.has_class_token else "")
    if family.releases_unnormed_patches:
        # Its tower is the model itself in transformers 5, and a part of it in 4.
        tokens = f'getattr(model, "vision_model", model).{family.final_norm}({tokens})'
    card = MODEL_CARD.format(
        model_type=encoder.config.model_type,
        name=f"{origin.name}: LCL vision encoder",
        history=origin.history,
        parameters=sum(weight.numel() for weight in encoder.parameters()),
        size=encoder.config.image_size,
        patch=encoder.config.patch_size,
        model_class=type(encoder).__name__,
        folder=name or folder.name,
        features=tokens,
        patches=model.vision.patch_tokens,
        width=encoder.config.hidden_size,
        pooled=model.pooling.q.out_features,
        difference=difference,
        images=len(origin.pixels),
        kind=origin.pixels_kind,
        settings=yaml.safe_dump(origin.settings, sort_keys=False),
    )
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
    return (
        f"parity with the training model: max abs difference {difference:.1e} over {len(origin.pixels)} "
        f"{origin.pixels_kind}"
    )


@torch.no_grad()
def _largest_difference(model: LCLModel, pixels: np.ndarray, folder: Path) -> float:
    """Compare the patch tokens of the training model with the release's; see :func:`release_vision` for errors."""
    images = model.vision.normalize(torch.from_numpy(pixels))
    ours = model.vision(images)
    if not ours.isfinite().all():
        raise UserError("the encoder's features are not finite; release an earlier checkpoint")
    # With the same attention kernel: others round differently, and more so in deep and large models.
    implementation = model.vision.model.config._attn_implementation
    released, loading = AutoModel.from_pretrained(
        folder, attn_implementation=implementation, dtype=torch.float32, output_loading_info=True
    )
    wrong = {kind: names for kind, names in loading.items() if names}
    difference = float((ours - released_patch_tokens(released.eval(), images)).abs().max())
    if wrong or not difference <= PARITY_TOLERANCE * max(1.0, float(ours.abs().max())):
        raise RuntimeError(f"the released encoder differs from the training model by {difference:.1e}; {wrong}")
    return difference


def write_pooling(model: LCLModel, folder: Path) -> None:
    """Write the pooling head beside the encoder, and the code that ``trust_remote_code=True`` runs."""
    save_file(model.pooling.state_dict(), folder / POOLING_FILE, metadata={"format": "pt"})
    shutil.copyfile(modeling_lcl.__file__, folder / "modeling_lcl.py")
    pooling, file = model.pooling, folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModel": "modeling_lcl.LclVisionModel"}
    config["lcl_pooling"] = {
        "width": pooling.q.in_features,
        "output_width": pooling.q.out_features,
        "heads": pooling.num_heads,
        "eps": pooling.norm_q.eps,
    }
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def _difference_of_pooling(model: LCLModel, pixels: np.ndarray, folder: Path) -> float:
    """Compare tokens and pooled features with those of the code in the folder; errors as above."""
    images = model.vision.normalize(torch.from_numpy(pixels))
    ours = model.vision(images)
    pooled, _ = model.pooling(ours)
    implementation = model.vision.model.config._attn_implementation
    released, loading = modeling_lcl.LclVisionModel.from_pretrained(
        folder, attn_implementation=implementation, dtype=torch.float32, output_loading_info=True
    )
    outputs = released(**family_inputs(released, images))
    wrong = {kind: names for kind, names in loading.items() if names}
    pairs = [(ours, outputs.last_hidden_state), (pooled, outputs.pooler_output)]
    differences = [float((one - other).abs().max()) for one, other in pairs]
    limits = [PARITY_TOLERANCE * max(1.0, float(one.abs().max())) for one, _ in pairs]
    if wrong or not all(difference <= limit for difference, limit in zip(differences, limits, strict=True)):
        raise RuntimeError(f"the released pooling differs from the training model by {differences}; {wrong}")
    return max(differences)


def image_processor(config: Any) -> Any:
    """Make what turns pictures of any size into the tower's inputs.

    For SigLIP 2 these are flattened patches that keep the aspect, for the others a square in the middle.
    """
    statistics: dict[str, Any] = {"image_mean": list(config.image_mean), "image_std": list(config.image_std)}
    if family_of(config).reads_flat_patches:
        return Siglip2ImageProcessorPil(
            patch_size=config.patch_size, max_num_patches=image_tokens(config), **statistics
        )
    size = config.image_size
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **statistics)


def _pixels_of(config: Config, size: int) -> tuple[np.ndarray, str]:
    """Read images of the run's own data as far as its shards are still here; else make noise."""
    pixels = list(islice(_images_of(config, size), PARITY_IMAGES))
    if not pixels:
        return _noise(size), "images of noise (no image of the run's shards could be read here)"
    return np.stack(pixels), "real images"


def _images_of(config: Config, size: int) -> Iterator[np.ndarray]:
    """Decode images of the held-out and then of the training shards; what cannot be read is passed over.

    A run may be somebody else's, so commands in its settings are not executed, and nothing is fetched.
    """
    for paths in filter(None, [config.evaluation.shards, *(entry.paths for entry in config.data.shards)]):
        for shard in _local_shards(paths)[:PARITY_SHARDS]:
            try:
                source = Source("parity", [index_shard(shard)])
                for number in range(min(len(source), PARITY_SAMPLES)):
                    yield from _images_in(source, number, size, config.data.max_text_bytes)
            except (UserError, OSError):
                continue


def _images_in(source: Source, number: int, size: int, max_text_bytes: int) -> Iterator[np.ndarray]:
    try:
        for suffix in read_document(source, number, max_text_bytes).images:
            yield decode_image(source.read(number, suffix), size)
    except BadSampleError:
        return


def _local_shards(paths: str | Sequence[str]) -> list[str]:
    """List the plain files among a run's locations."""
    locations: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        if "://" not in path:
            try:
                locations += expand_paths(path)
            except (UserError, OSError, ValueError):  # ValueError: braces that do not fit, bytes that are no text
                continue
    # Names of commands and addresses, which braces and lists may yield, are no files.
    return [location for location in locations if Path(location).is_file()]


def _noise(size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (PARITY_IMAGES, 3, size, size), dtype=np.uint8)


def read_run(
    run_or_checkpoint: Path, parts: Collection[Part] = (), ema: bool = False
) -> tuple[LCLModel, WeightOrigin, Vocabulary]:
    """Read the newest, or the named, checkpoint of a run.

    Args:
        parts: the only parts to read; see :func:`lcl_ds.training.checkpoint.load_model`.
        ema: take the vision tower from its moving average.

    Raises:
        UserError: there is none, or it is damaged, or it has no moving average.
    """
    checkpoint = resolve_checkpoint(run_or_checkpoint)
    with _damage_named(checkpoint):
        state = read_state(checkpoint)
        step, vocab_size = state["progress"]["step"], state["vocab_size"]
        config = config_of_step(load_config_of(checkpoint), step)
        model = load_model(checkpoint, parts=parts, ema=ema)
    history = f"with lcl_ds {__version__}, step {step} of {config.train.steps}"
    if ema:
        history += f", moving average of its weights (decay {config.train.ema_decay})"
    origin = WeightOrigin(
        config.name, history, config.model_dump(mode="json"), *_pixels_of(config, model.vision.model.config.image_size)
    )
    return model, origin, Vocabulary(vocab_size - len(CONTROL_TOKENS))


@contextmanager
def _damage_named(checkpoint: Path) -> Iterator[None]:
    """Turn whatever readers of zip, pickle, YAML and JSON say about damaged files into a sentence."""
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{checkpoint}: is damaged and cannot be read ({said}); name another checkpoint") from error


def read_published(file: Path, config_file: Path | None) -> tuple[LCLModel, WeightOrigin, Vocabulary]:
    """Read a checkpoint of the published code."""
    if config_file is None:
        raise UserError("--from reference needs --config, the JSON model configuration of the published code")
    config = read_published_json(config_file)
    vocabulary = read_published_config(config, str(config_file)).vocabulary
    model = load_published(file, config)
    history = f"with the published code, imported by lcl_ds {__version__}"
    size = model.vision.model.config.image_size
    return model, WeightOrigin(config_file.stem, history, config, _noise(size), "images of noise"), vocabulary


def write_all(model: LCLModel, origin: WeightOrigin, folder: Path) -> None:
    """Write all weights under our names, with the settings beside them."""
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    _save(weights, folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(origin.settings, sort_keys=False), encoding="utf-8")


def write_published(model: LCLModel, vocabulary: Vocabulary, folder: Path) -> None:
    """Write all weights in the layout of the published code, with its model configuration."""
    weights = to_published(model.state_dict())
    config = write_published_config(model, vocabulary)
    _save(weights, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")


def _save(weights: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@contextmanager
def release_folder(out: Path) -> Iterator[Path]:
    """Make a new folder that becomes ``out`` when it is whole, with files that others may read as the umask says.

    Raises:
        UserError: ``out`` is a file, or a folder that is not empty.
        OSError: it cannot be written; with a path.
    """
    with whole_folder(out) as folder:
        try:
            with plain_name(folder) as plain:
                yield plain
        except SafetensorError as error:
            raise system_error(error, out) or error from error
        mode = folder.stat().st_mode & 0o666
        for file in folder.iterdir():  # safetensors writes for the owner alone
            file.chmod(mode)


def convert(arguments: argparse.Namespace) -> int:
    """Read, write and compare, as the command line asks."""
    if arguments.format == "reference" and arguments.part == "vision":
        raise UserError("--format reference: the published layout holds the whole model; leave out --part vision")
    if arguments.ema and arguments.origin == "reference":
        raise UserError("--ema: a file of the published code holds no moving average; leave it out")
    sentences = []
    with release_folder(arguments.out) as folder:
        if arguments.origin == "reference":
            model, origin, vocabulary = read_published(arguments.run_or_file, arguments.config)
        else:
            releases_all = arguments.format == "reference" or arguments.part == "full"
            parts: tuple[Part, ...] = () if releases_all else ("vision", "pooling")
            model, origin, vocabulary = read_run(arguments.run_or_file, parts, arguments.ema)
        if arguments.format == "reference":
            write_published(model, vocabulary, folder)
        elif arguments.part == "full":
            write_all(model, origin, folder)
        else:
            sentences.append(release_vision(model, origin, folder, arguments.out.resolve().name))
    print("\n".join([*sentences, f"{arguments.run_or_file} -> {arguments.out}"]))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=program_name("convert"), description=__doc__)
    parser.add_argument("run_or_file", type=Path, metavar="RUN|CHECKPOINT|FILE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--part", choices=("vision", "full"), help="default: vision; with --format reference: full")
    parser.add_argument("--format", choices=("hf", "reference"), default="hf", help="layout that is written")
    parser.add_argument(
        "--from",
        dest="origin",
        choices=("run", "reference"),
        default="run",
        help="what is read: a run or checkpoint, or a file of the published code",
    )
    parser.add_argument("--config", type=Path, metavar="JSON", help="model configuration of --from reference")
    parser.add_argument(
        "--ema", action="store_true", help="take the vision tower from its moving average (train.ema_decay)"
    )
    arguments = parser.parse_args(argv)
    return run_command(lambda: convert(arguments))


if __name__ == "__main__":
    sys.exit(main())
