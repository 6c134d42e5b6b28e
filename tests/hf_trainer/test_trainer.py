"""The mixin: LoRA, autocast, resume, logs, and what it refuses."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from slap_ds.hf_trainer import SlapTrainer, SlapTrainerMixin
from tests.hf_trainer.recipes import (
    STEPS,
    apart,
    arguments,
    packed,
    padded,
    plain_trainer,
    run_file,
    samples,
    slap_trainer,
    weights_of,
)
from tests.recipes import tiny_model

HALF = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["llama", "glm"])
def either(request, tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp(request.param), request.param)


def test_adapters_of_peft_train_the_same_with_reuse_and_without(either, tmp_path):
    """And at keep 1 as the plain Trainer trains them; what is frozen stays."""
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    config = run_file(either, tmp_path / "run", selection={"method": "slap", "keep": 0.6})

    def run(**named):
        trainer = slap_trainer(config, tmp_path / "hf", lora=lora, **HALF, **named)
        before = {name: p.clone() for name, p in weights_of(trainer.model).items()}
        trainer.train()
        after = weights_of(trainer.model)
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved == {name for name in after if "lora_" in name}
        return after, [chosen.selection.picks.tolist() for chosen in trainer.history], trainer

    separate, picks, plain = run()
    reused, same, trainer = run(gradient_checkpointing=True)
    assert trainer._slap_engine.can_reuse
    assert not plain._slap_engine.can_reuse
    assert picks == same
    assert apart(reused, separate) <= 1e-5

    full = run_file(either, tmp_path / "full", selection={"method": "full"})
    ours = slap_trainer(full, tmp_path / "ours", lora=lora, **HALF)
    theirs = plain_trainer(full, tmp_path / "plain", lora=lora, **HALF)
    for one in (ours, theirs):
        one.train()
    assert apart(weights_of(ours.model), weights_of(theirs.model)) <= 1e-5


def test_under_autocast_forward_and_recompute_round_alike(path, tmp_path):
    """bf16=True with float32 weights, as TRL has it by default."""
    config = run_file(path, tmp_path / "run", selection={"method": "slap", "keep": 0.6})

    def run(**named):
        # Plain steps along the gradient: AdamW's first ones are its sign, which rounding may turn.
        sgd = {"optim": "sgd", "learning_rate": 0.1}
        trainer = slap_trainer(config, tmp_path / "hf", **HALF, **sgd, **named)
        before = {name: p.clone() for name, p in weights_of(trainer.model).items()}
        dtypes = set()
        layer = trainer.model.model.layers[1].self_attn.q_proj
        layer.register_forward_hook(lambda module, given, out: dtypes.add(out.dtype))
        trainer.train()
        after = weights_of(trainer.model)
        return after, apart(after, before), dtypes, trainer._slap_engine.can_reuse

    exact, moved, _, _ = run()
    separate, _, kinds, _ = run(bf16=True)
    reused, _, same, reuses = run(bf16=True, gradient_checkpointing=True)
    assert reuses
    assert kinds == same == {torch.bfloat16}
    for one, other in ((separate, exact), (reused, exact), (reused, separate)):
        assert 0 < apart(one, other) < 0.05 * moved


@pytest.mark.parametrize("method", ["slap", "uds"])
def test_stop_and_resume_equals_no_stop(path, tmp_path, method):
    """Curvature and what the method remembers lie in the Trainer's checkpoints."""
    config = run_file(path, tmp_path / "run", selection={"method": method, "keep": 0.6})
    saves = {"save_strategy": "steps", "save_steps": 2}
    whole = slap_trainer(config, tmp_path / "hf", **saves)
    whole.train()
    again = slap_trainer(config, tmp_path / "hf", **saves)
    again.train(resume_from_checkpoint=str(tmp_path / "hf" / "checkpoint-2"))
    assert len(again.history) == STEPS - 2
    for one, other in zip(again.history, whole.history[2:], strict=True):
        assert one.selection.picks.tolist() == other.selection.picks.tolist()
        assert one.selection.weights.tolist() == other.selection.weights.tolist()
    assert apart(weights_of(again.model), weights_of(whole.model)) == 0.0
    if method == "slap":
        state, wanted = (t._chooser.scorer.curvature.state_dict() for t in (again, whole))
        assert state["updates"] == wanted["updates"] == STEPS
        assert torch.equal(state["average"], wanted["average"])


def test_logs_say_what_was_chosen_and_evaluation_is_the_trainers(path, tmp_path):
    config = run_file(path, tmp_path / "run", selection={"method": "hard", "keep": 0.5})
    trainer = slap_trainer(config, tmp_path / "hf", logging_steps=2)
    data = samples(config)[:8]
    plain = plain_trainer(config, tmp_path / "plain")
    plain.model = trainer.model
    trainer.train()
    logs = [record for record in trainer.state.log_history if "loss" in record]
    assert [(r["candidates"], r["picked"]) for r in logs] == [(16, 8), (16, 8)]
    assert all(r["loss"] > r["candidate_loss"] for r in logs)
    ours = trainer.evaluate(data)["eval_loss"]
    theirs = Trainer(trainer.model, plain.args, data_collator=padded).evaluate(data)["eval_loss"]
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_the_model_can_be_copied_and_saved_afterwards(path, tmp_path):
    config = run_file(path, tmp_path / "run", selection={"method": "slap", "keep": 0.5})
    trainer = slap_trainer(config, tmp_path / "hf", gradient_checkpointing=True)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert apart(weights_of(again), weights_of(trainer.model)) == 0.0
    twin = copy.deepcopy(trainer.model.lm_head)
    with torch.no_grad():
        twin.weight.zero_()
        assert float(twin(torch.ones(1, 32)).abs().max()) == 0.0
    trainer.train()  # once more, from where it is


def test_any_trainer_that_derives_from_transformers(path, tmp_path):
    class Own(Trainer):
        def create_optimizer(self, *args, **named):
            self.asked = True
            return super().create_optimizer(*args, **named)

    class Both(SlapTrainerMixin, Own):
        pass

    config = run_file(path, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(path)
    trainer = Both(
        model,
        arguments(config, tmp_path / "hf"),
        train_dataset=samples(config),
        data_collator=packed,
        selection={"method": "random", "keep": 0.5},
    )
    trainer.train()
    assert trainer.asked
    assert len(trainer.chosen.selection.picks) == 8


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from ()


WRONG = [
    ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor is not in the loss"),
    ({"neftune_noise_alpha": 5}, {}, "neftune_noise_alpha adds noise"),
    ({"max_steps": -1}, {"train_dataset": Endless()}, "train_dataset does not implement __len__"),
    ({}, {"compute_loss_func": lambda *_: 0}, "compute_loss_func is not the loss"),
    ({}, {"selection": {"method": "greats"}}, "selection.validation"),
    ({}, {"selection": {"method": "infobatch"}}, "infobatch needs the whole data set"),
    ({}, {"step": {"forward": "reuse"}}, "reuse needs gradient_checkpointing=True"),
    ({}, {"step": {"balance": "deal"}}, "deal moves picks to other ranks"),
]


@pytest.mark.parametrize(("changed", "given", "words"), WRONG, ids=[w for _, _, w in WRONG])
def test_wrong_combinations_are_one_line(path, tmp_path, changed, given, words):
    config = run_file(path, tmp_path / "run")
    named = {"train_dataset": samples(config), "data_collator": padded, **given}
    model = AutoModelForCausalLM.from_pretrained(path)
    args = arguments(config, tmp_path / "hf", **changed)
    with pytest.raises(ValueError, match=words) as error:
        SlapTrainer(model, args, **named).train()
    assert "\n" not in str(error.value)


def test_dropout_with_reuse_and_models_without_blocks_are_one_line(path, tmp_path):
    config = run_file(path, tmp_path / "run", selection={"method": "slap"})
    lora = {"r": 4, "target_modules": ["q_proj"], "lora_dropout": 0.1}
    checkpointing = {"gradient_checkpointing": True}

    def trainer(forward, **named):
        made = slap_trainer(config, tmp_path / "hf", **checkpointing, **named)
        made.slap = made.slap.__class__(**{**vars(made.slap), "step": forward})
        return made

    reuse = config.step.model_copy(update={"forward": "reuse"})
    with pytest.raises(ValueError, match=r"without dropout, found .*0\.1") as error:
        trainer(reuse, lora=lora).train()
    assert "\n" not in str(error.value)
    found = trainer(config.step, lora=lora)
    found.train()
    assert not found._slap_engine.can_reuse

    odd = trainer(reuse)
    odd.model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="0 lists of 3 blocks, expected one") as error:
        odd.train()
    assert "\n" not in str(error.value)


def test_batches_that_cannot_be_packed_are_one_line(path, tmp_path):
    config = run_file(path, tmp_path / "run")

    def typed(rows):
        batch = padded(rows)
        return {**batch, "token_type_ids": torch.zeros_like(batch["labels"])}

    with pytest.raises(ValueError, match="the batch holds token_type_ids") as error:
        slap_trainer(config, tmp_path / "hf", typed).train()
    assert "\n" not in str(error.value)
