"""The documentation's site builds strictly, and takes nothing from elsewhere."""

import os
import re
import subprocess
import sys

import pytest

from slap_ds.config.file import config_keys
from tests.docs.commands import ROOT

pytest.importorskip("mkdocs", reason="make site installs it")


def test_the_site_builds_strictly_and_needs_no_network(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/site/mkdocs.yml"]
    built = subprocess.run(
        [*command, "-d", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {path: path.read_text("utf-8") for path in tmp_path.rglob("*.html")}
    assert len(pages) > 25
    for path, text in pages.items():
        fetched = re.findall(r"<(?:script|img|iframe)[^>]*src=\"(http[^\"]*)", text)
        fetched += re.findall(r"<link[^>]*rel=\"(?:stylesheet|preload|preconnect)[^>]*http", text)
        assert not fetched, path
    settings = pages[tmp_path / "reference" / "settings.html"]
    assert all(f"<code>{key}</code>" in settings for key, _ in config_keys())
    assert "slap-ds bench throughput" in pages[tmp_path / "reference" / "cli.html"]
    assert "farthest_point" in pages[tmp_path / "reference" / "python.html"]
