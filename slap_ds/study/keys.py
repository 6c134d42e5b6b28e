"""Keys of runs: a hash of what decides a run's results, its files' content included.

Where the files lie does not count, so a study that was moved goes on.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from slap_ds.config.schema import Config, SelectionConfig
from slap_ds.data.hashes import source_facts
from slap_ds.data.sources import find_sources
from slap_ds.files import sha256
from slap_ds.selection import make_selector

# Above it a file counts by size and time: hashing a large model would take minutes at every start.
LARGE_BYTES = 2**30
# Settings that name what is read; what lies there takes their place.
PLACES: dict[str, Any] = {
    "run_dir": True,
    "model": {"path", "tokenizer"},
    "data": {"train", "eval", "cache_dir"},
    "selection": {"validation", "reference_losses"},
    "engine": {"deepspeed"},
}


class Keys:
    """The keys of configs that are told apart now: each file is looked at once."""

    def __init__(self) -> None:
        self._data = functools.cache(lambda paths: source_facts(find_sources(paths)))
        self.of_path = functools.cache(path_facts)

    def of(self, config: Config, base: Any) -> str:
        """The key of a run.

        Args:
            base: stands for the model that it starts from.

        Raises:
            ValueError, FileNotFoundError: its data cannot be found.
        """
        settings = settings_of(config)
        data = [config.data.train, config.data.eval, config.selection.validation]
        named = [config.model.tokenizer, config.engine.deepspeed, config.selection.reference_losses]
        facts = [settings, base, [self._data(tuple(paths)) for paths in data]]
        text = json.dumps([*facts, [self.of_path(path) for path in named]], sort_keys=True)
        text = text.replace(str(Path(config.run_dir).parents[1]), "{study}")
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def settings_of(config: Config) -> dict[str, Any]:
    """What of the settings decides a run, less the places of what it reads."""
    # Without defaults, so that a new setting does not make finished cells look unfinished.
    settings = config.model_dump(mode="json", exclude=PLACES, exclude_defaults=True)
    method = SelectionConfig().method
    if config.selection.method == method:
        # What the default method does by default is what a study is about: where that changes, its
        # cells are others. Other methods' settings, which may be joined by new ones, say nothing.
        chosen = config.selection.model_dump(mode="json", exclude=PLACES["selection"])
        settings["selection"] = {
            name: value
            for name, value in chosen.items()
            if name == method or not isinstance(value, dict)
        }
        if make_selector(config.selection.model_dump()).needs:
            settings["scoring"] = config.scoring.model_dump(mode="json")
    return settings


def path_facts(path: str | None) -> Any:
    """What a file or a folder's files hold; of anything else (a hub's name) the text itself."""
    found = Path(path or "").expanduser()
    if path and found.is_file():
        return _mark(found)
    if path and found.is_dir():
        files = [each for each in sorted(found.iterdir()) if each.is_file()]
        return [[each.name, _mark(each)] for each in files]
    return path


def _mark(path: Path) -> Any:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns] if stat.st_size > LARGE_BYTES else sha256(path)
