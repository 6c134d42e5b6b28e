"""Imported once by the fork server: all that a rank imports by itself before its first step."""

import slap_ds.cli.training
import slap_ds.train.loop  # noqa: F401
import tests.ranks_preload  # noqa: F401
