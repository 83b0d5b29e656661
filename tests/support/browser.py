"""Look at pages in a headless Chromium, where there is one: what is wrong with them, and pictures of them."""

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from html import escape, unescape
from pathlib import Path

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
"""None: there is none on this machine."""
WIDTHS, SCHEMES = (390, 1280), ("light", "dark")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
)
LEAST_CONTRAST = 4.5
"""Of text against what is behind it: what WCAG asks for at level AA."""

FRAMES = """<!doctype html><meta charset="utf-8"><style>iframe {{ border: 0; height: 800px }}</style>
{frames}<pre id="found"></pre><script>
function behind(element) {{
  for (; element; element = element.parentElement) {{
    const colour = element.ownerDocument.defaultView.getComputedStyle(element).backgroundColor;
    if (!/^rgba\\(.*, 0\\)$|transparent/.test(colour)) return colour;
  }}
  return "rgb(255, 255, 255)";
}}
function light(colour) {{
  const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
}}
function look(frame, name, found) {{
  const page = frame.contentDocument, view = frame.contentWindow, width = view.innerWidth;
  const say = (what, element) =>
    found.push(`${{name}}: ${{what}}: <${{element.tagName}} ${{element.className}}> ` +
      (element.textContent || "").trim().slice(0, 60));
  if (page.documentElement.scrollWidth > width) say("the page is wider than the window", page.body);
  for (const element of page.body.querySelectorAll("*")) {{
    const style = view.getComputedStyle(element);
    if (element.closest("svg") || style.display === "none" || element.closest("details:not([open]) > :not(summary)"))
      continue;
    const box = element.getBoundingClientRect();
    if (box.width && (box.right > width + 1 || box.left < -1)) say("outside of the window", element);
    const reaches = style.display !== "inline" && element.clientWidth && element.scrollWidth > element.clientWidth + 1;
    if (reaches && !element.matches(".area")) say("wider than its box", element);
    const card = element.closest("figure, section")?.getBoundingClientRect();
    if (card && (box.left < card.left || box.right > card.right + 1)) say("outside of its card", element);
    const text = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!text) continue;
    const [low, high] = [light(style.color), light(behind(element))].sort((a, b) => a - b);
    if ((high + 0.05) / (low + 0.05) < {contrast}) say("too little contrast", element);
  }}
  const labels = [...page.querySelectorAll(".area span")];
  for (const [i, one] of labels.entries()) {{
    const next = labels[i + 1];
    if (!next || one.parentElement !== next.parentElement) continue;
    const a = one.getBoundingClientRect(), b = next.getBoundingClientRect();
    if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) say("labels overlap", one);
  }}
}}
window.addEventListener("load", () => {{
  const found = [];
  for (const frame of document.querySelectorAll("iframe")) look(frame, frame.title, found);
  document.getElementById("found").textContent = "found " + JSON.stringify(found);
}});
</script>"""
"""A page of frames, one for each page, width and scheme; prefers-color-scheme in a frame is its own color-scheme."""


def problems_of(pages: dict[str, str]) -> list[str]:
    """Name what is wrong with pages at every width, light and dark: cut or overflowing text, faint text, errors.

    Args:
        pages: HTML by a name of each.
    """
    frames = "\n".join(
        f'<iframe title="{escape(name)} {width} {scheme}" style="width:{width}px;color-scheme:{scheme}" '
        f'srcdoc="{escape(html)}"></iframe>'
        for name, html in pages.items()
        for width in WIDTHS
        for scheme in SCHEMES
    )
    done = _browse(FRAMES.format(frames=frames, contrast=LEAST_CONTRAST), ["--dump-dom"])
    found = re.search(r'<pre id="found">found (.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return [*json.loads(unescape(found[1])), *console]


def screenshot(html: str, path: Path, width: int, height: int, scheme: str, scale: float = 1.0, top: int = 0) -> None:
    """Take a picture of a page as a window of that width shows it, from ``top`` on."""
    # A window has a least width, a frame has none.
    frame = (
        f'<!doctype html><body style="margin:0;overflow:hidden"><iframe style="border:0;display:block;width:{width}px;'
        f'height:{height + top}px;margin-top:{-top}px;color-scheme:{scheme}" scrolling="no" srcdoc="{escape(html)}">'
        "</iframe>"
    )
    window = f"--window-size={max(width, 500)},{height}"
    _browse(frame, [f"--screenshot={path}", window, f"--force-device-scale-factor={scale}"])


def _browse(html: str, flags: Sequence[str]) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(html, encoding="utf-8")
        command = [BROWSER, *FLAGS, f"--user-data-dir={folder}/profile", *flags, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
