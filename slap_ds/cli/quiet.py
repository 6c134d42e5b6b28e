"""What the libraries say beside the point stays unsaid, unless -v is given; errors always show.

A command speaks by its lines, its progress bar, its one line for a mistake. Python warnings of
libraries' modules, DeepSpeed's log below errors, transformers' notes and loading bars tell a user
nothing to act on. What a library raises, and what it logs as an error, is untouched.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "datasets", "huggingface_hub")


def quieten() -> None:
    """Let libraries speak of errors alone; to be called before they are imported.

    Variables of the environment that already say how loud they shall be count, and so does -W.
    """
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.filterwarnings(
                "ignore", category=category, module=rf"({'|'.join(LIBRARIES)})(\.|$)"
            )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # DeepSpeed sets its logger's level when it is imported; a filter stays.
    logging.getLogger("DeepSpeed").addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
