"""How much memory the activations of a step take: the network runs once on tensors that have shapes and no values.

Only towers of one and two blocks run; each further block takes as much as the second one does.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import CONFIG_MAPPING

from lcl_ds.assembly import build_empty
from lcl_ds.batch import Batch, Readouts
from lcl_ds.config import Config
from lcl_ds.models.attention import varlen
from lcl_ds.models.attention.masks import switch_implementation
from lcl_ds.models.build import image_size
from lcl_ds.models.settings import TowerSettings
from lcl_ds.objectives.base import LossNormalizer, Objective
from lcl_ds.plan.contents import RowContents
from lcl_ds.training.optimizer import freeze_parts

TRACED_ROWS = 4


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank in one micro-step, beside weights and what the losses work in."""

    kept: float
    """Alive at the end of the forward pass."""
    beyond: float
    """Beyond that for a moment in the backward pass: a recomputed block, gradients on their way."""

    def __add__(self, other: "Activations") -> "Activations":
        return Activations(self.kept + other.kept, self.beyond + other.beyond)

    def __mul__(self, factor: float) -> "Activations":
        return Activations(self.kept * factor, self.beyond * factor)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tree_map_only(Tensor, self._know, (args, kwargs))
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, result)
        return result

    def _know(self, tensor: Tensor) -> None:
        """Leave out what was there before, of which a view may be made."""
        self._seen.setdefault(tensor.untyped_storage(), 0)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._take, size)

    def _take(self, size: int) -> None:
        self.live -= size


class _Bounds:
    """Stands for the bounds of documents, whose number changes no memory: every row is one."""

    def __init__(self, rows: int, row_tokens: int):
        self._lengths = [row_tokens] * rows

    def diff(self) -> "_Bounds":
        return self

    def tolist(self) -> list[int]:
        return self._lengths


class Tracer:
    """Traces one network of ``config`` at any number of rows.

    Args:
        row: one row as it is made up, see :func:`lcl_ds.plan.contents.made_up_row`.
        contents: what rows hold on average.
        attention: what the decoder will use; ``varlen`` for everything that is told where documents begin.
    """

    def __init__(self, config: Config, vocab_size: int, row: Batch, contents: RowContents, attention: str):
        self.config, self.vocab_size, self.row, self.contents = config, vocab_size, row, contents
        self.attention = attention
        self._known: dict[tuple[Any, ...], Activations] = {}

    def activations(self, rows: int, vision_every: int, decoder_every: int) -> Activations:
        """Say what a micro-step of so many rows takes.

        Args:
            vision_every, decoder_every: recompute every k-th block of that tower; 0: none.
        """
        some, twice = (self._trace(count) for count in (TRACED_ROWS, 2 * TRACED_ROWS))
        total = some + (twice + some * -1) * (rows / TRACED_ROWS - 1)  # what does not grow with rows is in both
        kept, beyond = total.kept, total.beyond
        for name, every in (("vision", vision_every), ("decoder", decoder_every)):
            depth = _depth(getattr(self.config.model, name))
            recomputed = -(-depth // every) if every else 0
            blocks = (depth - recomputed - 1) * self._block(name, False)  # one is in the network that was traced
            if recomputed:
                blocks += recomputed * self._block(name, True)
            kept += blocks * rows / TRACED_ROWS
        if vision_every or decoder_every:
            shallow = self._trace(
                TRACED_ROWS, vision=(1, int(bool(vision_every))), decoder=(1, int(bool(decoder_every)))
            )
            beyond = max(beyond, shallow.beyond * rows / TRACED_ROWS)
        return Activations(kept, beyond)

    def _block(self, name: str, is_recomputed: bool) -> float:
        """Return the bytes that one more block of a tower keeps."""
        shallow = {name: (1, int(is_recomputed))}
        deep = {name: (2, int(is_recomputed))}
        return self._trace(TRACED_ROWS, True, **deep).kept - self._trace(TRACED_ROWS, False, **shallow).kept

    def _trace(
        self,
        rows: int,
        forward: bool = False,
        vision: tuple[int, int] = (1, 0),
        decoder: tuple[int, int] = (1, 0),
    ) -> Activations:
        """Run towers of so many blocks, of which every k-th is recomputed (0: none), forward alone or back as well."""
        key = rows, vision, decoder
        if key not in self._known:
            towers = {"vision": vision, "decoder": decoder}
            depths, every = ({name: pair[i] for name, pair in towers.items()} for i in (0, 1))
            self._known[key] = self._measure(rows, depths, every, forward)
        return self._known[key]

    def _measure(self, rows: int, depths: dict[str, int], every: dict[str, int], forward: bool) -> Activations:
        config = shallow_config(self.config, depths, every)
        objective = build_empty(config, self.vocab_size).train()
        freeze_parts(objective, config.train)
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        with FakeTensorMode():
            _materialise(objective, dtype)
            if objective.attention_mode is None:  # otherwise it is as the objective needs it
                if self.attention == varlen.NAME:
                    varlen.register()
                switch_implementation(objective.model.decoder, self.attention)
            batch = _batch_of(self.row, self.contents, rows, image_size(config.model))
            terms = objective.count_terms(batch)
            normalizers = {name: LossNormalizer(torch.ones(()), torch.ones(())) for name in terms}
            with LiveBytes() as bytes_, _gradients_dropped(objective):
                outputs = objective(batch, normalizers)
                kept = bytes_.live
                if forward:
                    return Activations(kept, 0.0)
                outputs["loss"].backward()
        return Activations(kept, max(0, bytes_.peak - kept))


def shallow_config(config: Config, depths: dict[str, int], every: dict[str, int]) -> Config:
    """Return the same with towers of so many blocks, of which every k-th is recomputed."""
    towers = {}
    for name, depth in depths.items():
        settings: TowerSettings = getattr(config.model, name)
        keys = settings.hf_keys
        key = CONFIG_MAPPING[settings.model_type].attribute_map.get("num_hidden_layers", "num_hidden_layers")
        keys = {k: v for k, v in keys.items() if k not in ("num_hidden_layers", key)} | {key: depth}
        if isinstance(keys.get("layer_types"), list):
            keys["layer_types"] = keys["layer_types"][:depth]
        own = {n: getattr(settings, n) for n in type(settings).model_fields if n not in ("shape", "pretrained")}
        own["activation_checkpointing"] = every[name] or False
        if "bidirectional_images" in own:  # what tokens see changes no memory where attention needs no mask
            own["bidirectional_images"] = False
        towers[name] = type(settings).model_validate({**own, **keys})
    return config.model_copy(update={"model": config.model.model_copy(update=towers)})


def _depth(settings: TowerSettings) -> int:
    return CONFIG_MAPPING[settings.model_type](**settings.hf_keys).num_hidden_layers


def _materialise(objective: Objective, dtype: torch.dtype) -> None:
    """Put weights of ``dtype`` and buffers without values into the modules."""
    for module in objective.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@contextmanager
def _gradients_dropped(objective: Objective) -> Iterator[None]:
    """Let every weight's gradient go as soon as it is there: what becomes of it is a matter of the ZeRO stage."""

    def drop(weight: Tensor) -> None:
        weight.grad = None

    trained = [weight for weight in objective.parameters() if weight.requires_grad]
    handles = [weight.register_post_accumulate_grad_hook(drop) for weight in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _batch_of(row: Batch, contents: RowContents, rows: int, side: int) -> Batch:
    """Make a batch of so many rows, without values, with images of their true size."""
    images = max(1, round(contents.images * rows))

    def zeros(length: float, like: Tensor) -> Tensor:
        return torch.zeros(round(length), *like.shape[1:], dtype=like.dtype)

    def for_images(tensor: Tensor) -> Tensor:
        return zeros(images * len(tensor) / len(row.images), tensor)

    bounds: Any = _Bounds(rows, row.input_ids.shape[1])
    return replace(
        row,
        input_ids=zeros(rows, row.input_ids),
        position_ids=zeros(rows, row.position_ids),
        cu_seqlens=bounds,
        images=torch.zeros(images, 3, side, side, dtype=torch.uint8),
        image_seeds=for_images(row.image_seeds),
        slot_images=for_images(row.slot_images),
        slot_positions=for_images(row.slot_positions),
        readouts={
            name: Readouts(*(for_images(getattr(readout, field.name)) for field in fields(Readouts)))
            for name, readout in row.readouts.items()
        },
        label_positions=zeros(contents.labels * rows, row.label_positions),
        labels=zeros(contents.labels * rows, row.labels),
        image_count=images,
    )
