"""`slap-ds report`: a run's or a study's folder -> figures and one HTML page."""

from __future__ import annotations

from pathlib import Path

from slap_ds.report.page import write_page
from slap_ds.report.run_page import run_page
from slap_ds.report.study_page import study_page
from slap_ds.study.run import STUDY_FILE


def report(folder: Path, out: Path | None = None) -> Path:
    """Write index.html and the figures into `out` (default `folder`/report); returns the page.

    Raises:
        FileNotFoundError: `folder` holds neither a run nor a study, or a run's data are gone.
        ValueError: nothing finished to report on.
    """
    out = out or folder / "report"
    is_study = (folder / STUDY_FILE).is_file()
    if not is_study and not (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} is neither a run (metrics.jsonl) nor a study ({STUDY_FILE})"
        )
    out.mkdir(parents=True, exist_ok=True)
    parts = study_page(folder, out) if is_study else run_page(folder, out)
    name = folder.resolve().name
    write_page(out / "index.html", f"{'Study' if is_study else 'Run'} {name}", parts)
    return out / "index.html"
