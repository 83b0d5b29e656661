"""Find objectives, what is trained for, by their names: each is one module here.

A module holds ``Settings`` (a subclass of :class:`lcl_ds.objectives.base.ObjectiveSettings` whose ``name`` is the
module's), ``view(settings, image_first_probability)`` (how documents become sequences) and ``Objective(model,
settings)``. A new objective is a new module here; no other file names it.
"""

import importlib
import pkgutil
from types import ModuleType

from accelerate import init_empty_weights

from lcl_ds.data.sequences import View
from lcl_ds.models.initial import fill_weights
from lcl_ds.models.network import LCLModel
from lcl_ds.objectives.base import Objective, ObjectiveSettings

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"))


def objective_module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def settings_classes() -> tuple[type[ObjectiveSettings], ...]:
    """List the settings of every objective."""
    return tuple(objective_module(name).Settings for name in NAMES)


def view_of(settings: ObjectiveSettings, image_first_probability: float) -> View:
    """Return the view of the objective that ``settings`` name: how documents become sequences."""
    return objective_module(settings.name).view(settings, image_first_probability)


def trained_losses(settings: ObjectiveSettings) -> frozenset[str]:
    """Name the losses of the objective that ``settings`` name that are worth something: whose weight is not 0."""
    losses: tuple[str, ...] = objective_module(settings.name).Objective.losses
    weights = {name: name.replace("_loss", "_weight") for name in losses}
    return frozenset(
        name for name, key in weights.items() if getattr(settings, key, 1.0) or getattr(settings, f"{key}_end", None)
    )


def build_objective(model: LCLModel, settings: ObjectiveSettings, seed: int) -> Objective:
    """Build the objective that ``settings`` name around ``model``, which stays as it is; ``seed`` draws its heads."""
    objective = build_empty_objective(model, settings)
    fill_weights(objective, seed)
    return objective


def build_empty_objective(model: LCLModel, settings: ObjectiveSettings) -> Objective:
    """Build the objective that ``settings`` name around ``model``; its own weights take no memory."""
    with init_empty_weights():
        return objective_module(settings.name).Objective(model, settings)
