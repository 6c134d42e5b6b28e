"""`python -m slap_ds`, the form that launchers start."""

from slap_ds.cli import main

main()
