"""The published checkpoint format (OpenGVLab/LCL, a fork of OpenCLIP), read and written.

Its text tower is a pre-norm GELU transformer with learned positions, which is GPT-2's shape; its image tower is CLIP's.
Every tensor is copied, transposed, split or reshaped, never computed, so there and back again is bit-exact.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from lcl_ds.errors import UserError
from lcl_ds.models.build import build_model
from lcl_ds.models.network import LCLModel
from lcl_ds.models.settings import ModelSettings
from lcl_ds.tokens import Vocabulary

CONTROL_NAMES = ("<start_of_text>", "<end_of_text>", "<img_placehold>", "<start_of_img>", "<end_of_img>")
PAD = 0
"""The published padding id, which is also the token "!": it carries no loss there."""
IGNORED = {"text.attn_mask"}
"""A buffer that some versions save."""

Change = Literal["same", "transpose", "flat"]
"""How a tensor changes from the published format to ours; ``flat``: from a scalar to one element."""

HEADS: list[tuple[str, str, Change]] = [
    ("visual.class_embedding", "vision.model.embeddings.class_embedding", "same"),
    ("visual.conv1.weight", "vision.model.embeddings.patch_embedding.weight", "same"),
    ("visual.positional_embedding", "vision.model.embeddings.position_embedding.weight", "same"),
    ("text.token_embedding.weight", "decoder.wte.weight", "same"),
    ("text.positional_embedding", "decoder.wpe.weight", "same"),
    ("text.text_projection", "context_head.proj.weight", "transpose"),
    ("lm_head.1.weight", "lm_head.weight", "same"),
    ("logit_scale", "logit_scale.log_scale", "flat"),
    ("pool_project.query_token", "pooling.query", "same"),
    ("pool_project.pooler.cross_attn.proj.weight", "pooling.proj.weight", "same"),
    *(
        entry
        for x in "qkv"
        for entry in (
            (f"pool_project.pooler.cross_attn.{x}.weight", f"pooling.{x}.weight", "same"),
            (f"pool_project.pooler.cross_attn.{x}_bias", f"pooling.{x}.bias", "same"),
        )
    ),
]
"""(published name, our name, change) of tensors that exist once, without the norms."""

NORMS = {
    "visual.ln_pre": "vision.model.pre_layrnorm",
    "visual.ln_post": "vision.model.post_layernorm",
    "text.ln_final": "context_head.norm",
    "lm_head.0": "lm_head.norm",
    **{f"pool_project.pooler.norm1_{x}": f"pooling.norm_{x}" for x in "qkv"},
}

VISION_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TEXT_BLOCK = {
    "ln_1": "ln_1",
    "ln_2": "ln_2",
    "attn.out_proj": "attn.c_proj",
    "mlp.c_fc": "mlp.c_fc",
    "mlp.c_proj": "mlp.c_proj",
}


@dataclass(frozen=True)
class PublishedConfig:
    """What the published JSON model configuration says."""

    model: ModelSettings
    vocabulary: Vocabulary
    vocab_size: int
    context_length: int


def read_published_config(config: Mapping[str, Any], origin: str = "published configuration") -> PublishedConfig:
    """Read the settings of a published model.

    Args:
        config: the JSON of ``model_configs/LCL_*.json``.
        origin: names it in messages.

    Raises:
        UserError: a key is missing, or the model is of a kind that was never published.
    """
    try:
        vision, text, pool = config["vision_cfg"], config["text_cfg"], config["pool_project_cfg"]
        special = config.get("special_token_ids") or text.get("special_token_ids") or {}
        first = special.get(CONTROL_NAMES[0], text["vocab_size"] - len(CONTROL_NAMES))
        heads = vision["width"] // vision.get("head_width", 64)
        settings = {
            "vision": {
                "model_type": "clip_vision_model",
                "hidden_size": vision["width"],
                "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
                "num_hidden_layers": vision["layers"],
                "num_attention_heads": heads,
                "image_size": vision["image_size"],
                "patch_size": vision["patch_size"],
                "hidden_act": "gelu",
            },
            "pooling": {"num_attention_heads": pool["attn_num_heads"]},
            "decoder": {
                "model_type": "gpt2",
                "n_embd": text["width"],
                "n_layer": text["layers"],
                "n_head": text["heads"],
                "activation_function": "gelu",
            },
        }
        widths = {text["width"], config["embed_dim"], pool["output_dim"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{origin}: not a configuration of the published LCL: {error} is missing") from error
    ids = [special.get(name, first + i) for i, name in enumerate(CONTROL_NAMES)]
    if ids != list(range(first, first + len(CONTROL_NAMES))):
        raise UserError(f"{origin}: special_token_ids: {ids} do not follow each other in the order {CONTROL_NAMES}")
    if len(widths) > 1:
        raise UserError(f"{origin}: embed_dim, text_cfg.width and pool_project_cfg.output_dim differ: {sorted(widths)}")
    return PublishedConfig(
        ModelSettings.model_validate(settings), Vocabulary(first), text["vocab_size"], text["context_length"]
    )


def load_published(weights: Path | Mapping[str, Tensor], config: Mapping[str, Any]) -> LCLModel:
    """Build a model with published weights, fp32 on the CPU.

    Args:
        weights: a state dict, or a file with one (``.pt``, also inside ``{"state_dict": ...}``, or ``.safetensors``);
            names may begin with ``module.``.
        config: the published JSON model configuration.

    Raises:
        UserError: the file cannot be read, or names or shapes do not fit; all of them are listed.
    """
    published = read_published_config(config)
    origin = str(weights) if isinstance(weights, Path) else "state dict"
    state = read_state_dict(weights) if isinstance(weights, Path) else weights
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    state = {name: tensor.float() for name, tensor in state.items() if name not in IGNORED}
    model = build_model(published.model, published.vocab_size, published.context_length, seed=0)
    expected = {name: tensor.shape for name, tensor in to_published(model.state_dict()).items()}
    problems = [f"{name} is missing" for name in expected.keys() - state.keys()]
    problems += [f"{name} is not part of the model" for name in state.keys() - expected.keys()]
    problems += [
        f"{name} is {list(state[name].shape)}, the configuration says {list(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if problems:
        raise UserError([f"{origin}: {problem}" for problem in sorted(problems)])
    model.load_state_dict(from_published(state))
    return model


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint file. Nothing in it is executed.

    Raises:
        UserError: it cannot be read as tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle, zip and safetensors all have errors of their own
        raise UserError(f"{path}: cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: holds no state dict: a mapping of names to tensors is expected")
    return dict(content)


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert published names and layouts to those of :class:`LCLModel`."""
    ours: dict[str, Tensor] = {}
    for there, here, change in _single_weights():
        ours[here] = _changed(state[there], change, back=False)
    for i in _layers(state, r"visual\.transformer\.resblocks\.(\d+)\."):
        there_prefix, here_prefix = f"visual.transformer.resblocks.{i}.", f"vision.model.encoder.layers.{i}."
        ours |= {here: state[there] for there, here in _vision_block_weights(i)}
        for kind in ("weight", "bias"):
            for x, weight in zip("qkv", state[f"{there_prefix}attn.in_proj_{kind}"].chunk(3), strict=True):
                ours[f"{here_prefix}self_attn.{x}_proj.{kind}"] = weight.clone()
    for i in _layers(state, r"text\.transformer\.resblocks\.(\d+)\."):
        for there, here, change in _text_block_weights(i):
            ours[here] = _changed(state[there], change, back=False)
    return ours


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert back: the inverse of :func:`from_published`.

    Raises:
        UserError: the towers are not CLIP's and GPT-2's, which alone the published format has.
    """
    theirs: dict[str, Tensor] = {}
    try:
        for there, here, change in _single_weights():
            theirs[there] = _changed(state[here], change, back=True)
        for i in _layers(state, r"vision\.model\.encoder\.layers\.(\d+)\."):
            there_prefix, here_prefix = f"visual.transformer.resblocks.{i}.", f"vision.model.encoder.layers.{i}."
            theirs |= {there: state[here] for there, here in _vision_block_weights(i)}
            for kind in ("weight", "bias"):
                projections = [state[f"{here_prefix}self_attn.{x}_proj.{kind}"] for x in "qkv"]
                theirs[f"{there_prefix}attn.in_proj_{kind}"] = torch.cat(projections)
        for i in _layers(state, r"decoder\.h\.(\d+)\."):
            for there, here, change in _text_block_weights(i):
                theirs[there] = _changed(state[here], change, back=True)
    except KeyError as error:
        raise UserError(
            f"the published format has a CLIP vision tower and a GPT-2 decoder; this model has no {error}"
        ) from error
    return theirs


def write_published_config(model: LCLModel, vocabulary: Vocabulary) -> dict[str, Any]:
    """Write the JSON model configuration of the published code, which :func:`read_published_config` reads.

    Raises:
        UserError: the model computes something that the published code cannot.
    """
    vision, text = model.vision.model.config, model.decoder.config
    for tower, activation in (("vision", getattr(vision, "hidden_act", None)), ("decoder", _activation(text))):
        if activation != "gelu":
            raise UserError(f"the published format has exact GELU in both towers; model.{tower} has {activation}")
    ids = range(vocabulary.sot, vocabulary.sot + len(CONTROL_NAMES))
    return {
        "embed_dim": text.n_embd,
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        },
        "text_cfg": {
            "context_length": text.n_positions,
            "vocab_size": text.vocab_size,
            "width": text.n_embd,
            "heads": text.n_head,
            "layers": text.n_layer,
        },
        "pool_project_cfg": {
            "pool_proj_type": "attn",
            "input_dim": vision.hidden_size,
            "output_dim": text.n_embd,
            "attn_num_heads": model.pooling.num_heads,
        },
        "special_token_ids": dict(zip(CONTROL_NAMES, ids, strict=True)),
        "custom_text": True,
    }


def _activation(config: Any) -> str | None:
    return getattr(config, "activation_function", None)


def read_published_json(path: Path) -> dict[str, Any]:
    """Read the published JSON model configuration in a file.

    Raises:
        UserError: the file is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is expected")
    return content


def _single_weights() -> list[tuple[str, str, Change]]:
    norms: list[tuple[str, str, Change]] = [
        (f"{there}.{kind}", f"{here}.{kind}", "same") for there, here in NORMS.items() for kind in ("weight", "bias")
    ]
    return HEADS + norms


def _vision_block_weights(layer: int) -> list[tuple[str, str]]:
    """List the weights of a block but the projections of queries, keys and values, which are one matrix there."""
    there_prefix, here_prefix = f"visual.transformer.resblocks.{layer}.", f"vision.model.encoder.layers.{layer}."
    return [
        (f"{there_prefix}{there}.{kind}", f"{here_prefix}{here}.{kind}")
        for there, here in VISION_BLOCK.items()
        for kind in ("weight", "bias")
    ]


def _text_block_weights(layer: int) -> list[tuple[str, str, Change]]:
    """List the weights of a block; GPT-2 keeps the matrices of its linear layers transposed."""
    there_prefix, here_prefix = f"text.transformer.resblocks.{layer}.", f"decoder.h.{layer}."
    weights: list[tuple[str, str, Change]] = [
        (f"{there_prefix}attn.in_proj_weight", f"{here_prefix}attn.c_attn.weight", "transpose"),
        (f"{there_prefix}attn.in_proj_bias", f"{here_prefix}attn.c_attn.bias", "same"),
    ]
    for there, here in TEXT_BLOCK.items():
        matrix: Change = "same" if there.startswith("ln_") else "transpose"
        weights.append((f"{there_prefix}{there}.weight", f"{here_prefix}{here}.weight", matrix))
        weights.append((f"{there_prefix}{there}.bias", f"{here_prefix}{here}.bias", "same"))
    return weights


def _changed(tensor: Tensor, change: Change, *, back: bool) -> Tensor:
    if change == "transpose":
        return tensor.t().contiguous()
    if change == "flat":
        return tensor.reshape(() if back else (1,))
    return tensor


def _layers(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    matches = (re.match(pattern, name) for name in state)
    return sorted({int(match.group(1)) for match in matches if match})
