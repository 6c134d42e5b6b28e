"""Plants SLAP_FAULT in ranks that a launcher starts; on PYTHONPATH of the tests that want it.

Python imports a module of this name before anything else. Launchers and their helpers are Python
too: only `python -m slap_ds ... train` is meant.
"""

import itertools
import os
import sys

_words = sys.orig_argv
if os.environ.get("SLAP_FAULT") and "launch" not in _words and "train" in _words:
    _module = dict(itertools.pairwise(_words)).get("-m")
    if _module == "slap_ds":
        from tests.faults import planted

        planted.install(os.environ["SLAP_FAULT"])
