"""The public functions of `slap_ds` that no room of the package has for its own use."""
