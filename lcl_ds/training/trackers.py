"""Send metrics to experiment trackers, through the classes of ``accelerate.tracking``.

``metrics.jsonl`` is the record of a run; a tracker is a copy for watching. So no tracker can end a run: one that fails
is named once and left out from then on.
"""

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from lcl_ds.config import Config
from lcl_ds.errors import UserError
from lcl_ds.files import write_whole
from lcl_ds.settings import flatten
from lcl_ds.training.settings import TRACKER_EXTRAS

logger = logging.getLogger(__name__)

RUN_ID = "tracker_id"
"""File of the run folder with the name under which online trackers know the run when it is continued."""


def check_trackers(names: Sequence[str]) -> None:
    """Look for the packages of the trackers that a recipe names.

    Raises:
        UserError: names what to install.
    """
    available = {str(kind) for kind in get_available_trackers()}
    missing = [name for name in names if name not in available]
    if missing:
        raise UserError([f"log.trackers: {name} is not installed: pip install {_package(name)}" for name in missing])


def _package(tracker: str) -> str:
    return f"'lcl_ds[{tracker}]'" if tracker in TRACKER_EXTRAS else tracker


class Trackers:
    """The trackers of one run by name, which take every step's metrics as long as they work."""

    def __init__(self, started: Mapping[str, GeneralTracker]):
        self._trackers = dict(started)

    def log(self, metrics: dict[str, Any]) -> None:
        """Hand over one step's metrics; numbers inside others are named like ``sources/NAME/images``."""
        values = flatten(metrics, separator="/")
        step = values["step"]
        self._with_each(lambda tracker: tracker.log(_without_reserved(values, tracker), step=step))

    def close(self) -> None:
        """Let every tracker send what it still holds."""
        self._with_each(lambda tracker: tracker.finish())

    def _with_each(self, action: Callable[[GeneralTracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            if not _succeeds(name, partial(action, tracker)):
                del self._trackers[name]


def open_trackers(config: Config, run_dir: Path, first_step: int) -> Trackers:
    """Start the trackers that the settings name; for the first rank alone.

    Args:
        first_step: steps that are done. What TensorBoard has of later ones, from before the run was interrupted, is
            replaced; wandb keeps what it has of them; the others may show them twice.
    """
    trackers: dict[str, GeneralTracker] = {}

    def start(name: str) -> None:
        PartialState()  # accelerate's trackers log through it
        tracker = _tracker(name, config, run_dir, first_step)
        tracker.start()
        if not tracker.requires_logging_directory:  # those that write into the run folder have config.yaml beside them
            tracker.store_init_configuration(_plain_settings(config))
        trackers[name] = tracker

    for name in config.log.trackers:
        _succeeds(name, partial(start, name))
    return Trackers(trackers)


def _plain_settings(config: Config) -> dict[str, Any]:
    """List the settings by dotted name, in types that every tracker takes."""
    settings = flatten(config.model_dump(mode="json"))
    plain = (bool, int, float, str, type(None))
    return {key: value if isinstance(value, plain) else str(value) for key, value in settings.items()}


def _tracker(name: str, config: Config, run_dir: Path, first_step: int) -> GeneralTracker:
    make = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        # Its readers pass over what earlier files hold of the steps from purge_step on.
        return make("tensorboard", run_dir, purge_step=first_step + 1)
    if name == "wandb":  # takes no step a second time
        return make(config.name, id=_run_id(run_dir), name=run_dir.resolve().name, resume="allow", dir=run_dir)
    if name == "trackio":
        return make(config.name, name=f"{run_dir.resolve().name}-{_run_id(run_dir)}", resume="allow")
    return make(config.name, run_dir) if make.requires_logging_directory else make(config.name)


def _without_reserved(values: dict[str, Any], tracker: GeneralTracker) -> dict[str, Any]:
    """Leave out what a tracker keeps for itself: trackio has a ``step`` of its own."""
    return {name: value for name, value in values.items() if (tracker.name, name) != ("trackio", "step")}


def _run_id(run_dir: Path) -> str:
    """Read what names the run to an online tracker when it is continued; drawn at its first start."""
    path = run_dir / RUN_ID
    if not path.is_file():
        write_whole(path, secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def _succeeds(name: str, action: Callable[[], None]) -> bool:
    """Let a tracker do something; where it fails, its name and the reason go to the log. Returns whether it worked."""
    try:
        action()
    except Exception as error:  # whatever a tracker's network, disk or server does to it
        reason = " ".join(str(error).split()) or type(error).__name__
        logger.warning("log.trackers: %s fails and is left out; metrics.jsonl has everything: %s", name, reason)
        return False
    return True
