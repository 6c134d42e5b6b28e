"""What cannot go together with selection in a Trainer: each is one line, before anything trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from slap_ds.config.schema import StepConfig
from slap_ds.selection import SELECTORS, Selector

# Sample ids of the whole data set are needed before the first step, which a Trainer has not.
_OF_WHOLE_DATA = ("infobatch", "rho_loss")


def check_trainer(trainer: Any, method: str, selector: Selector, step: StepConfig) -> None:
    """Refuse settings that would be ignored, or that packed rows have no place for.

    Raises:
        ValueError: naming all of them, one a line.
    """
    found = [*_of_arguments(trainer.args), *_of_trainer(trainer), *_of_method(method, selector)]
    if step.forward == "reuse" and not checkpoints(trainer.args):
        found.append("step.forward reuse needs gradient_checkpointing=True")
    if step.balance == "deal":
        found.append("step.balance deal moves picks to other ranks, here they stay: quota or none")
    if found:
        raise ValueError("selection in a Trainer: " + "\n".join(found))


def checkpoints(args: Any) -> bool:
    """Whether blocks are recomputed in the backward; transformers 5.2x renamed the argument."""
    return bool(getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing)


def _of_arguments(args: Any) -> Iterator[str]:
    if args.label_smoothing_factor:
        yield "label_smoothing_factor is not in the loss of packed rows: set it to 0"
    if args.neftune_noise_alpha:
        yield "neftune_noise_alpha adds noise to what is scored: set it to None"
    if args.fp16:
        yield "fp16=True scales losses: use bf16=True, or a model in float32"
    if args.torch_compile:
        yield "torch_compile=True would compile anew for every length of a packed row: set it False"
    if getattr(args, "loss_type", None) == "dft":
        yield "loss_type 'dft' weighs tokens by their probability: set loss_type to 'nll'"
    if getattr(args, "activation_offloading", False):
        yield "activation_offloading: use step={'boundaries': 'host'} with forward reuse instead"
    if args.n_gpu > 1:
        yield (
            f"{args.n_gpu} GPUs in one process (DataParallel): start one process a GPU, by "
            "torchrun or accelerate launch"
        )


def _of_trainer(trainer: Any) -> Iterator[str]:
    if trainer.model_init is not None:
        yield "model_init makes another model at train(): give the model itself"
    if trainer.compute_loss_func is not None:
        yield "compute_loss_func is not the loss of packed rows: leave it out"
    if getattr(trainer, "is_fsdp_enabled", False):
        yield "FSDP is not supported: use DeepSpeed ZeRO-3, or DistributedDataParallel"
    plan = getattr(trainer.accelerator, "parallelism_config", None)
    sizes = {name: getattr(plan, f"{name}_size", 1) for name in ("tp", "cp", "sp")}
    if split := [name for name, size in sizes.items() if size > 1]:
        yield f"ranks that share a sample are not supported: set {', '.join(split)}_size to 1"
    config = trainer.model.config
    if getattr(config, "output_router_logits", False):
        yield "output_router_logits adds a loss of its own (mixture of experts): set it to False"


def _of_method(method: str, selector: Selector) -> Iterator[str]:
    if method in _OF_WHOLE_DATA or (method in SELECTORS and "validation" in selector.needs):
        yield (
            f"selection.method {method} needs the whole data set before the first step: use "
            "slap-ds train, or another method"
        )
