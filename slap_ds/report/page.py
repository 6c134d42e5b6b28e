"""One HTML file with its figures inside: no script, nothing from a network.

Whatever comes from data is text here: it is escaped, and the page's own policy forbids scripts.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from slap_ds.data.formats import Message
from slap_ds.files import write_text
from slap_ds.report.numbers import plain

STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1d2329; --quiet: #5b6670; --line: #e1e5e9;
  --box: #f6f7f9; --accent: #0b62a8; --good: #17703a; --bad: #b3401c; }
@media (prefers-color-scheme: dark) { :root { --page: #14181c; --text: #dfe4e8; --quiet: #98a3ad;
  --line: #2d343b; --box: #1c2228; --accent: #6cb2eb; --good: #63c98a; --bad: #f2906b; } }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; max-width: 64rem; margin: 0 auto;
  padding: 2.5rem 1.25rem 4rem; color: var(--text); background: var(--page);
  overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.25; font-weight: 600; }
h1 { font-size: 1.75rem; margin: 0 0 1.25rem; } h3 { font-size: 1rem; margin: 1.8rem 0 .5rem; }
h2 { font-size: 1.2rem; margin: 3rem 0 .75rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
p { max-width: 46rem; } .quiet, figcaption, dt, footer { color: var(--quiet); font-size: 13px; }
.scroll { overflow-x: auto; max-width: 100%; }
figure { margin: 1rem 0 1.75rem; } figcaption { max-width: 46rem; }
img { display: block; width: auto; max-width: 100%; min-width: 32rem; mix-blend-mode: multiply; }
@media (prefers-color-scheme: dark) {
  img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; } }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums;
  margin: .75rem 0; overflow-wrap: normal; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; } td { white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { padding-left: 0; text-align: left; min-width: 6rem;
  max-width: 22rem; white-space: normal; overflow-wrap: anywhere; }
tr.part td { padding-top: 1.1rem; color: var(--accent);
  font-weight: 600; }
tbody tr:hover td { background: var(--box); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr));
  gap: .9rem 2rem; margin: 0 0 1.5rem; } dt { margin: 0; } dd { margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 0 0 1.75rem; }
.tiles div { background: var(--box); border-radius: 8px; padding: .8rem 1rem; }
.tiles b { display: block; font-size: 1.5rem; font-weight: 600; color: var(--accent);
  line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--quiet); font-size: 13px; }
.warning { border-left: 3px solid var(--bad); background: var(--box); padding: .1rem 1.1rem;
  margin: 0 0 1.75rem; border-radius: 0 8px 8px 0; }
.warning ul { padding-left: 1.1rem; }
.verdict { white-space: nowrap; color: var(--quiet); } .verdict.good { color: var(--good); }
.verdict.bad { color: var(--bad); } .verdict.good, .verdict.bad { font-weight: 600; }
article { border: 1px solid var(--line); border-radius: 8px; margin: .75rem 0;
  padding: .7rem 1rem .9rem; max-height: 34rem; overflow-y: auto; }
article p { white-space: pre-wrap; margin: .1rem 0 0; max-width: none; }
article h4 { margin: .8rem 0 0; font-size: 12px; font-weight: 600; color: var(--quiet); }
article h4.assistant { color: var(--accent); }
summary { cursor: pointer; color: var(--accent); margin: .75rem 0; }
details > summary h2 { display: inline; border: 0; padding: 0; }
footer { margin-top: 4rem; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# Verdict -> its mark and class; a mark, since colour alone tells some readers nothing.
_VERDICTS = {"better": ("▼", "good"), "not worse": ("≈", "good"), "worse": ("▲", "bad")}


class Markup(str):
    """HTML that a cell takes as it is."""


def heading(text: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str, quiet: bool = False) -> str:
    """A paragraph of plain text."""
    kind = ' class="quiet"' if quiet else ""
    return f"<p{kind}>{html.escape(text)}</p>"


def figure(path: Path, caption: str) -> str:
    """A PNG file, put into the page itself."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    text = html.escape(caption)
    return (
        f'<figure><div class="scroll" tabindex="0"><img alt="{text}" '
        f'src="data:image/png;base64,{data}"></div><figcaption>{text}</figcaption></figure>'
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows of values, in a box of their own that scrolls; a row of one value heads those below."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(_row(row, len(header)) for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _row(row: Sequence[object], columns: int) -> str:
    if len(row) == 1 < columns:
        return f'<tr class="part"><td colspan="{columns}">{html.escape(plain(row[0]))}</td></tr>\n'
    cells = (v if isinstance(v, Markup) else html.escape(plain(v)) for v in row)
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"


def verdict(word: str) -> Markup:
    """A verdict with its mark, and in colour where it decides something."""
    mark, kind = _VERDICTS.get(word, ("", ""))
    return Markup(f'<span class="verdict {kind}">{mark} {html.escape(word)}</span>')


def facts(values: Mapping[str, str]) -> str:
    """Names and what they are."""
    parts = (
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(_held(value))}</dd></div>"
        for name, value in values.items()
    )
    return f"<dl>{''.join(parts)}</dl>"


def _held(text: str) -> str:
    """Numbers in one line with their units."""
    return re.sub(r"(?<=\d) (?=([kMBTPE]|GiB|min|[dhs]|[A-Z]?FLOPs)\b)", "\N{NO-BREAK SPACE}", text)


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """The few numbers that matter, large: (number, what it is)."""
    parts = (
        f"<div><b>{html.escape(number)}</b><span>{html.escape(what)}</span></div>"
        for number, what in values
    )
    return f'<div class="tiles">{"".join(parts)}</div>'


def conversation(title: str, messages: Sequence[Message]) -> str:
    """All turns, each with its role."""
    turns = []
    for message in messages:
        role = message.role if message.trained else f"{message.role}, not trained"
        said = [f"[thinks] {message.reasoning}"] if message.reasoning else []
        said += [message.content] if message.content else []
        said += [f"[calls] {call.name} {call.arguments}" for call in message.calls]
        name = html.escape(" ".join([role, message.name]).strip())
        text = html.escape("\n".join(said))
        turns.append(f'<h4 class="{message.role}">{name}</h4><p>{text}</p>')
    return (
        f'<article tabindex="0"><span class="quiet">{html.escape(title)}</span>'
        f"{''.join(turns)}</article>"
    )


def folded(summary: str, parts: Sequence[str]) -> str:
    """Parts that show when they are asked for."""
    inner = "\n".join(parts)
    return f"<details><summary>{html.escape(summary)}</summary>\n{inner}\n</details>"


def warnings(lines: Sequence[str]) -> list[str]:
    """A box above everything else; nothing for no lines."""
    if not lines:
        return []
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return [f'<div class="warning"><p><b>Look at this</b></p><ul>{items}</ul></div>']


def write_page(
    path: Path, title: str, parts: Sequence[str], footer: str = "", refresh_s: int | None = None
) -> None:
    """Write one HTML file that needs no others, whole or not at all.

    Args:
        parts: HTML.
        refresh_s: browsers read it again after so many seconds.
    """
    name, body = html.escape(title), "\n".join(parts)
    again = f'<meta http-equiv="refresh" content="{refresh_s}">\n' if refresh_s else ""
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{again}'
        f"<style>{STYLE}</style></head>\n<body><h1>{name}</h1>\n{body}\n"
        f"<footer>{html.escape(footer)}</footer></body></html>\n",
    )
