"""What every tree of settings is made of."""

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def flatten(tree: dict[str, Any], prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """List the values of a tree by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{name}{separator}", separator)
        else:
            flat[name] = value
    return flat


def suggest(word: str, known: Any) -> str:
    """Hint at the known word that is most like ``word``; empty where none is."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
