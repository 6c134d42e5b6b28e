"""The loss of every training sample under a model, as a file: the reference of rho_loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from slap_ds.config.schema import Config
from slap_ds.distributed.comm import Comm
from slap_ds.files import write_text
from slap_ds.train.inputs import check_trained
from slap_ds.train.run import prepare
from slap_ds.train.score_pass import score_pass


def write_losses(config: Config, out: Path, comm: Comm) -> int | None:
    """Score the config's training data with its model; all ranks call this.

    A line a sample, `{"id": sample id, "loss": nats per response token}`, in the store's order.
    Ids are those of a training run with the same data, template and data.max_tokens.

    Returns: how many; None on all ranks but 0.

    Raises:
        ValueError: the config has no trained weights, losses are not finite, or what a run with
            this config raises.
    """
    check_trained(config, "losses")
    scratch = out.with_name(f".{out.name}.run")
    try:
        raw = config.model_dump(mode="json") | {"run_dir": str(scratch)}
        raw["selection"] = {"method": "full"}
        raw["checkpoint"] |= {"resume": "auto"}  # the scratch folder holds no run of the user's
        run = prepare(Config.model_validate(raw), comm)
        ids, losses = score_pass(run.engine, comm, run.inputs.train, config.score_row_tokens)
        broken = int((~np.isfinite(losses)).sum())
        if broken:
            raise ValueError(
                f"{broken} of {len(losses)} samples have a loss that is NaN or infinite under this "
                "model: its weights are broken, or model.dtype is too narrow for them"
            )
        if comm.rank == 0:
            pairs = zip(ids.tolist(), losses.tolist(), strict=True)
            rows = (json.dumps({"id": key, "loss": loss}) + "\n" for key, loss in pairs)
            write_text(out, "".join(rows))
        comm.barrier(-1, "the file of losses")
        return len(losses) if comm.rank == 0 else None
    finally:
        if comm.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
