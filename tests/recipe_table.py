"""The table of docs/recipes.md: `slap-ds estimate` of every recipe, at its model's published sizes.

python -m tests.recipe_table
"""

from __future__ import annotations

import os

from slap_ds.config.file import read_config
from slap_ds.estimate import GPUS as KINDS
from slap_ds.estimate import Shape
from slap_ds.estimate.outlook import Tokens, outlook
from slap_ds.train.inputs import settle_candidates
from tests.config.test_recipes import RECIPES, REPO, meta_model

TOKENS = Tokens(mean=512, response_share=0.5)
GPUS = {"lora": (1, 8, 32, 64), "offload": (1, 2, 8, 32), "": (8, 32, 64, 512)}


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
        model_config = meta_model(path).config
        shape = Shape.of(model_config, config.model.lora)
        kind = path.stem.rpartition("-")[2]
        for gpus in GPUS.get(kind, GPUS[""]):
            mine = settle_candidates(config, model_config, TOKENS.mean, TOKENS.response_share, gpus)
            candidates = mine.batch.candidates
            found = outlook(mine, shape, TOKENS, gpus, candidates, KINDS["h100"])
            assert found.advice is None, f"{path.name} on {gpus}: {found.advice}"
            e, fits = found.estimate, "" if found.fits else " (too much)"
            host = f"{sum(e.host_gib.values()):.0f}" if e.host_gib else "–"
            out.append(
                f"| `{path.name}` | {gpus} | {e.candidates:,} | {e.needed_gib:.0f}{fits} | {host} "
                f"| {sum(e.step_s.values()):.1f} | {e.ratio_to_full:.2f} |"
            )
    return out


if __name__ == "__main__":
    print("\n".join(rows()))
