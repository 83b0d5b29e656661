"""Decide what becomes of each setting that was changed between two starts of a run.

Every setting has a decision here. A checkpoint brings back weights, moments and the position; all else is what the
settings of this start say, so that "applied" is true.
"""

import logging
from pathlib import Path
from typing import Any, Literal

from lcl_ds.config import Config
from lcl_ds.errors import UserError
from lcl_ds.files import read_json
from lcl_ds.models.build import vision_config
from lcl_ds.models.decoder import build_decoder_config
from lcl_ds.settings import flatten
from lcl_ds.training.checkpoint import load_config_of, read_state
from lcl_ds.training.engine import ENGINE_KEYS
from lcl_ds.training.input_folders import FOLDERS, folder_contents, value_of
from lcl_ds.training.optimizer import frozen_parts
from lcl_ds.training.run_folder import DS_CONFIG

logger = logging.getLogger(__name__)

Decision = Literal["refused", "applied", "free"]

DECISIONS: dict[str, Decision] = {
    "name": "free",
    "precision": "applied",
    # The order of samples and what a row is made of; the shards' contents are compared by fingerprint.
    "data": "refused",
    "data.demo": "free",
    "data.textured": "free",
    "data.cache": "free",
    "data.exclude": "applied",
    "data.workers": "free",
    "data.stall_seconds": "applied",
    "data.max_bad_share": "applied",
    "data.max_image_pixels": "applied",
    # How the network computes may change, not what it is. Where its first weights came from no longer matters.
    "model": "refused",
    "model.vision.attention": "applied",
    "model.decoder.attention": "applied",
    "model.vision.activation_checkpointing": "applied",
    "model.decoder.activation_checkpointing": "applied",
    "model.logit_scale_max": "applied",
    "model.init_ema": "free",
    "model.allow_missing": "free",
    "model.allow_unexpected": "free",
    "objective": "refused",
    "train.steps": "applied",
    "train.image_sizes": "refused",
    "train.seed": "applied",  # of dropout; the seeds below are compared by the values that result
    "train.init_seed": "refused",
    "train.data_seed": "refused",
    "train.augmentation_seed": "refused",
    "train.global_batch_rows": "applied",
    "train.accumulation_steps": "applied",
    "train.learning_rate": "applied",
    "train.min_learning_rate": "applied",
    "train.warmup_steps": "applied",
    "train.learning_rate_factors": "applied",  # where they freeze the same parts
    "train.optimizer": "refused",  # they keep different moments
    "train.muon_rms": "applied",
    "train.muon_momentum": "applied",
    "train.weight_decay": "applied",
    "train.betas": "applied",
    "train.eps": "applied",
    "train.ema_decay": "applied",  # one that is switched on begins with the weights of that moment
    "train.compile": "applied",
    "train.gradient_clipping": "applied",
    "train.max_skipped_steps": "applied",
    "train.spike_factor": "applied",
    "train.on_spike": "applied",
    "train.max_rollbacks": "applied",
    "train.start_hang_seconds": "free",
    "train.hang_seconds": "free",
    "checkpoint.every": "applied",
    "checkpoint.keep": "applied",
    "checkpoint.keep_every": "applied",
    "checkpoint.keep_best": "applied",
    "checkpoint.asynchronous": "free",
    "checkpoint.ignore_damaged": "free",
    "log.every": "free",
    "log.trackers": "free",
    "log.profile_steps": "free",
    "log.profile_ranks": "free",
    "evaluation": "applied",
}
"""By setting or, where nothing longer fits, by the group it is in. Refused: the run ends with a sentence. Applied: it
holds from the next step on, and is logged. Free: it changes nothing that is computed."""


def decision_of(key: str) -> Decision:
    """Say what happens to a setting that was changed, by its longest prefix in ``DECISIONS``.

    Raises:
        KeyError: nobody has decided.
    """
    names = key.split(".")
    for length in range(len(names), 0, -1):
        if (decision := DECISIONS.get(".".join(names[:length]))) is not None:
            return decision
    raise KeyError(key)


def check_same_run(checkpoint: Path, config: Config) -> list[str]:
    """Compare the settings of this start with those of a checkpoint.

    Returns:
        Sentences about what is applied from now on, for the log.

    Raises:
        UserError: names every setting that cannot change.
    """
    earlier = load_config_of(checkpoint)
    saved, now = resolved_settings(earlier), resolved_settings(config)
    changed = [key for key in sorted({*saved, *now}) if saved.get(key) != now.get(key)]
    refused = [key for key in changed if decision_of(key) == "refused"]
    sentences = [
        f"setting changed since the checkpoint and applied from now on: {key} {saved.get(key)!r} -> {now.get(key)!r}"
        for key in changed
        if decision_of(key) == "applied"
    ]
    problems = [
        f"{_name_for_user(key, config)}: the run was started with {saved.get(key)!r}, now it is {now.get(key)!r}; "
        f"undo the change or choose another --run_dir ({checkpoint.parent.parent} keeps the old run)"
        for key in refused
    ]
    problems += _changes_that_do_not_fit(earlier, config)
    moved, other = _folders(checkpoint, earlier, config)
    if problems or other:
        raise UserError(problems + other)
    return sentences + moved + _moved_shards(earlier, config)


def engine_changes(run_dir: Path, ds_config: dict[str, Any]) -> list[str]:
    """Name engine settings that differ from those of the last start; all of them are applied."""
    try:
        before = read_json(run_dir / DS_CONFIG)
    except UserError:  # a copy for people: the run does not depend on it
        return []
    if not isinstance(before, dict):
        return []
    saved, now = ({key: tree[key] for key in ENGINE_KEYS & tree.keys()} for tree in (before, ds_config))
    saved, now = flatten(saved), flatten(now)
    return [
        f"engine setting changed since the last start and applied from now on: {key} {saved.get(key)!r} -> "
        f"{now.get(key)!r}"
        for key in sorted({*saved, *now})
        if saved.get(key) != now.get(key)
    ]


def resolved_settings(config: Config) -> dict[str, Any]:
    """List settings by dotted name, such that two ways to say the same are equal.

    Seeds are those that each purpose uses. A tower is its whole transformers configuration, whether a key was set, is
    the default or comes from a shape. Paths of data and folders are left out, because their contents are compared.
    """
    tree = config.model_dump(mode="json")
    tree["data"]["shards"] = [{"name": source.name, "weight": _by_step(source.weight)} for source in config.data.shards]
    for purpose in ("init", "data", "augmentation"):
        tree["train"][f"{purpose}_seed"] = config.seed(purpose)
    tree["data"]["document_tokens"] = config.data.longest_document
    tree["data"].pop("lanes")  # chosen from the corpus where it is not set; the loader compares the number
    factors = config.train.learning_rate_factors
    tree["train"]["learning_rate_factors"] = sorted((part, factor) for part, factor in factors.items() if factor != 1)
    towers = {
        "vision": (config.model.vision, vision_config(config.model)),
        "decoder": (
            config.model.decoder,
            build_decoder_config(config.model.decoder.model_type, config.model.decoder.hf_keys, 8, 8),
        ),
    }
    for name, (settings, architecture) in towers.items():
        own = {key: value for key, value in tree["model"][name].items() if key in type(settings).model_fields}
        own.pop("shape", None)
        tree["model"][name] = architecture.to_dict() | own
    for key in FOLDERS:
        *groups, last = key.split(".")
        branch = tree
        for group in groups:
            branch = branch[group]
        branch.pop(last)
    return flatten(tree)


def _by_step(weight: float | dict[int, float]) -> dict[int, float]:
    return weight if isinstance(weight, dict) else {0: weight}


def _name_for_user(key: str, config: Config) -> str:
    """Name the setting that a user has to look at: a seed of a purpose may come from the seed of all."""
    if key.endswith("_seed") and getattr(config.train, key.removeprefix("train.")) is None:
        return f"train.seed (for {key.removeprefix('train.')})"
    return key


def _changes_that_do_not_fit(earlier: Config, config: Config) -> list[str]:
    """Name changes that could be applied by themselves but not in this run."""
    problems = []
    if frozen_parts(earlier.train) != frozen_parts(config.train):
        problems.append(
            f"train.learning_rate_factors: {earlier.train.learning_rate_factors} and "
            f"{config.train.learning_rate_factors} freeze other parts, and a frozen part has no moments to continue "
            "with; undo the change, or start a new --run_dir from a release (model.init_from)"
        )
    by_step = any(isinstance(source.weight, dict) for source in config.data.shards)
    if by_step and earlier.train.global_batch_rows != config.train.global_batch_rows:
        problems.append(
            f"train.global_batch_rows: {earlier.train.global_batch_rows} -> {config.train.global_batch_rows}: "
            "data.shards has weights by step, and steps are counted in rows; undo the change or start a new --run_dir"
        )
    return problems


def _folders(checkpoint: Path, earlier: Config, config: Config) -> tuple[list[str], list[str]]:
    """Compare folders named by settings: sentences about those that moved, and about those that are not the same."""
    saved, now = read_state(checkpoint).get("folders", {}), folder_contents(config)
    moved, other = [], []
    for key in FOLDERS:
        before, after = (value_of(settings, key) for settings in (earlier, config))
        known = key in saved and key in now
        same = known and saved[key] == now[key]
        if before == after:
            # Weights come from the checkpoint; only the tokenizer is read again.
            if key == "data.tokenizer" and known and not same:
                other.append(f"{key}: {after} is another tokenizer than when the run was started; restore it")
        elif same:
            moved.append(f"{key}: {after} holds the same as {before} did")
        else:
            other.append(
                f"{key}: the run was started with {before!r}, now it is {after!r}, which is not known to hold the "
                f"same; undo the change or choose another --run_dir ({checkpoint.parent.parent} keeps the old run)"
            )
    return moved, other


def _moved_shards(earlier: Config, config: Config) -> list[str]:
    return [
        f"data.shards: {now.name} is read from {now.paths}, before from {before.paths}; "
        "shards are compared by fingerprint"
        for before, now in zip(earlier.data.shards, config.data.shards, strict=True)
        if before.paths != now.paths
    ]
