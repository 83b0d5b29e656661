"""Imports point downwards: who may know whom."""

LAYERS = (
    # From the bottom; modules of one layer may import each other, packages of one layer only in one direction.
    ("errors", "settings", "tokens", "batch", "files", "metrics", "cli", "tasks"),
    ("data", "models"),
    ("objectives",),
    ("data.settings", "training.settings", "evaluation.settings", "config"),
)
