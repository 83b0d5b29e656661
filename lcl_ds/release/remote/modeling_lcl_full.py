"""The whole network of Latent Compression Learning: encoder, attentive pooling, causal decoder and their heads.

This file lies beside the weights of a release: ``AutoModel.from_pretrained(folder, trust_remote_code=True)`` runs it,
with transformers 4.57 or later. A text is ``<start_of_text> text <start_of_image>``, as the tokenizer of the folder
writes it; an image inside a text is ``<start_of_image> <image> * N <end_of_image>``.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .modeling_lcl import AttentivePooling, encoder_class

FINAL_NORMS = ("norm", "ln_f", "decoder.final_layer_norm")
"""Where families of decoders keep the norm after their last block."""
IS_VERSION_4 = transformers.__version__.startswith("4.")
NAMES_IN_VERSION_4 = {
    rf"^(vision\.model\.encoder\.layer\.\d+\.attention)\.{ours}\.": rf"\1.{theirs}."
    for ours, theirs in {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
    }.items()
}
"""What DINOv2's weights were called before."""
SCALING_IN_VERSION_4 = ("gemma", "gemma2")
"""Decoders that multiplied all that comes in by the root of their width; later their embedding does so."""


class LclConfig(PretrainedConfig):
    """Configurations of both towers, and how a sequence is written.

    Args:
        vision_config: of the encoder, with what :mod:`modeling_lcl` needs to know under ``lcl_release``.
        text_config: of the decoder.
        image_tokens: tokens of one image, N.
        start_token_id, end_token_id, image_token_id, image_start_token_id, image_end_token_id: the control tokens.
        bidirectional_images: whether tokens of an image see each other in the decoder.
        compares_texts: whether features of images and texts were trained to be alike.
        writes_texts: whether the next token was predicted from those before it.
    """

    model_type = "lcl"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        image_tokens: int = 0,
        start_token_id: int = 0,
        end_token_id: int = 0,
        image_token_id: int = 0,
        image_start_token_id: int = 0,
        image_end_token_id: int = 0,
        bidirectional_images: bool = False,
        compares_texts: bool = True,
        writes_texts: bool = True,
        **options: Any,
    ):
        towers = {"vision_config": vision_config, "text_config": text_config}
        for name, tower in towers.items():
            setattr(self, name, AutoConfig.for_model(**tower) if isinstance(tower, dict) else tower)
        self.image_tokens = image_tokens
        self.start_token_id, self.end_token_id = start_token_id, end_token_id
        self.image_token_id = image_token_id
        self.image_start_token_id, self.image_end_token_id = image_start_token_id, image_end_token_id
        self.bidirectional_images = bidirectional_images
        self.compares_texts, self.writes_texts = compares_texts, writes_texts
        super().__init__(**{"tie_word_embeddings": False, **options})

    def get_text_config(self, *args: Any, **options: Any) -> Any:
        """Return the decoder's, or this one where a release without towers is described."""
        return self.text_config if self.text_config is not None else self


class LclModel(PreTrainedModel, GenerationMixin):
    """Images and text in one causal sequence, and a feature of each to compare."""

    config_class = LclConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # It is the towers that attend, and say what they can do.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: LclConfig):
        super().__init__(config)
        encoder = encoder_class(config.vision_config)(config.vision_config)
        self.vision: Any = nn.Module()
        # The tower is the model itself in transformers 5, and a part of it in 4.
        self.vision.model = getattr(encoder, "vision_model", encoder)
        width = config.text_config.hidden_size
        self.pooling = AttentivePooling(**config.vision_config.lcl_release["pooling"])
        self.decoder, norms = decoder_without_norm(config.text_config)
        self.lm_head: Any = nn.Module()
        self.lm_head.norm = norms[0]
        self.lm_head.weight = nn.Parameter(torch.zeros(config.text_config.vocab_size, width))
        self.context_head: Any = nn.Module()
        self.context_head.norm = norms[1]
        self.context_head.proj = nn.Linear(width, width, bias=False)
        self.logit_scale: Any = nn.Module()
        self.logit_scale.log_scale = nn.Parameter(torch.zeros(1))
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """Load as transformers does, under the names of its version."""
        if IS_VERSION_4:
            options.setdefault("key_mapping", NAMES_IN_VERSION_4)
        return super().from_pretrained(*args, **options)

    def get_input_embeddings(self) -> nn.Module:
        """Return the decoder's."""
        return self.decoder.get_input_embeddings()

    def patches(self, pixel_values: Tensor, **options: Any) -> Tensor:
        """Encode images [M, 3, H, W], or flat patches where the family takes those: [M, N, width] after the norm."""
        tower, facts = self.vision.model, self.config.vision_config.lcl_release
        if "pixel_attention_mask" in options and "attention_mask" in inspect.signature(tower.forward).parameters:
            options["attention_mask"] = options.pop("pixel_attention_mask")  # as the inner tower calls it in version 4
        patches = tower(pixel_values=pixel_values, **options).last_hidden_state[:, facts["prefix_tokens"] :]
        return patches if facts["final_norm"] is None else getattr(tower, facts["final_norm"])(patches)

    def get_image_features(self, pixel_values: Tensor, **options: Any) -> Tensor:
        """Pool images: [M, D], to be compared with texts by cosine. Raises: NotImplementedError, nothing trained it."""
        self._refuse_unless(self.config.compares_texts, "features of images and texts to be alike")
        return self.pooling(self.patches(pixel_values, **options), options.get("pixel_attention_mask"))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read what texts [B, L], filled up on the right, make the decoder expect of an image: [B, D].

        Raises:
            NotImplementedError: nothing trained it.
        """
        self._refuse_unless(self.config.compares_texts, "features of images and texts to be alike")
        states = self.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        lengths = attention_mask.sum(1) if attention_mask is not None else input_ids.new_tensor(input_ids.shape[1])
        last = states[torch.arange(len(states), device=states.device), lengths - 1]
        return self.context_head.proj(self.context_head.norm(last))

    def similarity(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Compare features [M, D] and [B, D] as the contrastive loss does: logits [M, B]."""
        image, text = (F.normalize(x.float(), dim=-1) for x in (image_features, text_features))
        return self.logit_scale.log_scale.float().exp() * image @ text.T

    def image_prompt(self, images: int) -> Tensor:
        """Write the tokens before a caption, [images, N + 3]."""
        config = self.config
        places = [config.image_token_id] * config.image_tokens
        ids = [config.start_token_id, config.image_start_token_id, *places, config.image_end_token_id]
        return torch.tensor([ids] * images, device=self.device)

    def caption(self, pixel_values: Tensor, **options: Any) -> Tensor:
        """Generate the tokens of a text after each image; options are those of ``generate`` and of the encoder."""
        prompt = self.image_prompt(len(pixel_values))
        known = torch.ones_like(prompt)
        written: Any = self.generate(prompt, attention_mask=known, pixel_values=pixel_values, **options)  # type: ignore[misc]
        return written[:, prompt.shape[1] :]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token of texts [B, L] whose images, in order, are ``pixel_values``.

        Args:
            labels: [B, L], the tokens themselves, -100 where none is to be predicted.
            logits_to_keep: only of so many positions at the end; 0: of all.

        Raises:
            NotImplementedError: nothing trained it.
        """
        self._refuse_unless(self.config.writes_texts, "the next token from those before it")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            places = input_ids == self.config.image_token_id
            if pixel_values is not None and places.any():  # later tokens of a generation hold no image
                flat = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
                given = {name: value for name, value in flat.items() if value is not None}
                patches = self.patches(pixel_values, **given)
                tokens = self.pooling.proj(self.pooling.v(self.pooling.norm_v(patches)))
                if IS_VERSION_4 and self.config.text_config.model_type in SCALING_IN_VERSION_4:
                    tokens = tokens / tokens.shape[-1] ** 0.5
                inputs_embeds = inputs_embeds.masked_scatter(places[..., None], tokens.to(inputs_embeds.dtype))
                if self.config.bidirectional_images:
                    attention_mask = self._image_masks(places, attention_mask, inputs_embeds.dtype)
        options.pop("cache_position", None)
        outputs = self.decoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **options)
        states = self.lm_head.norm(outputs.last_hidden_state[:, -logits_to_keep:])
        logits = F.linear(states, self.lm_head.weight)
        if (cap := getattr(self.config.text_config, "final_logit_softcapping", None)) is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def _refuse_unless(self, was_trained: bool, what: str) -> None:
        if not was_trained:
            raise NotImplementedError(f"the objective of this network did not train {what}")

    def _image_masks(self, places: Tensor, attention_mask: Tensor | None, dtype: torch.dtype) -> Any:
        """Let tokens of an image see each other, beside what came before them: additive, by kind of layer."""
        number = (places & ~F.pad(places, (1, -1))).cumsum(-1) * places
        position = torch.arange(places.shape[1], device=places.device)
        ahead = position[:, None] - position
        same = (number[:, :, None] == number[:, None]) & places[:, None]
        known = torch.ones_like(places) if attention_mask is None else attention_mask.bool()
        config = self.config.text_config
        window: Any = getattr(config, "sliding_window", None)

        def mask(kind: str) -> Tensor:
            near = ahead >= 0
            if kind == "sliding_attention":
                near = near & (ahead < window)
            allowed = (near | same) & known[:, None]
            return torch.zeros(allowed.shape, dtype=dtype, device=places.device).masked_fill(
                ~allowed, torch.finfo(dtype).min
            )[:, None]

        if kinds := getattr(config, "layer_types", None):
            return {kind: mask(kind) for kind in set(kinds)}
        return mask("sliding_attention" if window else "full_attention")


def decoder_without_norm(config: Any) -> tuple[PreTrainedModel, tuple[nn.Module, nn.Module]]:
    """Build a decoder whose final norm is taken out, and two of that norm: each head has its own."""
    decoder = AutoModel.from_config(config)
    modules = dict(decoder.named_modules())
    name = next(name for name in FINAL_NORMS if name in modules)
    norm = modules[name]
    decoder.set_submodule(name, nn.Identity())
    return decoder, (norm, copy.deepcopy(norm))
