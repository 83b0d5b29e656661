"""Fill the templates of the pages. What is put into them is escaped: texts and names may come from anybody."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """Make a page that needs nothing else: no other file, no network, no script."""
    # Names of files that are no text hold halves of characters, which no file can hold.
    page = _environment().get_template(template).render(**values)
    return page.encode("utf-8", "replace").decode()
