"""The table of docs/recipes.md: `slap-ds estimate` of every recipe, at its model's published sizes.

python -m tests.recipe_table
"""

from __future__ import annotations

import os

from slap_ds.config.file import read_config
from slap_ds.estimate import Hardware, Shape, estimate
from tests.config.test_recipes import RECIPES, REPO, meta_model

SAMPLE_TOKENS = 512
CANDIDATES_PER_GPU = 32
GPUS = {"lora": (1, 8, 64), "offload": (1, 2, 8, 16), "": (8, 16, 64, 512)}
NVLINK, NETWORK = 200e9, 40e9  # bytes a second that a GPU gathers, inside a node and between nodes
LIMIT_GIB = 72  # of a device with 80 GB; the rest is CUDA's context and fragmentation


def rows() -> list[str]:
    """Markdown lines."""
    out = [
        "| recipe | GPUs | candidates a step | GiB on a GPU | GiB on its host | seconds a step "
        "| of full training |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    os.chdir(REPO)  # the recipes name their DeepSpeed files from there
    for path in RECIPES:
        config = read_config(str(path))
        shape = Shape.of(meta_model(path).config, config.model.lora)
        kind = path.stem.rpartition("-")[2]
        for gpus in GPUS.get(kind, GPUS[""]):
            hardware = Hardware(gather_bytes_per_s=NVLINK if gpus <= 8 else NETWORK)
            e = estimate(config, shape, SAMPLE_TOKENS, 0.5, gpus, CANDIDATES_PER_GPU, hardware)
            fits = "" if e.total_gib <= LIMIT_GIB else " (too much)"
            host = f"{sum(e.host_gib.values()):.0f}" if e.host_gib else "–"
            out.append(
                f"| `{path.name}` | {gpus} | {e.candidates:,} | {e.total_gib:.0f}{fits} | {host} "
                f"| {sum(e.step_s.values()):.1f} | {e.ratio_to_full:.2f} |"
            )
    return out


if __name__ == "__main__":
    print("\n".join(rows()))
