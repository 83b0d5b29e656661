"""Real ranks under DeepSpeed: all of these tests are slow."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    """Every test of this folder starts ranks or looks at what they did."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
