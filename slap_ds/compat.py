"""What this package touches of its libraries beside their documented interfaces: all of it.

A private name may move with any release, and some public ones have. `NAMES` says of each what it is
for and in which versions it was seen; the functions below are the only ones that use them. Another
module that names one fails tests/test_compat.py, and so does a release in which one has moved.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn


class Name(NamedTuple):
    """A name of a library that its documentation does not promise."""

    library: str
    seen: str  # versions
    reason: str


NAMES: dict[str, Name] = {
    "_world": Name("torch", "2.13", "lists every process group, those that DeepSpeed makes too"),
    "_set_pg_timeout": Name("torch", "2.13", "shortens how long a group that exists waits"),
    "all_gather_single": Name(
        "torch", "2.13", "what all_gather_into_tensor is called since it warns"
    ),
    "FileBaton": Name(
        "torch", "2.13", "a lock on builds that stays when its holder is killed; gone in 2.14"
    ),
    "_version": Name("torch", "2.13", "how often a tensor was changed in place"),
    "varlen_attn": Name("torch", "2.13", "flash attention over packed samples, of a prototype API"),
    "_attn_implementation": Name(
        "transformers", "5.17, 5.23, 5.24", "which attention a model was built with, once chosen"
    ),
    "activation_checkpointing_enable": Name(
        "transformers", "5.23, 5.24", "what gradient_checkpointing_enable is called since it warns"
    ),
    "activation_checkpointing_disable": Name(
        "transformers", "5.24", "what gradient_checkpointing_disable is called since it warns"
    ),
    "all_tied_weights_keys": Name(
        "transformers",
        "5.17, 5.23, 5.24",
        "weights that files leave out as others' twins",
    ),
    "_can_record_outputs": Name(
        "transformers",
        "5.17, 5.23, 5.24",
        "which modules of a model are its routers, and where in their output the logits are",
    ),
    "_fingerprint": Name("datasets", "5.2", "what a data set holds, and which part of it"),
    "_copy_recovery_script": Name(
        "deepspeed", "0.19.8", "puts a script that unpickles without limits into every checkpoint"
    ),
    "checkpoint_engine": Name("deepspeed", "0.19.8", "writes and reads a checkpoint's files"),
    "global_steps": Name("deepspeed", "0.19.8", "counts steps, as checkpoints name it"),
    "param_names": Name("deepspeed", "0.19.8", "a weight's name, also where it is partitioned"),
    "ds_numel": Name("deepspeed", "0.19.8", "the whole size of a partitioned weight"),
    "ds_tensor": Name("deepspeed", "0.19.8", "this rank's part of a partitioned weight"),
    "ds_active_sub_modules": Name(
        "deepspeed", "0.19.8", "who still needs a gathered weight: it stays until nobody does"
    ),
    "parameter_offload": Name("deepspeed", "0.19.8", "holds the ZeRO-3 hooks' coordinator"),
    "param_coordinator": Name("deepspeed", "0.19.8", "gathers along the recorded order of modules"),
    "_clear_trace_structures": Name("deepspeed", "0.19.8", "forgets that order"),
    "_lazy_init_hp_params_optimizer_state": Name(
        "deepspeed", "0.19.8", "ties ZeRO-1 and -2 weights to moments that were just made"
    ),
    "update_lp_params": Name("deepspeed", "0.19.8", "copies float32 weights into those that run"),
    "fp16_groups": Name("deepspeed", "0.19.8", "the weights of each ZeRO-3 group, in order"),
    "fp32_partitioned_groups_flat": Name(
        "deepspeed", "0.19.8", "this rank's float32 part of each ZeRO-3 group"
    ),
    "checkpoint_event_prologue": Name("deepspeed", "0.19.8", "readies ZeRO-3 for another state"),
    "checkpoint_event_epilogue": Name("deepspeed", "0.19.8", "takes it up again"),
    "_dim_zero_all_to_all": Name(
        "deepspeed", "0.19.8", "exchanges tokens for heads, backwards too (Ulysses)"
    ),
    "register_all_to_all_group": Name("deepspeed", "0.19.8", "lets it find its process group"),
    "original_muon": Name(
        "deepspeed", "0.19.8", "an optimizer that is imported beside every other, and compiled then"
    ),
    "comms_logger": Name("deepspeed", "0.19.8", "counts DeepSpeed's own collectives"),
    "comms_dict": Name("deepspeed", "0.19.8", "where it keeps {operation: {bytes: [calls, ...]}}"),
}


# torch


def limit_groups(seconds: float) -> None:
    """Let no process group that this rank belongs to wait longer than that."""
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=seconds)
    for group in list(dist.distributed_c10d._world.pg_map):
        if dist.get_rank(group) >= 0:
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def all_gather_flat(output: Tensor, mine: Tensor) -> None:
    """Every rank's `mine` one after the other into the flat `output`."""
    import torch.distributed as dist

    # torch 2.13 renamed it and warns about the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, mine)


def version_of(tensor: Tensor) -> int:
    """How often its values were changed in place."""
    return tensor._version


def build_locks_outlive_their_holder() -> bool:
    """Whether torch takes the mere existence of a file for a lock on a build: before torch 2.14."""
    from torch.utils import cpp_extension

    return hasattr(cpp_extension, "FileBaton")


def varlen_attention() -> Callable[..., Tensor] | None:
    """torch's attention over packed samples; None before torch 2.10."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    return varlen.varlen_attn  # type: ignore[return-value]


# transformers


def attention_of(config: Any) -> str | None:
    """The attention that a model of this config was built with, by its registered name."""
    return getattr(config, "_attn_implementation", None)


def checkpoint_by_transformers(lm: Any) -> None:
    """Switch on transformers' own activation checkpointing, non-reentrant."""
    # 5.2x renamed it and warns about the old name.
    enable = getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def no_checkpointing_by_transformers(lm: Any) -> None:
    """Switch off transformers' own activation checkpointing."""
    disable = getattr(lm, "activation_checkpointing_disable", lm.gradient_checkpointing_disable)
    disable()


def routers_of(lm: Any) -> list[tuple[nn.Module, int]]:
    """The routers of a mixture of experts in order, and where in their output the logits are."""
    known = getattr(lm, "_can_record_outputs", None) or {}
    recorder = known.get("router_logits")
    if recorder is None:
        return []
    kind, index = recorder.target_class, recorder.index
    return [(module, index) for module in lm.modules() if isinstance(module, kind)]


def tied_names(model: Any) -> set[str]:
    """Names of weights that are the same tensors as others."""
    return set(getattr(model, "all_tied_weights_keys", {}))


# datasets


def fingerprint_of(dataset: Any) -> str:
    """Of the rows that a `datasets.Dataset` holds."""
    return str(dataset._fingerprint)


# deepspeed


def spare_compiling(deepspeed: Any) -> None:
    """Import the package's Muon optimizer, as it does itself beside every other, uncompiled.

    A decorator in it brings in torch's compiler: 1.5 s of every start, for nothing that is used
    here. Muon itself works without.
    """
    compiler = deepspeed.runtime.compiler
    given = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = given


def without_recovery_script(engine: Any) -> None:
    """Let checkpoints of a DeepSpeed engine hold no script."""
    engine._copy_recovery_script = lambda save_path: None


def keep_files_with(engine: Any, files: Any) -> None:
    """Let a DeepSpeed engine write and read its checkpoints through `files`."""
    engine.checkpoint_engine = files


def set_step(engine: Any, step: int) -> None:
    """Let a DeepSpeed engine count on from `step`."""
    engine.global_steps = step


def weight_names(engine: Any) -> dict[nn.Parameter, str]:
    """The name of each weight of a DeepSpeed engine's module."""
    return dict(engine.param_names)


def whole_size(weight: Tensor) -> int:
    """Values of a weight, of all its parts if ZeRO-3 has partitioned it."""
    return int(getattr(weight, "ds_numel", weight.numel()))


def part_size(weight: Any) -> int:
    """Values of each rank's part of a weight under ZeRO-3, the last one's filled up."""
    return int(weight.ds_tensor.ds_numel)


def is_deepspeed_name(attribute: str) -> bool:
    """Whether DeepSpeed has put an attribute of that name onto a module."""
    return attribute.startswith(("ds_", "_ds"))


@contextlib.contextmanager
def stay_gathered(block: nn.Module) -> Iterator[None]:
    """ZeRO-3 does not release the weights of `block` meanwhile, whatever its hooks say."""
    weights: list[Any] = list(block.parameters())
    for weight in weights:
        weight.ds_active_sub_modules.add(block)
    try:
        yield
    finally:
        for weight in weights:
            weight.ds_active_sub_modules.discard(block)


def second_order(optimizer: Any) -> Any:
    """What gathers for a ZeRO-3 optimizer, once more, without an order of modules recorded yet."""
    other = copy.copy(optimizer.parameter_offload.param_coordinator)
    other._clear_trace_structures()
    return other


@contextlib.contextmanager
def gathered_along(optimizer: Any, order: Any) -> Iterator[None]:
    """The ZeRO-3 hooks gather along an order from `second_order` meanwhile."""
    offload = optimizer.parameter_offload
    ordinary, offload.param_coordinator = offload.param_coordinator, order
    try:
        yield
    finally:
        offload.param_coordinator = ordinary


def all_to_all(layer: Any, group: Any) -> Callable[[Tensor], Tensor]:
    """`deepspeed.sequence.layer`'s exchange in a group of n ranks: entry j of a tensor (n, ...)
    goes to rank j, entry j of the result comes from there; gradients go the same ways back."""
    layer.register_all_to_all_group(group)
    return functools.partial(layer._dim_zero_all_to_all, group)


def attach_moments(optimizer: Any) -> None:
    """Let a ZeRO-1 or -2 optimizer see moments that were put into it by hand."""
    optimizer._lazy_init_hp_params_optimizer_state()


def copy_to_weights(optimizer: Any) -> None:
    """Carry the float32 weights of a ZeRO-1 or -2 optimizer over into those that run."""
    optimizer.update_lp_params()


def partitioned_groups(optimizer: Any) -> list[tuple[list[nn.Parameter], Tensor]]:
    """(weights, this rank's float32 part of them in their order, flat) of each ZeRO-3 group."""
    flats = optimizer.fp32_partitioned_groups_flat
    return list(zip(optimizer.fp16_groups, flats, strict=True))


@contextlib.contextmanager
def another_state(optimizer: Any) -> Iterator[None]:
    """Inside, a ZeRO-3 optimizer may be given another state."""
    optimizer.checkpoint_event_prologue()
    yield
    optimizer.checkpoint_event_epilogue()


def collectives_log(comm: Any) -> dict[str, dict[int, list[Any]]]:
    """{operation: {bytes: [calls, ...]}} of `deepspeed.comm`'s logger, as it goes on counting."""
    log: dict[str, dict[int, list[Any]]] = comm.comm.comms_logger.comms_dict
    return log
