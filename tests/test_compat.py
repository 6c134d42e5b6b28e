"""Private names of libraries stand in slap_ds/compat.py alone, and are where it looks for them."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from slap_ds import compat
from slap_ds.config.deepspeed import DEFAULT_DEEPSPEED
from tests.ranks import run_ranks
from tests.recipes import tiny_config, tiny_model

pytestmark = pytest.mark.lane

PACKAGE = Path(compat.__file__).parent
# Python's own, documented in spite of the underscore.
DOCUMENTED = {"_replace", "_asdict", "_fields", "_exit"}


def private(name):
    return name.startswith("_") and not name.startswith("__")


def defined(tree):
    """Private names that a module gives to its own functions, classes and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) in ("self", "cls") else []


def touched(tree, own, all_own):
    """(line, name) of what a module touches of others without a promise."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            known = all_own if ast.unparse(node.value) in ("self", "cls") else own
            strange = private(node.attr) or node.attr in compat.NAMES
            if (strange and node.attr not in known | DOCUMENTED) or node.attr.startswith("ds_"):
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and not node.module.startswith("slap_ds"):
            for name in (*node.module.split("."), *(alias.name for alias in node.names)):
                if private(name) or (name in compat.NAMES and name != "checkpoint_engine"):
                    yield node.lineno, name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if any(map(private, alias.name.split("."))):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
        ):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if private(name) or name in compat.NAMES or name.startswith("ds_"):
                yield node.lineno, name


def found_in(sources):
    trees = {path: ast.parse(text) for path, text in sources.items()}
    own = {path: set(defined(tree)) for path, tree in trees.items()}
    all_own = set().union(*own.values())
    return [
        f"{path}:{line}: {name}"
        for path, tree in trees.items()
        for line, name in touched(tree, own[path], all_own)
    ]


def test_no_other_module_touches_a_private_name():
    sources = {
        path.relative_to(PACKAGE): path.read_text(encoding="utf-8")
        for path in PACKAGE.rglob("*.py")
        if path != Path(compat.__file__)
    }
    assert len(sources) > 100
    assert found_in(sources) == []


@pytest.mark.parametrize(
    "line",
    [
        "config._attn_implementation",
        "self.engine._copy_recovery_script = None",
        "getattr(config, '_attn_implementation', None)",
        "from torch._C import _functorch",
        "from torch.distributed import _functional_collectives",
        "import torch._dynamo",
        "weight.ds_tensor",
        "hasattr(weight, 'ds_id')",
        "lm._set_gradient_checkpointing(enable=True)",
        "optimizer.fp16_groups",
        "self._parameters",
    ],
)
def test_one_that_did_would_be_found(line):
    assert found_in({"planted.py": line})
    assert not found_in({"planted.py": "self._mine = 1\nself._mine\nrow._replace(loss=0)"})


def look(config):
    """What an engine of one rank under ZeRO-3 has of the names, and how it behaves."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    from slap_ds.models.blocks import find_blocks
    from slap_ds.train.run import prepare

    engine = prepare(config).engine
    inner, optimizer = engine.engine, engine.optimizer
    block = find_blocks(engine.model.lm)[0]
    weight = next(block.parameters())
    offload = getattr(optimizer, "parameter_offload", None)
    owners = (inner, optimizer, weight, offload, getattr(offload, "param_coordinator", None))
    found = {name: any(hasattr(owner, name) for owner in owners) for name in compat.NAMES}
    # Read by name while a checkpoint is written, not only there to be set.
    found["_copy_recovery_script"] &= "_copy_recovery_script" in inspect.getsource(
        type(inner)._save_zero_checkpoint
    )
    found["original_muon"] = "deepspeed.runtime.zero.muon.original_muon" in sys.modules
    found["ds_numel"] &= compat.whole_size(weight) > weight.numel()
    found["ds_tensor"] &= compat.part_size(weight) == compat.whole_size(weight)
    found["param_names"] &= compat.weight_names(inner)[weight].startswith("lm.model.layers.0.")
    groups = compat.partitioned_groups(optimizer)
    found["fp16_groups"] &= any(p is weight for weights, _ in groups for p in weights)
    sizes = [sum(compat.part_size(p) for p in weights) for weights, _ in groups]
    found["fp32_partitioned_groups_flat"] &= [flat.numel() for _, flat in groups] == sizes
    # A gathered weight stays while somebody needs it.
    weight.all_gather()
    with compat.stay_gathered(block):
        offload.param_coordinator.release_sub_module(block, forward=True)
        found["ds_active_sub_modules"] &= weight.ds_status == ZeroParamStatus.AVAILABLE
    offload.param_coordinator.release_sub_module(block, forward=True)
    found["ds_active_sub_modules"] &= weight.ds_status == ZeroParamStatus.NOT_AVAILABLE
    # A second order begins empty, is the one that counts while it is asked for, and not after.
    first, second = offload.get_param_coordinator(), compat.second_order(optimizer)
    with compat.gathered_along(optimizer, second):
        found["param_coordinator"] &= offload.get_param_coordinator() is second
    found["param_coordinator"] &= offload.get_param_coordinator() is first
    for coordinator in (first, second):
        orders = [v for k, v in vars(coordinator).items() if k.endswith("__submodule_order")]
        expected = len(orders) == 1 and (len(orders[0]) == 0) == (coordinator is second)
        found["_clear_trace_structures"] &= expected
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """{name: whether it is where it was} of every name."""
    import datasets
    from deepspeed import comm
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.sequence import layer
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        PreTrainedModel,
    )

    folder = tmp_path_factory.mktemp("seen")
    settings = json.loads(DEFAULT_DEEPSPEED.read_text())
    # Nothing stays gathered without a reason.
    for limit in ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters"):
        settings["zero_optimization"][f"stage3_{limit}"] = 0
    (folder / "ds.json").write_text(json.dumps(settings))
    config = tiny_config(
        tiny_model(folder / "model"),
        folder / "run",
        model={"gradient_checkpointing": True},
        engine={"deepspeed": str(folder / "ds.json")},
    )
    found = run_ranks(look, 1, config)[0]
    for name in ("_lazy_init_hp_params_optimizer_state", "update_lp_params"):
        found[name] = callable(getattr(DeepSpeedZeroOptimizer, name, None))
    found["_copy_recovery_script"] &= callable(DeepSpeedEngine._copy_recovery_script)
    found["comms_logger"] = hasattr(comm.comm, "comms_logger")
    found["comms_dict"] = isinstance(compat.collectives_log(comm), dict)
    for name in ("_dim_zero_all_to_all", "register_all_to_all_group"):
        found[name] = callable(getattr(layer, name, None))
    groups = dist.distributed_c10d
    found["_world"] = hasattr(getattr(groups, "_world", None), "pg_map")
    found["_set_pg_timeout"] = "timeout" in inspect.signature(groups._set_pg_timeout).parameters
    found["all_gather_single"] = hasattr(dist, "all_gather_single") or hasattr(
        dist, "all_gather_into_tensor"
    )
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    found["FileBaton"] = compat.build_locks_outlive_their_holder() == (version < (2, 14))
    attention = compat.varlen_attention()
    found["varlen_attn"] = attention is not None and {"scale", "window_size"} <= set(
        inspect.signature(attention).parameters
    )
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    lm = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))
    lm.set_attn_implementation("eager")
    found["_attn_implementation"] = compat.attention_of(lm.config) == "eager"
    found["all_tied_weights_keys"] = compat.tied_names(lm) == {"lm_head.weight"}
    found["activation_checkpointing_enable"] = any(
        hasattr(PreTrainedModel, f"{what}_checkpointing_enable")
        for what in ("activation", "gradient")
    )
    mixture = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2))
    found["_can_record_outputs"] = compat.routers_of(mixture) == [
        (mixture.model.layers[0].mlp.gate, 0)
    ]
    compat.checkpoint_by_transformers(lm)
    switched_on = any(getattr(m, "gradient_checkpointing", False) for m in lm.modules())
    compat.no_checkpointing_by_transformers(lm)
    left = any(getattr(m, "gradient_checkpointing", False) for m in lm.modules())
    found["activation_checkpointing_disable"] = switched_on and not left
    rows = [datasets.Dataset.from_dict({"text": [text]}) for text in ("a", "b", "a")]
    a, b, again = map(compat.fingerprint_of, rows)
    found["_fingerprint"] = a == again != b
    return found


@pytest.mark.parametrize("name", sorted(compat.NAMES))
def test_the_name_is_where_it_was(name, seen):
    known = compat.NAMES[name]
    assert seen[name], (
        f"{known.library} has moved or changed {name} ({known.reason}; seen in {known.seen}): "
        "find what does that now, and change slap_ds/compat.py"
    )


def test_process_groups_wait_as_told(tmp_path):
    assert run_ranks(wait_of_groups, 1) == [[7.0]]


def wait_of_groups():
    compat.limit_groups(7.0)
    device = torch.device("cpu")
    backends = [group._get_backend(device) for group in dist.distributed_c10d._world.pg_map]
    return sorted({backend.options._timeout.total_seconds() for backend in backends})


def test_an_engine_does_not_bring_in_the_compiler():
    code = (
        "import sys, deepspeed; from slap_ds import compat; compat.spare_compiling(deepspeed);"
        "from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam;"
        "sys.exit('torch._inductor.compile_fx' in sys.modules)"
    )
    root = PACKAGE.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=240).returncode == 0
