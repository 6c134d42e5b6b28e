"""TRL's SFTTrainer that trains 60 % of each candidate batch: `pip install 'slap_ds[trl]'`, then
`python examples/trl_sft.py MODEL TRAIN.jsonl`, or the same under accelerate launch."""

import sys

import torch
from datasets import load_dataset
from trl import SFTConfig

from slap_ds.hf_trainer import SlapSFTTrainer

batches = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
trainer = SlapSFTTrainer(
    sys.argv[1],
    SFTConfig("runs/trl", **batches, use_cpu=not torch.cuda.is_available()),
    train_dataset=load_dataset("json", data_files=sys.argv[2], split="train"),
    selection={"method": "slap", "keep": 0.6},
)
trainer.train()
