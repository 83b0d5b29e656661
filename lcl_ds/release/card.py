"""Write the model card of a release."""

from pathlib import Path

import yaml
from huggingface_hub import ModelCardData

from lcl_ds.models.network import LCLModel
from lcl_ds.release.options import ReleaseOptions
from lcl_ds.release.origin import WeightOrigin

HEAD = """\
# {name}: LCL vision encoder

A vision encoder pre-trained by Latent Compression Learning ([arXiv 2406.07543](https://arxiv.org/abs/2406.07543))
{history}: {parameters:,} parameters, {size} px images, patches of {patch} px.
"""


def write_card(
    folder: Path,
    model: LCLModel,
    origin: WeightOrigin,
    options: ReleaseOptions,
    usage: str,
    checked: str,
    library: str = "transformers",
) -> None:
    """Write ``README.md``.

    Args:
        usage: the section on loading the folder.
        checked: one sentence about the comparison with the training model.
        library: that loads the folder, as Hugging Face names it.
    """
    encoder = model.vision.model
    facts = ModelCardData(
        library_name=library,
        pipeline_tag="image-feature-extraction",
        tags=["lcl", "vision", encoder.config.model_type],
    )
    head = HEAD.format(
        name=origin.name,
        history=origin.history,
        parameters=sum(weight.numel() for weight in encoder.parameters()),
        size=encoder.config.image_size,
        patch=encoder.config.patch_size,
    )
    settings = f"Settings:\n\n```yaml\n{yaml.safe_dump(origin.settings, sort_keys=False)}```\n"
    sections = [f"---\n{facts.to_yaml()}\n---\n{head}", usage, f"Checked at conversion: {checked}.\n", settings]
    (folder / "README.md").write_text("\n".join(sections), encoding="utf-8", errors="backslashreplace")
