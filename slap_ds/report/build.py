"""`slap-ds report`: folders of runs, or a study's -> figures and one HTML page."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from slap_ds import __version__
from slap_ds.report.coverage import Labels
from slap_ds.report.page import write_page
from slap_ds.report.run_head import date_text, is_running, read_log
from slap_ds.report.run_page import run_page
from slap_ds.report.runs_page import runs_page
from slap_ds.report.study_page import study_page
from slap_ds.study.run import STUDY_FILE

# A refresh takes at most a fifth of one core from the run that it looks at.
REST = 4


def report(
    folders: Sequence[Path],
    out: Path | None = None,
    known: dict[str, Labels] | None = None,
    refresh_s: int | None = None,
) -> Path:
    """Write index.html and the figures into `out` (default: `report` in the one folder); returns
    the page.

    Args:
        known: what was read of the runs' data, to be remembered from call to call.
        refresh_s: browsers read the page again after so many seconds.

    Raises:
        FileNotFoundError: a folder holds neither a run nor a study.
        ValueError: nothing finished to report on, several folders and no `out`, or a study among
            several.
    """
    known = {} if known is None else known
    if out is None:
        if len(folders) > 1:
            raise ValueError("several runs on one page need a folder for it: --out FOLDER")
        out = folders[0] / "report"
    studies = [folder for folder in folders if (folder / STUDY_FILE).is_file()]
    if studies and len(folders) > 1:
        raise ValueError(f"{str(studies[0])!r} is a study, which has a page of its own")
    for folder in folders:
        if folder not in studies and not (folder / "metrics.jsonl").is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} is neither a run (metrics.jsonl) nor a study ({STUDY_FILE})"
            )
    name = folders[0].resolve().name
    if studies:
        out.mkdir(parents=True, exist_ok=True)
        title, parts = f"Study {name}", study_page(studies[0], out)
    else:
        logs = [read_log(folder) for folder in folders]
        out.mkdir(parents=True, exist_ok=True)
        if len(logs) == 1:
            title, parts = f"Run {name}", run_page(logs[0], out, known)
        else:
            title, parts = f"{len(logs)} runs", runs_page(logs, out, known)
    now = date_text(datetime.now(timezone.utc).isoformat())
    footer = f"Written by slap_ds {__version__}, {now}"
    write_page(out / "index.html", title, parts, footer, refresh_s)
    return out / "index.html"


def watch(
    folders: Sequence[Path], out: Path | None, every_s: int, tell: Callable[[str], None]
) -> Path:
    """`report` again and again, until none of the runs trains any more; returns the page.

    Raises: as `report`, but that a run may have no step yet.
    """
    known: dict[str, Labels] = {}
    said = ""
    while True:
        running = any(is_running(folder) for folder in folders)
        began = time.monotonic()
        try:
            page = report(folders, out, known, every_s if running else None)
        except (FileNotFoundError, ValueError):
            if not running or said.startswith("wrote"):
                raise
            news = "waits for the first step"
        else:
            if not running:
                return page
            news = f"wrote {page}, and again every {every_s} s until the run ends"
        if news != said:
            tell(news)
        said = news
        time.sleep(max(every_s, REST * (time.monotonic() - began)))
