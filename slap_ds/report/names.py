"""What runs are called where several of them are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def names_of(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many folders before them as tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    names = []
    for parts in paths:
        depth = 1
        while any(other != parts and other[-depth:] == parts[-depth:] for other in paths):
            depth += 1
        names.append("/".join(parts[-depth:]))
    return names
