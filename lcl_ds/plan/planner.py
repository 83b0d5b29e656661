"""Put a plan together: recipe, engine settings, GPUs and what rows hold, at one choice of how a step is cut up."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from lcl_ds.assembly import build_empty
from lcl_ds.batch import Batch
from lcl_ds.config import Config
from lcl_ds.errors import UserError
from lcl_ds.flops import Flops, StepFlops, StepWork, query_width
from lcl_ds.gpus import Gpu
from lcl_ds.models.attention.masks import choose_implementation
from lcl_ds.models.attention.varlen import NAME as VARLEN
from lcl_ds.models.blocks import blocks_of
from lcl_ds.models.decoder import TESTED_FAMILIES
from lcl_ds.objectives.base import Objective
from lcl_ds.plan.communication import Exchange, Network, exchange_of
from lcl_ds.plan.contents import RowContents
from lcl_ds.plan.memory import Layout, Memory, Sizes, loss_memory, memory_of, sizes_of
from lcl_ds.plan.timing import Cost, StepTime, images_per_s, step_time, utilisation
from lcl_ds.plan.trace import Activations, Tracer
from lcl_ds.training.engine import rows_per_micro_step, sized, zero_settings
from lcl_ds.training.optimizer import freeze_parts, parameter_groups

MASKED = ("sdpa", "eager")
"""Implementations of attention that look at whole rows, through a mask."""


@dataclass(frozen=True)
class Choice:
    """How a step is cut up: what a search may change."""

    stage: int
    rows: int
    """Of a rank's micro-step."""
    vision_every: int
    """Every k-th block of the encoder is recomputed; 0: none."""
    decoder_every: int
    offload_optimizer: bool
    offload_weights: bool


@dataclass(frozen=True)
class Plan:
    """What one choice comes to."""

    choice: Choice
    layout: Layout
    micro_steps: int
    memory: Memory
    exchange: Exchange
    work: StepWork
    flops: dict[str, Flops]
    time: StepTime
    mfu: float
    images_per_s: float
    cost: Cost


class Planner:
    """Plans one recipe on one kind of GPU.

    Args:
        ds_config: engine settings, from :func:`lcl_ds.training.engine.load_ds_config`.
        row: a made-up row, for the shapes of activations.
        contents: what rows hold on average.
        towers: fraction of the peak that the towers reach; None: see :mod:`lcl_ds.plan.timing`.

    Raises:
        UserError: a decoder of a family that cannot be built without memory.
    """

    def __init__(
        self,
        config: Config,
        ds_config: dict[str, Any],
        vocab_size: int,
        row: Batch,
        contents: RowContents,
        gpu: Gpu,
        gpus: int,
        hosts: int,
        price: float | None = None,
        towers: float | None = None,
    ):
        self.config, self.ds_config, self.vocab_size = config, ds_config, vocab_size
        self.row, self.contents, self.gpu = row, contents, gpu
        self.gpus, self.hosts, self.price, self.towers = gpus, hosts, price, towers
        self._flops: dict[tuple[int, int], StepFlops] = {}
        family = config.model.decoder.model_type
        if family not in TESTED_FAMILIES:
            raise UserError(
                f"model.decoder.model_type: {family} cannot be planned, because it has to be tried out with real "
                f"weights; plan with one of {', '.join(TESTED_FAMILIES)} of the same size"
            )

    @cached_property
    def objective(self) -> Objective:
        """The whole objective, frozen as it is trained; its weights take no memory."""
        objective = build_empty(self.config, self.vocab_size)
        freeze_parts(objective, self.config.train)
        return objective

    @cached_property
    def sizes(self) -> Sizes:
        groups = parameter_groups(self.objective, self.config.train, (0.0, 1.0))
        width = self.objective.model.decoder.config.hidden_size
        return sizes_of(self.objective, groups, self.vocab_size, width, self.config.train.ema_decay is not None)

    @cached_property
    def attention(self) -> str:
        """Name what the decoder attends with on a GPU that has torch's own kernels."""
        model = self.objective.model
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        return choose_implementation(model.decoder, model.attention, model.attention_mode, "cuda", dtype)

    @cached_property
    def _tracer(self) -> Tracer:
        return Tracer(self.config, self.vocab_size, self.row, self.contents, VARLEN)

    def given(self) -> Choice:
        """Return the choice that recipe and engine settings make.

        Raises:
            UserError: the global batch does not divide by the GPUs.
        """
        layout = self._layout_of(int(zero_settings(self.ds_config).stage), self.gpus)
        model = self.config.model
        return Choice(
            stage=layout.stage,
            rows=rows_per_micro_step(self.config, self.gpus),
            vision_every=int(model.vision.activation_checkpointing),
            decoder_every=int(model.decoder.activation_checkpointing),
            offload_optimizer=layout.offload_optimizer,
            offload_weights=layout.offload_weights,
        )

    def _layout_of(self, stage: int, ranks: int) -> Layout:
        """Return the engine settings at a stage, with buffers as the engine sizes them."""
        zero = {**self.ds_config.get("zero_optimization", {}), "stage": stage}
        zero = zero_settings(sized({**self.ds_config, "zero_optimization": zero}, self.objective, ranks))
        accumulated = (self.ds_config.get("data_types") or {}).get("grad_accum_dtype")
        return Layout.of(zero, self.config.precision, ranks, accumulated)

    def layout(self, choice: Choice, ranks: int) -> Layout:
        """Return the engine settings with what the choice changes."""
        given = self._layout_of(choice.stage, ranks)
        is_given = int(zero_settings(self.ds_config).stage) == choice.stage
        return replace(
            given,
            overlap=given.overlap if is_given else choice.stage > 1,
            offload_optimizer=choice.offload_optimizer,
            offload_weights=choice.offload_weights,
            secondary=given.secondary if choice.stage == 3 else 1,
        )

    def plan(self, choice: Choice, gpus: int | None = None, hosts: int | None = None, batch_rows: int = 0) -> Plan:
        """Plan one choice.

        Args:
            gpus, hosts: None: those of the planner.
            batch_rows: rows of a step; 0: those of the recipe.
        """
        gpus = gpus or self.gpus
        hosts = hosts or self.hosts
        batch_rows = batch_rows or self.config.train.global_batch_rows
        layout = self.layout(choice, gpus)
        micro_steps = max(1, round(batch_rows / (choice.rows * gpus)))
        network = Network.of(self.gpu, gpus, hosts)
        losses = loss_memory(
            self.contents, choice.rows, self.sizes, layout, "cuda", ranks_per_host=network.ranks_per_host
        )
        activations = self.activations(choice.rows, choice.vision_every, choice.decoder_every)
        memory = memory_of(layout, self.sizes, activations, losses, micro_steps, "cuda")
        work = self.contents.step(batch_rows, micro_steps)
        flops = self.flops(choice, work)
        exchange = exchange_of(layout, self.sizes, network, self.contents, choice.rows, micro_steps)
        time = step_time(flops, self._beyond_documents(work), self.gpu, layout, self.sizes, exchange, self.towers)
        seconds = time.total
        return Plan(
            choice,
            layout,
            micro_steps,
            memory,
            exchange,
            work,
            flops,
            time,
            utilisation(flops, seconds, self.gpu, gpus),
            images_per_s(work, seconds),
            Cost.of(seconds, self.config.train.steps, gpus, self.price),
        )

    def flops(self, choice: Choice, work: StepWork) -> dict[str, Flops]:
        """Count the operations of a step."""
        key = choice.vision_every, choice.decoder_every
        if key not in self._flops:
            model = self.objective.model
            for tower, every in zip((model.vision.model, model.decoder), key, strict=True):
                _recompute(tower, every)
            self._flops[key] = StepFlops(self.objective)
        return self._flops[key].of(work)

    def activations(self, rows: int, vision_every: int, decoder_every: int) -> Activations:
        """Say what a micro-step of so many rows keeps on a GPU."""
        traced = self._tracer.activations(rows, vision_every, decoder_every)
        return Activations(traced.kept + rows * self._attention_bytes(decoder_every), traced.beyond)

    def _attention_bytes(self, decoder_every: int) -> float:
        """Return what the decoder's attention keeps of a row beyond, or less than, what was traced on a CPU."""
        decoder, size = self.objective.model.decoder.config, 2 if self.config.precision == "bf16" else 4
        kept_blocks = decoder.num_hidden_layers
        if decoder_every:
            kept_blocks -= -(-kept_blocks // decoder_every)
        if self.attention not in MASKED:  # a CPU lays the documents' results side by side once more
            return -size * self.contents.tokens * query_width(decoder) * kept_blocks
        probabilities = decoder.num_attention_heads * kept_blocks if self.attention == "eager" else 0
        return size * self.contents.tokens**2 * (1 + 2 * probabilities)

    def _beyond_documents(self, work: StepWork) -> float:
        """Count the operations that attention spends on pairs of tokens of different documents."""
        if self.attention not in MASKED:
            return 0.0
        decoder = self.objective.model.decoder.config
        others = max(0.0, work.tokens * self.contents.tokens - work.squares)
        return 3.5 * 4 * others * query_width(decoder) * decoder.num_hidden_layers

    def hosts_of(self, gpus: int) -> int:
        """Return the hosts of so many GPUs, each with as many as now."""
        return max(1, math.ceil(gpus / math.ceil(self.gpus / self.hosts)))


def _recompute(tower: Any, every: int) -> None:
    """Mark the blocks that are recomputed, without touching anything else."""
    for number, block in enumerate(blocks_of(tower)):
        block.gradient_checkpointing = bool(every) and number % every == 0
