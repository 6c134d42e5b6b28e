"""slap_ds: train on the samples worth training, chosen at every step, under DeepSpeed ZeRO-3."""

__version__ = "0.2.0"
