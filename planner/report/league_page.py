"""The league table as a Markdown file, or as a page with a chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from attnplan.bench.league import COSTS, HEADERS, Entry, lines
from attnplan.profiles.store.output_files import check_output, replace_file

ROW, LEFT, WIDTH = 24, 250, 560
"""Pixels: height of a row, where bars begin, and how long the longest is."""
BEGINNING = {
    ".md": ("# ", "\n```\nattnplan compare "),
    ".html": ("<!doctype html>", "<code>attnplan compare "),
}
"""How a file begins, and what else is in it, by its suffix."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; color: #1b1f24 }
table { border-collapse: collapse; font-size: 13px; margin-top: 2rem }
th, td { padding: .3rem .6rem; text-align: left; border-bottom: 1px solid #d8dee4 }
td:nth-child(n+3) { font-variant-numeric: tabular-nums }
code { font-size: 90% }
svg text { font: 13px system-ui, sans-serif; fill: #1b1f24 }
"""


def write(path: Path, entries: Sequence[Entry], title: str, command: str) -> None:
    """Write the table to `path`, as its name ends.

    Args:
        path: a file that ends in .md or .html.
        entries: of `league.league`.
        title: what was compared.
        command: the command that makes the file.

    Raises:
        ValueError: the name ends in something else.
    """
    check(path)
    make = markdown if path.suffix == ".md" else page
    replace_file(path, make(entries, title, command).encode())


def check(path: Path) -> None:
    """Refuse a name before anything is measured.

    Raises:
        ValueError: the name ends in neither .md nor .html, or another file is there.
    """
    if path.suffix not in (".md", ".html"):
        raise ValueError(f"{path} must end in .md or .html")
    check_output(path, f"a league table as {path.suffix}", _is_page)


def _is_page(path: Path) -> bool:
    begin, command = BEGINNING[path.suffix]
    content = path.read_bytes()
    return content.startswith(begin.encode()) and command.encode() in content


def markdown(entries: Sequence[Entry], title: str, command: str) -> str:
    rows = [list(HEADERS), ["---"] * len(HEADERS), *lines(entries)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"# {title}\n\n```\n{command}\n```\n\n{COSTS}\n\n{table}\n"


def page(entries: Sequence[Entry], title: str, command: str) -> str:
    cells = [f"<tr>{_cells('th', HEADERS)}</tr>"]
    cells += [f"<tr>{_cells('td', row)}</tr>" for row in lines(entries)]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{escape(title)}</h1><p><code>{escape(command)}</code></p>"
        "<p>Predicted KL, in nats per token, where every head chooses among a method's settings "
        "and dense attention (bars), and with all heads on one setting (rings). Logarithmic. "
        f"{escape(COSTS)}</p>"
        f"{chart(entries)}<table>{''.join(cells)}</table></html>\n"
    )


def chart(entries: Sequence[Entry]) -> str:
    """Bars of the KL per head and rings of the uniform KL, as SVG."""
    known = [v for e in entries for v in (e.kl_per_head, e.kl) if v and math.isfinite(v)]
    if not known:
        return ""
    low = math.floor(math.log10(min(known)) - 0.05)
    high = math.ceil(math.log10(max(known)))

    def x(value: float) -> float:
        return LEFT + WIDTH * (math.log10(value) - low) / max(high - low, 1)

    height = ROW * (len(entries) + 1)
    parts = []
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(f'<path d="M{at:.0f} 0V{height - ROW}" stroke="#d8dee4"/>')
        parts.append(f'<text x="{at:.0f}" y="{height - 6}" text-anchor="middle">1e{power}</text>')
    for row, entry in enumerate(entries):
        middle = ROW * row + ROW / 2
        name = escape(entry.name)
        parts.append(f'<text x="{LEFT - 8}" y="{middle + 5}" text-anchor="end">{name}</text>')
        if entry.kl_per_head and math.isfinite(entry.kl_per_head):
            long = x(entry.kl_per_head) - LEFT
            parts.append(
                f'<rect x="{LEFT}" y="{middle - 7}" width="{long:.1f}" height="14" fill="#3b7dd8"/>'
            )
        if entry.kl and math.isfinite(entry.kl):
            parts.append(
                f'<circle cx="{x(entry.kl):.1f}" cy="{middle}" r="5" fill="#fff" '
                'stroke="#d1495b" stroke-width="2"/>'
            )
    size = f'width="{LEFT + WIDTH + 40}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>'


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)
