"""Look through the ways in which a step can be cut up, and say of each whether it fits and how long it takes."""

from collections.abc import Iterator
from dataclasses import dataclass

from lcl_ds.gpus import GPUS
from lcl_ds.plan.planner import Choice, Plan, Planner

POLICIES = ((0, 0), (1, 0), (0, 1), (2, 2), (1, 1))
"""Of recomputation, encoder and decoder: every k-th block; 0: none."""
OFFLOADS = ((False, False), (True, False), (True, True))
"""Of the optimizer and of the weights."""


@dataclass(frozen=True)
class Found:
    """What a search has looked at."""

    fitting: list[Plan]
    """Fastest first."""
    nearest: Plan
    """The one that needs the least memory."""
    looked_at: int


def search(planner: Planner) -> Found:
    """Plan every choice and sort those that fit by the time of a step; of equal ones the simpler comes first."""
    plans = [planner.plan(choice) for choice in choices(planner)]
    limit = planner.gpu.memory_gib * 2**30
    fitting = [plan for plan in plans if plan.memory.needed <= limit]
    fitting.sort(key=lambda plan: (round(plan.time.total, 4), plan.choice.stage, -plan.choice.rows))
    return Found(fitting, min(plans, key=lambda plan: plan.memory.needed), len(plans))


def choices(planner: Planner) -> Iterator[Choice]:
    """List stage x rows x recomputation x offload, as far as they make sense for the GPUs and the batch."""
    for stage in (0, 1, 2, 3) if planner.gpus > 1 else (0, 3):
        for rows in rows_of(planner):
            for vision, decoder in POLICIES:
                for optimizer, weights in OFFLOADS:
                    if (optimizer and stage < 2) or (weights and stage < 3):
                        continue
                    yield Choice(stage, rows, vision, decoder, optimizer, weights)


def rows_of(planner: Planner) -> list[int]:
    """List the rows that a rank's micro-step can have."""
    train, group = planner.config.train, planner.config.data.group_rows
    own, rest = divmod(train.global_batch_rows, planner.gpus)
    if rest:
        return [planner.given().rows]
    return [rows for rows in range(group, own + 1, group) if own % rows == 0]


def reasons(plan: Plan, planner: Planner) -> str:
    """Say in a few words what speaks for and against a plan."""
    words = []
    everything = plan.time.total
    if plan.time.waited > 0.05 * everything:
        words.append(f"{100 * plan.time.waited / everything:.0f} % waiting for exchanges")
    recomputed = sum(some.recomputed for some in plan.flops.values())
    computed = sum(some.computed for some in plan.flops.values())
    if recomputed > 0.1 * computed:
        words.append(f"{100 * recomputed / computed:.0f} % computed twice")
    if plan.time.update > 0.05 * everything:
        words.append(f"{100 * plan.time.update / everything:.0f} % updating")
    if plan.micro_steps > 1:
        words.append(f"{plan.micro_steps} micro-steps, negatives of one each")
    free = 1 - plan.memory.needed / (planner.gpu.memory_gib * 2**30)
    words.append(f"{100 * free:.0f} % of the memory free")
    return ", ".join(words)


def what_would_fit(planner: Planner, found: Found) -> str:
    """Say what to change where the given choice does not fit: settings, or the card."""
    if found.fitting:
        return f"what would fit: {settings_of(found.fitting[0])}"
    needed = found.nearest.memory.needed / 2**30
    cards = [name for name, gpu in GPUS.items() if gpu.memory_gib >= needed]
    return (
        f"nothing would fit: {settings_of(found.nearest)} still needs {needed - planner.gpu.memory_gib:.1f} GiB more; "
        f"take {' or '.join(cards) or 'a smaller model'}"
    )


def settings_of(plan: Plan) -> str:
    """Write a choice as the settings that make it."""
    choice = plan.choice
    words = [f"stage {choice.stage}"]
    offloads = [name for name in ("optimizer", "weights") if getattr(choice, f"offload_{name}")]
    if offloads:
        words.append(f"offload of {' and '.join(offloads)}")
    words.append(f"train.accumulation_steps={plan.micro_steps} ({choice.rows} rows a GPU)")
    for tower, every in (("vision", choice.vision_every), ("decoder", choice.decoder_every)):
        value = {0: "false", 1: "true"}.get(every, every)
        words.append(f"model.{tower}.activation_checkpointing={value}")
    return ", ".join(words)
