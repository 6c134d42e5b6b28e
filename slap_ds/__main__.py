"""`python -m slap_ds`, the form that launchers start."""

import os

from slap_ds.cli import main

if os.environ.get("SLAP_FAULT"):
    from slap_ds import faults

    faults.install(os.environ["SLAP_FAULT"])
main()
