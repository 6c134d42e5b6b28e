"""One HTML file with its figures inside: no script, no style sheet, nothing from a network."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em;
  color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; }
img { max-width: 100%; } figure { margin: 1.2em 0; } figcaption { color: #555; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: .2em .7em; border-bottom: 1px solid #e5e5e5; text-align: right; }
th { text-align: right; border-bottom: 2px solid #999; }
th:first-child, td:first-child { text-align: left; }
.warning { border: 2px solid #D55E00; background: #FFF4EC; padding: .3em 1em; margin: 1em 0; }
"""


def heading(text: str) -> str:
    """A second-level heading."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def figure(path: Path, caption: str) -> str:
    """A PNG file, put into the page itself."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(show(value))}</td>" for value in row) + "</tr>\n"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def warnings(lines: Sequence[str]) -> list[str]:
    """A box above everything else; nothing for no lines."""
    if not lines:
        return []
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return [f'<div class="warning"><p><b>Look at this</b></p><ul>{items}</ul></div>']


def show(value: object) -> str:
    """Numbers short enough for a table; nothing for None and NaN."""
    if value is None or value != value:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) >= 1e5 or abs(value) < 1e-3 else f"{value:.4f}"
    return str(value)


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write one HTML file that needs no others; `parts` are HTML."""
    name = html.escape(title)
    body = "\n".join(parts)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{name}</h1>\n{body}\n</body></html>\n",
        encoding="utf-8",
    )
