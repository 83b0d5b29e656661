"""Write the whole network: as a folder that transformers loads with code of its own, and that trains on here."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub import save_torch_state_dict
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging as transformers_logging

from lcl_ds.config import Config
from lcl_ds.data.sequences import PairView
from lcl_ds.data.stream.packing import PackedSequence, Row, collate
from lcl_ds.errors import UserError
from lcl_ds.models.decoder import POSITION_TABLES
from lcl_ds.models.network import LCLModel
from lcl_ds.objectives import objective_module, trained_losses, view_of
from lcl_ds.release.card import write_card
from lcl_ds.release.options import DTYPES, ReleaseOptions
from lcl_ds.release.origin import WeightOrigin
from lcl_ds.release.parity import TOLERANCES, TrainedFeatures, largest_difference, parity_sentence, trained_features
from lcl_ds.release.remote import modeling_lcl, modeling_lcl_full
from lcl_ds.release.remote.modeling_lcl_full import LclConfig, LclModel
from lcl_ds.release.vision import family_facts, image_processor, in_dtype, weight_metadata
from lcl_ds.tokens import CONTROL_TOKENS, ImageSlot, TextTokenizer, TokenSequence, Vocabulary
from lcl_ds.training.input_folders import folder_contents

USAGE = """\
Code in this folder runs the whole network:

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel{tokenizer}  # version 4.57 or later

model = AutoModel.from_pretrained("{folder}", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("{folder}")
{loading}images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]  # yours: Image.open("photo.jpg")
inputs = processor(images=images, return_tensors="pt")
```
"""
TOKENIZER = 'tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)\n'
COMPARES = """
Images are compared with texts, which the decoder reads at the token `{end}` that the tokenizer puts
behind them:

```python
texts = tokenizer(["a red square", "a blue square"], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    image_features = model.get_image_features(**inputs)
    text_features = model.get_text_features(**texts)
probabilities = model.similarity(image_features, text_features).softmax(-1)  # [images, texts]
```
"""
WRITES = """
It writes a text after an image:

```python
tokens = model.caption(**inputs, max_new_tokens={room}, do_sample=False)
captions = tokenizer.batch_decode(tokens, skip_special_tokens=True)
```
"""
TRAINS_ON = """
`model.init_from={folder}` starts a training run of lcl_ds from these weights.
"""
EXACT = "logit_scale.log_scale"
"""A number that would be coarse in fewer bits."""
CODE = (Path(str(modeling_lcl.__file__)), Path(str(modeling_lcl_full.__file__)))
CAPTION_TOKENS = 20
"""Of the example in the card."""
TRIED_TOKENS = 6
"""Of the text on which a release is compared."""


@dataclass(frozen=True)
class Texts:
    """What was trained on text."""

    compares: bool
    """Whether a feature of a text is like that of its image."""
    writes: bool
    """Whether the next token is predicted from those before it."""
    end: int
    """The token that ends a text whose feature is read."""
    tokenizer: TextTokenizer | None
    note: str = ""
    """Why there is no tokenizer."""
    longest: int = 0
    """Tokens of the longest document in training."""
    room: int = 0
    """Tokens for which there are positions after an image."""


def texts_of(model: LCLModel, origin: WeightOrigin, vocabulary: Vocabulary) -> Texts:
    """Read from a run's settings what its objective trained on text."""
    has_room = room_for_text(model) > 0
    config = origin.config
    if config is None:
        return Texts(True, has_room, vocabulary.soi, None, "the published code's tokenizer is not in its checkpoint")
    settings, trained = config.objective, trained_losses(config.objective)
    is_pairs = isinstance(view_of(settings, 0.5), PairView)
    tokenizer, note = None, ""
    try:
        tokenizer = tokenizer_of(config, origin.tokenizer_contents, vocabulary)
    except ValueError as error:
        note = str(error)
    return Texts(
        compares="contrastive_loss" in trained,
        # The decoder of masked modelling sees what comes.
        writes="generation_loss" in trained and settings.name != "masked" and has_room,
        end=vocabulary.eot if is_pairs else vocabulary.soi,
        tokenizer=tokenizer,
        note=note,
        longest=config.data.longest_document,
        room=room_for_text(model),
    )


def room_for_text(model: LCLModel) -> int:
    """Count the tokens for which the decoder has positions after an image; many where it learns no positions."""
    learned = any(name.endswith(POSITION_TABLES) for name, _ in model.decoder.named_modules())
    most = model.decoder.config.max_position_embeddings if learned else 1 << 30
    return int(most) - model.vision.patch_tokens - 3  # what a caption begins with


def tokenizer_of(config: Config, contents: str | None, vocabulary: Vocabulary) -> TextTokenizer:
    """Load the tokenizer of a network from this machine.

    Args:
        contents: hash of its folder in training.

    Raises:
        ValueError: it is not there, is another one or cannot be released.
    """
    where = config.data.tokenizer
    tokenizer = TextTokenizer(where, fetches=False)
    if tokenizer.vocabulary != vocabulary:
        sizes = f"{tokenizer.vocabulary.text_size} tokens, the network has {vocabulary.text_size}"
        raise ValueError(f"the tokenizer at {where} is another one: it has {sizes}")
    now = folder_contents(config).get("data.tokenizer")
    if contents is not None and now is not None and contents != now:
        raise ValueError(f"the tokenizer at {where} is another one than when the run was started")
    tokenizer.with_control_tokens()
    return tokenizer


def release_full(
    model: LCLModel,
    origin: WeightOrigin,
    vocabulary: Vocabulary,
    folder: Path,
    options: ReleaseOptions | None = None,
) -> str:
    """Write all weights under our names, the code that runs them, tokenizer and image processor; then compare.

    Returns:
        What was compared, with the largest difference, and what is missing.

    Raises:
        UserError: features are not finite, weights do not fit into the dtype, or the objective has no such release.
        RuntimeError: the release computes something else than the training model.
    """
    options = options or ReleaseOptions()
    if origin.config and objective_module(origin.config.objective.name).Objective.one_transformer:
        raise UserError(
            f"--part full: {origin.config.objective.name} reads text with the vision tower's blocks, and the code of a "
            "whole release does not; release the encoder alone (leave --part out)"
        )
    texts = texts_of(model, origin, vocabulary)
    transformers_logging.disable_progress_bar()
    features = trained_features(model, origin)  # finite, or there is nothing to release
    write_weights(model, origin, folder, options)
    write_config(model, texts, vocabulary, folder, options)
    for code in CODE:
        shutil.copyfile(code, folder / code.name)
    image_processor(model.vision.model.config, flat_patches=False).save_pretrained(folder)  # squares, as in training
    if texts.tokenizer is not None:
        write_tokenizer(texts.tokenizer, texts.end, texts.longest, folder)
    tolerance = TOLERANCES[options.dtype]
    difference = _difference(model, features, texts, vocabulary, folder, tolerance)
    checked = parity_sentence(difference, tolerance, origin)
    usage = usage_of(texts, options.name_in_code(folder))
    write_card(folder, model, origin, options, usage, checked, is_whole=True)
    return "\n".join([checked, *([f"no tokenizer is released: {texts.note}"] if texts.note else [])])


def write_weights(model: LCLModel, origin: WeightOrigin, folder: Path, options: ReleaseOptions) -> None:
    """Write ``model.safetensors``, in several files where it is large, and the settings that build the network here."""
    weights = in_dtype(model.state_dict(), options.dtype) | {EXACT: model.logit_scale.log_scale.detach()}
    save_torch_state_dict(
        {name: weight.contiguous() for name, weight in weights.items()},
        folder,
        max_shard_size=options.shard_size,
        metadata=weight_metadata(origin),
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(origin.settings, sort_keys=False), encoding="utf-8")


def write_config(model: LCLModel, texts: Texts, vocabulary: Vocabulary, folder: Path, options: ReleaseOptions) -> None:
    """Write ``config.json``, with both towers', and ``generation_config.json``."""
    encoder = model.vision.model
    vision = {
        **_without_place(encoder.config.to_dict()),
        "architectures": [type(encoder).__name__],
        "lcl_release": family_facts(model, has_pooling=True),
    }
    config = LclConfig(
        vision_config=vision,
        text_config=_without_place(model.decoder.config.to_dict()),
        image_tokens=model.vision.patch_tokens,
        start_token_id=vocabulary.sot,
        end_token_id=vocabulary.eot,
        image_token_id=vocabulary.image,
        image_start_token_id=vocabulary.soi,
        image_end_token_id=vocabulary.eoi,
        bidirectional_images=model.attention_mode == "images",
        compares_texts=texts.compares,
        writes_texts=texts.writes,
        architectures=["LclModel"],
        auto_map={"AutoConfig": "modeling_lcl_full.LclConfig", "AutoModel": "modeling_lcl_full.LclModel"},
        dtype=str(DTYPES[options.dtype]).removeprefix("torch."),
    )
    config.save_pretrained(folder)
    file = folder / "config.json"
    tree = json.loads(file.read_text(encoding="utf-8"))
    tree["text_config"] |= older_names(tree["text_config"])
    file.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    generation = {
        "bos_token_id": vocabulary.sot,
        "eos_token_id": [vocabulary.eot, vocabulary.soi],  # the next image ends a caption
        "pad_token_id": vocabulary.eot,
        "suppress_tokens": [vocabulary.sot, vocabulary.image, vocabulary.eoi],  # no loss ever asked for them
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def _without_place(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def older_names(config: dict[str, Any]) -> dict[str, Any]:
    """Name a decoder's rotary positions as transformers 4 reads them; it does not know ``rope_parameters``."""
    rotary = config.get("rope_parameters") or {}
    kinds = {kind: values for kind, values in rotary.items() if isinstance(values, dict)}
    names: dict[str, Any] = {}
    if kinds and not config["model_type"].startswith("gemma3"):
        return {"lcl_loads_in_version_4": False}
    if kinds:
        rotary = kinds["full_attention"]
        names["rope_local_base_freq"] = kinds["sliding_attention"]["rope_theta"]
    names |= {key: rotary[key] for key in ("rope_theta", "partial_rotary_factor") if key in rotary}
    if rotary.get("rope_type", "default") != "default":
        names["rope_scaling"] = {key: value for key, value in rotary.items() if key != "rope_theta"}
    return names


def write_tokenizer(tokenizer: TextTokenizer, end: int, longest: int, folder: Path) -> None:
    """Write the run's tokenizer with the control tokens, so that ``tokenizer(text)`` is what the features are read of.

    By hand, because the classes by which transformers 5 writes it are unknown to version 4.

    Raises:
        ValueError: a control token's name is a token of the tokenizer's own.
    """
    backend, vocabulary = tokenizer.with_control_tokens(), tokenizer.vocabulary
    numbers = {name: backend.token_to_id(name) for name in CONTROL_TOKENS}
    start, stop, pad = (backend.id_to_token(number) for number in (vocabulary.sot, end, vocabulary.eot))
    backend.post_processor = TemplateProcessing(single=f"{start} $A {stop}", special_tokens=list(numbers.items()))
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "VisionTextDualEncoderProcessor",
        "pad_token": pad,
        "model_max_length": longest,
        "padding_side": "right",
        "split_special_tokens": True,  # as in training: the name of a token in a text is text
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _difference(
    model: LCLModel, features: TrainedFeatures, texts: Texts, vocabulary: Vocabulary, folder: Path, tolerance: float
) -> float:
    """Compare features of images and of a text, and logits of a document, with those of the code in the folder."""
    released, loading = LclModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if wrong := {kind: names for kind, names in loading.items() if names}:
        raise RuntimeError(f"the release does not load as it was written: {wrong}")
    released.eval()
    images = features.images
    text = torch.arange(max(1, min(TRIED_TOKENS, room_for_text(model)))) % vocabulary.text_size
    ours, theirs = features.by_name(), {"patches": (patches := released.patches(images))}
    theirs["pooled"] = released.pooling(patches)
    if texts.compares:
        ids = torch.cat([torch.tensor([vocabulary.sot]), text[:1], torch.tensor([texts.end])])
        ours["text features"] = model.context_head(_states(model, vocabulary, ids, images[:0])[-1:])
        theirs["text features"] = released.get_text_features(ids[None])
    if texts.writes:
        ids = torch.cat([released.image_prompt(1)[0], text])
        states = model.lm_head.norm(_states(model, vocabulary, ids, images[:1]))
        cap = model.lm_head.softcap
        logits = F.linear(states, model.lm_head.weight)
        ours["logits"] = logits if cap is None else cap * torch.tanh(logits / cap)
        theirs["logits"] = released(input_ids=ids[None], pixel_values=images[:1]).logits[0]
    return largest_difference(ours, theirs, tolerance, "the released network")


def _states(model: LCLModel, vocabulary: Vocabulary, ids: Tensor, images: Tensor) -> Tensor:
    """Run the training model's decoder on one document [T] with its image, if any: [T, H]."""
    (places,) = torch.nonzero(ids == vocabulary.image, as_tuple=True)
    slots = (ImageSlot(0, int(places[0]), has_context=False),) if len(images) else ()
    tokens = TokenSequence(ids.numpy(), slots, tuple(range(len(images))))
    size = model.vision.model.config.image_size
    pixels = np.zeros((len(images), 3, size, size), np.uint8)
    batch = collate([Row((PackedSequence("tried", tokens, pixels),))], len(ids), size, vocabulary, ())
    if len(images):
        shown = model.pooling(model.vision(images))[1]
    else:
        shown = torch.zeros(1, model.vision.patch_tokens, model.decoder.config.hidden_size)
    return model.decode(batch, shown)


def usage_of(texts: Texts, folder: str) -> str:
    """Write how to load the folder and what it can do."""
    if texts.tokenizer is None:
        return USAGE.format(folder=folder, tokenizer="", loading="") + TRAINS_ON.format(folder=folder)
    loading = TOKENIZER.format(folder=folder)
    parts = [USAGE.format(folder=folder, tokenizer=", AutoTokenizer", loading=loading)]
    if texts.compares:
        parts.append(COMPARES.format(end=texts.tokenizer.with_control_tokens().id_to_token(texts.end)))
    if texts.writes:
        parts.append(WRITES.format(room=min(CAPTION_TOKENS, texts.room)))
    return "".join([*parts, TRAINS_ON.format(folder=folder)])
