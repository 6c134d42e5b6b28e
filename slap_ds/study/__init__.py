"""A grid of runs from one base model, and what their differences say.

    STUDY.yaml -> cells -> data, base model -> runs in worker processes -> results -> comparisons

Every cell is an ordinary run folder: `slap-ds train` with the config.yaml in it trains the same.
"""
