"""Write all weights of the training model in the layout of the published code."""

import json
from pathlib import Path

from safetensors.torch import save_file

from lcl_ds.models.network import LCLModel
from lcl_ds.models.weights.published import to_published, write_published_config
from lcl_ds.tokens import Vocabulary


def write_published(model: LCLModel, vocabulary: Vocabulary, folder: Path) -> None:
    """Write all weights in the layout of the published code, with its model configuration."""
    weights = to_published(model.state_dict())
    config = write_published_config(model, vocabulary)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
