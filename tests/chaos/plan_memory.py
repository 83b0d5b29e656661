"""Compare the planned memory with what torch's allocator counts: ``python -m tests.chaos.plan_memory [case ...]``.

Every rank trains a small model for two steps under a profiler that sees each tensor come and go, those within the
operators of the losses too. What is measured is bytes of live tensors, not resident memory, which keeps freed pages.
Ends with a table; the exit code is 1 when a case is off by more than a tenth.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from lcl_ds.assembly import build_empty, slot_tokens
from lcl_ds.batch import Batch
from lcl_ds.config import RECIPES, Config, load_config
from lcl_ds.data.documents import Document
from lcl_ds.data.sequences import Sequencer
from lcl_ds.data.stream.packing import PackedSequence, Row, collate
from lcl_ds.models.build import image_size
from lcl_ds.objectives import view_of
from lcl_ds.plan.contents import contents_of
from lcl_ds.plan.memory import Layout, Memory, loss_memory, memory_of, sizes_of
from lcl_ds.plan.trace import Tracer
from lcl_ds.tokens import Vocabulary
from lcl_ds.training.engine import sized, zero_settings
from lcl_ds.training.optimizer import freeze_parts, parameter_groups
from tests.support.ranks import run_ranks

VOCABULARY = Vocabulary(text_size=8000)
ROW_TOKENS, DOCUMENT_LETTERS = 512, 40
VISION = "hidden_size: 192, num_hidden_layers: 6, num_attention_heads: 6, image_size: 64, patch_size: 8"
DECODER = "hidden_size: 256, intermediate_size: 704, num_hidden_layers: 6, num_attention_heads: 8"
BASE = [
    "data.demo=null",
    f"data.row_tokens={ROW_TOKENS}",
    f"model.vision={{model_type: clip_vision_model, intermediate_size: 768, {VISION}}}",
    f"model.decoder={{model_type: llama, num_key_value_heads: 8, {DECODER}}}",
]
SMALL_BUCKETS = {"reduce_bucket_size": 1_000_000, "overlap_comm": True}
SMALL_LIMITS = {"stage3_param_persistence_threshold": 1000}
RECOMPUTED = ["model.vision.activation_checkpointing=true", "model.decoder.activation_checkpointing=true"]
CASES: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "stage 0, fp32": (1, {"stage": 0}, ["precision=fp32"]),
    "stage 0, bf16": (1, {"stage": 0}, ["precision=bf16"]),
    "stage 1, bf16": (2, {"stage": 1, "reduce_bucket_size": 1_000_000}, ["precision=bf16"]),
    "stage 2, bf16": (2, {"stage": 2, **SMALL_BUCKETS}, ["precision=bf16"]),
    "stage 2, fp32, recomputed": (2, {"stage": 2, **SMALL_BUCKETS}, ["precision=fp32", *RECOMPUTED]),
    "stage 3, bf16": (2, {"stage": 3, **SMALL_BUCKETS, **SMALL_LIMITS}, ["precision=bf16"]),
    "stage 3, fp32, every 2nd recomputed": (
        2,
        {"stage": 3, **SMALL_BUCKETS, **SMALL_LIMITS},
        ["precision=fp32", "model.vision.activation_checkpointing=2", "model.decoder.activation_checkpointing=2"],
    ),
    "stage 3, bf16, gpt2, dinov2, frozen encoder": (
        2,
        {"stage": 3, **SMALL_BUCKETS, **SMALL_LIMITS},
        [
            "precision=bf16",
            f"model.vision={{model_type: dinov2, mlp_ratio: 4, {VISION}}}",
            "model.decoder={model_type: gpt2, n_embd: 256, n_layer: 6, n_head: 8}",
            "train.learning_rate_factors={vision: 0}",
        ],
    ),
    "stage 2, bf16, average": (2, {"stage": 2, **SMALL_BUCKETS}, ["precision=bf16", "train.ema_decay=0.99"]),
    "stage 3, fp32, Muon, average": (
        2,
        {"stage": 3, **SMALL_BUCKETS, **SMALL_LIMITS},
        ["precision=fp32", "train.optimizer=muon", "train.ema_decay=0.99"],
    ),
    "stage 2, bf16, clip": (2, {"stage": 2, **SMALL_BUCKETS}, ["precision=bf16", "objective.name=clip"]),
}
STEPS, ROWS = 4, 4


def config_of(case: str) -> Config:
    return load_config(
        RECIPES / "demo.yaml", [*BASE, f"train.global_batch_rows={ROWS * CASES[case][0]}", *CASES[case][2]]
    )


def batch_of(config: Config, rows: int) -> Batch:
    """Rows full of documents with one image each."""
    rng = np.random.default_rng(0)
    view, tokens_of = view_of(config.objective, 0.0), slot_tokens(config)
    side = image_size(config.model)
    sequencer = Sequencer(lambda text: [ord(c) for c in text], VOCABULARY, tokens_of, ROW_TOKENS, 99)
    packed = []
    for _ in range(rows):
        sequences: list[PackedSequence] = []
        used = 0
        while True:
            document = Document("d", ("a" * DOCUMENT_LETTERS, 0, "b" * DOCUMENT_LETTERS), ("0.jpg",))
            made = [
                PackedSequence("d", t, rng.integers(0, 256, (len(t.images), 3, side, side), dtype=np.uint8), (1,))
                for t in view.encode(document, sequencer, rng)
            ]
            used += sum(len(sequence.tokens.input_ids) for sequence in made)
            if used > ROW_TOKENS:
                break
            sequences += made
        packed.append(Row(tuple(sequences)))
    return collate(packed, ROW_TOKENS, side, VOCABULARY, view.readout_names)


def measure(case: str, out: Path) -> None:
    """One rank: train, and write what was allocated at most, and between what marks."""
    from lcl_ds.objectives.base import LossNormalizer
    from lcl_ds.training.averaging import EncoderAverage
    from lcl_ds.training.distributed import gather_objects, init_distributed
    from lcl_ds.training.engine import complete_ds_config, start_engine

    rank_info = init_distributed()
    _, zero, _ = CASES[case]
    config = config_of(case)
    marks: list[tuple[int, str]] = []
    started_with: list[int] = []

    def mark(name: str) -> None:
        marks.append((time.time_ns(), name))

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        objective = build_empty(config, VOCABULARY.size)
        mark("built")
        engine = start_engine(
            objective,
            config,
            complete_ds_config({"zero_optimization": zero}, config, rank_info.world_size),
            rank_info,
        )
        for group in engine.basic_optimizer.param_groups:  # as the engine runs it: without temporaries
            group["fused"], group["foreach"] = True, False
        batch = batch_of(config, ROWS)
        decay = config.train.ema_decay
        average = None if decay is None else EncoderAverage(engine, decay)
        mark("started")
        for _ in range(STEPS):
            terms = objective.count_terms(batch)
            table = gather_objects(list(terms.values()))
            normalizers = {
                name: LossNormalizer(torch.tensor(100.0), torch.tensor(0.5), [row[i] for row in table])
                for i, name in enumerate(terms)
            }
            outputs = engine(batch, normalizers)
            mark("forward")
            engine.backward(outputs["loss"] * rank_info.world_size, scale_wrt_gas=False)
            mark("backward")
            engine.step()
            if average is not None:
                average.update()
            mark("step")
            del outputs
            started_with.append(bytes_in_sight())
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    # Threads that send and receive free tensors unseen, so that the count drifts: it starts anew with what is in sight
    # before the last step.
    last = [at for at, name in marks if name == "step"][-2]
    live = peak = started_with[-2]
    for event in events:
        if event.start_ns() > last:
            live += event.nbytes()
            peak = max(peak, live)
    found: dict[str, Any] = {"peak": peak, "between_steps": started_with[-2]}
    found["batch"] = {
        "images": batch.image_count,
        "tokens": batch.input_ids.numel(),
        "labels": len(batch.labels),
        "pairs": len(batch.readouts["context"]),
        "squares": batch.token_squares,
    }
    if rank_info.is_first:
        out.write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def bytes_in_sight() -> int:
    """Count the bytes of all tensors that Python knows, which are all there are between steps."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not thing.is_meta:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def measured(case: str, folder: Path) -> dict[str, Any]:
    out = folder / "found.json"
    command = [sys.executable, "-m", "tests.chaos.plan_memory", "--case", case, "--out", str(out)]
    run_ranks(CASES[case][0], command, folder / "log", timeout=900)
    return json.loads(out.read_text())


def planned(case: str) -> Memory:
    ranks, zero, _ = CASES[case]
    config, device = config_of(case), "cpu"
    row = batch_of(config, 1)
    objective = build_empty(config, VOCABULARY.size)
    freeze_parts(objective, config.train)
    groups = parameter_groups(objective, config.train, (0.0, 1.0))
    width, is_averaged = objective.model.decoder.config.hidden_size, config.train.ema_decay is not None
    sizes = sizes_of(objective, groups, VOCABULARY.size, width, is_averaged)
    layout = Layout.of(zero_settings(sized({"zero_optimization": zero}, objective, ranks)), config.precision, ranks)
    towers = config.model.vision, config.model.decoder
    activations = Tracer(config, VOCABULARY.size, row, contents_of(row, config), "varlen").activations(
        ROWS, *(int(tower.activation_checkpointing) for tower in towers)
    )
    losses = loss_memory(contents_of(row, config), ROWS, sizes, layout, device, ranks)
    return memory_of(layout, sizes, activations, losses, 1, device)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--case")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.case:
        measure(arguments.case, arguments.out)
        return 0
    worst = 0.0
    for case in arguments.cases or CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = measured(case, Path(folder))["peak"]
        plan = planned(case)
        off = plan.allocated / found - 1
        worst = max(worst, abs(off))
        figures = f"planned {plan.allocated / 2**20:6.1f} MiB, measured {found / 2**20:6.1f} MiB, {100 * off:+.1f} %"
        print(f"{case:45} {figures}")
        parts = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in plan.device.items())
        print(f"    at the {plan.moment}: {parts}", flush=True)
    return int(worst > 0.1)


if __name__ == "__main__":
    sys.exit(main())
