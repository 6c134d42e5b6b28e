"""The public functions of `slap_ds` that the package itself does not call."""
