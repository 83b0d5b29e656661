"""The pages of the project: their blocks of code, links and anchors."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.support.ranks import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "kernels" / "README.md"])
"""Every page that a reader finds."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    file: str | None
    """What ``file=`` after the language names."""
    heading: str
    """The heading of the second level that it stands under."""
    text: str


def blocks_of(page: Path) -> list[Block]:
    """Read the fenced blocks of a page, in order."""
    blocks, heading = [], ""
    for match in re.finditer(r"^## ([^\n]+)$|^```(\w*)(?: file=(\S+))?\n(.*?)^```$", page.read_text(), re.M | re.S):
        if match[1]:
            heading = match[1]
        else:
            blocks.append(Block(match[2], match[3], heading, match[4]))
    return blocks


def prose_of(page: Path) -> str:
    """Read a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def anchors_of(page: Path) -> set[str]:
    """Name the headings of a page as GitHub names them in links."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}
