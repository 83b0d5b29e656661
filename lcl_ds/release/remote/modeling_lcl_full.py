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
        if IS_VERSION_4 and isinstance(text_config, dict) and not text_config.get("lcl_loads_in_version_4", True):
            raise ImportError(f"transformers 4 turns positions of {text_config['model_type']} otherwise; install 5")

    def get_text_config(self, *args: Any, **options: Any) -> Any:
        """Return the decoder's, or this one where a release without towers is described."""
        return self.text_config if self.text_config is not None else self


class LclModel(PreTrainedModel, GenerationMixin):
    """Images and text in one causal sequence, and a feature of each to compare."""

    config_class = LclConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over its own tokens
    _keep_in_fp32_modules_strict = ["logit_scale"]  # noqa: RUF012, transformers declares it so; bf16 is too coarse
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
        if IS_VERSION_4 and getattr(config.text_config, "attn_logit_softcapping", None):
            config.text_config._attn_implementation = "eager"  # the others leave the cap out there
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

    def patches(self, pixel_values: Tensor) -> Tensor:
        """Encode images [M, 3, H, W] of the size of training: [M, N, width] after the final norm."""
        tower, facts = self.vision.model, self.config.vision_config.lcl_release
        names = inspect.signature(tower.forward).parameters
        inputs = {"pixel_values": pixel_values}
        if "spatial_shapes" in names:  # it takes flattened patches
            side = self.config.vision_config.patch_size
            tiles = pixel_values.unflatten(3, (-1, side)).unflatten(2, (-1, side))
            flat = tiles.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
            shape = torch.tensor([[tiles.shape[2], tiles.shape[4]]] * len(flat), device=flat.device)
            mask = "attention_mask" if "attention_mask" in names else "pixel_attention_mask"  # in version 4, in 5
            every = torch.ones(flat.shape[:2], dtype=torch.int64, device=flat.device)
            inputs = {"pixel_values": flat, "spatial_shapes": shape, mask: every}
        patches = tower(**inputs).last_hidden_state[:, facts["prefix_tokens"] :]
        return patches if facts["final_norm"] is None else getattr(tower, facts["final_norm"])(patches)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Pool images: [M, D], to be compared with texts by cosine. Raises: RuntimeError, nothing trained it."""
        self._refuse_unless(self.config.compares_texts, "features of images and texts to be alike")
        return self.pooling(self.patches(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read what texts [B, L], filled up on either side, make the decoder expect of an image: [B, D].

        Raises:
            RuntimeError: nothing trained it.
        """
        self._refuse_unless(self.config.compares_texts, "features of images and texts to be alike")
        known = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = self._decode(known, input_ids=input_ids, attention_mask=known, use_cache=False).last_hidden_state
        ends = (known * torch.arange(known.shape[1], device=known.device)).argmax(1)
        last = states[torch.arange(len(states), device=states.device), ends]
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

    def caption(self, pixel_values: Tensor, **options: Any) -> Any:
        """Generate the tokens of a text after each image; options are those of ``generate``."""
        prompt = self.image_prompt(len(pixel_values))
        known = torch.ones_like(prompt)
        written: Any = self.generate(prompt, attention_mask=known, pixel_values=pixel_values, **options)  # type: ignore[misc]
        if isinstance(written, Tensor):
            return written[:, prompt.shape[1] :]
        written.sequences = written.sequences[:, prompt.shape[1] :]
        return written

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **options: Any
    ) -> Any:
        """Repeat what is generated from, the images of one text together."""
        images = options.pop("pixel_values", None)
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]
        ids, options = expand(expand_size, is_encoder_decoder, input_ids, **options)
        if images is not None:
            counts = (input_ids == self.config.image_token_id).sum(1) // self.config.image_tokens
            options["pixel_values"] = torch.cat([b for b in images.split(counts.tolist()) for _ in range(expand_size)])
        return ids, options

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token of texts [B, L] whose images, in order, are ``pixel_values``.

        Args:
            labels: [B, L], the tokens themselves, -100 where none is to be predicted.
            logits_to_keep: only of so many positions at the end; 0: of all.

        Raises:
            RuntimeError: nothing trained it.
            ValueError: there are more or fewer images than places for them.
        """
        self._refuse_unless(self.config.writes_texts, "the next token from those before it")
        given_mask = attention_mask
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            places = input_ids == self.config.image_token_id
            begun = past_key_values is not None and past_key_values.get_seq_length() > 0
            if places.any() or (pixel_values is not None and not begun):  # later tokens of a generation hold no image
                inputs_embeds = self._with_images(inputs_embeds, places, pixel_values)
                if self.config.bidirectional_images:
                    attention_mask = self._image_masks(places, attention_mask, inputs_embeds.dtype)
        known = torch.ones_like(inputs_embeds[..., 0], dtype=torch.int64) if given_mask is None else given_mask
        for name in ("cache_position", "return_dict"):
            options.pop(name, None)
        given = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "past_key_values": past_key_values}
        outputs = self._decode(known, position_ids, **given, **options)
        states = self.lm_head.norm(outputs.last_hidden_state[:, -logits_to_keep:])
        logits = F.linear(states, self.lm_head.weight)
        if (cap := getattr(self.config.text_config, "final_logit_softcapping", None)) is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _with_images(self, inputs_embeds: Tensor, places: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Put images into their places."""
        count = int(places.sum()) // self.config.image_tokens
        if pixel_values is None or count != len(pixel_values):
            images = 0 if pixel_values is None else len(pixel_values)
            raise ValueError(f"{images} images for {count} times {self.config.image_tokens} image tokens")
        patches = self.patches(pixel_values)
        tokens = self.pooling.proj(self.pooling.v(self.pooling.norm_v(patches)))
        if IS_VERSION_4 and self.config.text_config.model_type in SCALING_IN_VERSION_4:
            tokens = tokens / tokens.shape[-1] ** 0.5
        return inputs_embeds.masked_scatter(places[..., None], tokens.to(inputs_embeds.dtype))

    def _decode(self, known: Any, position_ids: Tensor | None = None, **inputs: Any) -> Any:
        """Run the decoder, with the positions of tokens that are ``known`` [B, L] where it asks for positions."""
        if "position_ids" in inspect.signature(self.decoder.forward).parameters:
            is_plain = isinstance(known, Tensor) and known.ndim == 2 and inputs.get("past_key_values") is None
            if position_ids is None and is_plain:
                position_ids = (known.cumsum(1) - 1).clamp(min=0)
            inputs["position_ids"] = position_ids
        return self.decoder(**inputs, return_dict=True)

    def _refuse_unless(self, was_trained: bool, what: str) -> None:
        if not was_trained:
            raise RuntimeError(f"the objective of this network did not train {what}")

    def _image_masks(self, places: Tensor, attention_mask: Tensor | None, dtype: torch.dtype) -> Any:
        """Let tokens of an image see each other, beside what came before them: additive, by kind of layer.

        Raises:
            ValueError: the mask is one of a cache whose length is fixed.
        """
        if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2):
            raise ValueError("images that the decoder sees whole need a cache that grows, which is the default")
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
