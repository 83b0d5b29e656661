"""``python -m tests.support.screenshots RUN OUT`` takes the pictures of docs/reports.md, from a finished run."""

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

from lcl_ds.data.__main__ import main as data
from lcl_ds.report.run import read_runs
from lcl_ds.report.single import run_page
from tests.support.browser import BROWSER, SCHEMES, screenshot

SIZES = {"desk": (1280, 1500, 1.0), "phone": (390, 1000, 1.6)}
"""Width and height of the window, and how many pixels of the picture each of its own has."""
DARK_FROM = {("report", "desk"): 1740, ("report", "phone"): 4950, ("rows", "desk"): 560, ("rows", "phone"): 850}
"""Where the dark pictures begin, so that they show what the light ones do not."""
QUALITY = 72


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the pictures")
    parser.add_argument("--recipe", default="demo", help="whose rows are shown (default: demo)")
    arguments = parser.parse_args(argv)
    if BROWSER is None:
        print("there is no Chromium here (Debian: apt-get install chromium)", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rows, picture = Path(folder) / "rows.html", Path(folder) / "picture.png"
        data(["inspect", "--recipe", arguments.recipe, "--rows", "3", "--html", str(rows)])
        pages = {"report": run_page(read_runs([arguments.run])[0], ""), "rows": rows.read_text()}
        for name, page in pages.items():
            for kind, (width, height, scale) in SIZES.items():
                for scheme in SCHEMES:
                    top = DARK_FROM[name, kind] if scheme == "dark" else 0
                    screenshot(page, picture, width, height, scheme, scale, top)
                    with Image.open(picture) as taken:
                        shown = taken.convert("RGB").crop((0, 0, round(width * scale), round(height * scale)))
                        shown.save(arguments.out / f"{name}_{kind}_{scheme}.webp", quality=QUALITY, method=6)
    return 0


if __name__ == "__main__":
    sys.exit(main())
