"""Models that cannot be loaded, or should not be trained: told in one line, by what to change."""

import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from slap_ds.models.load import load_config, load_model
from slap_ds.train.run import prepare
from tests.ranks import run_ranks
from tests.recipes import tiny_config, tiny_model

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
BARE = {name: size for name, size in SMALL.items() if name != "intermediate_size"}
# Of another shape, or to be told something more.
ODD = {
    "xlnet": {"vocab_size": 50, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
    "xmod": {**SMALL, "languages": ["en_XX"], "default_language": "en_XX"},
    "xlm": BARE,
    "gpt_neox_japanese": BARE,
    "cpmant": {**BARE, "dim_head": 8, "prompt_length": 4},
    "gemma": {**SMALL, "num_key_value_heads": 2, "head_dim": 8},
    "trocr": {
        "vocab_size": 50,
        "d_model": 16,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 24,
    },
}


def error(work, *arguments, **named):
    with pytest.raises(ValueError, match=r".") as caught:
        work(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"hiden_size": 63}, "model.config.hiden_size: llama has no such field; did you mean 'hid"),
        ({"zzz": 1, "yyy": 2}, "model.config.yyy: llama has no such field; leave it out"),
        ({"model_type": "gpt2", "intermediate_size": 64}, "gpt2 has no such field"),
        ({"model_type": "lama"}, "no model_type 'lama'; did you mean 'llama'?"),
        ({"model_type": ["llama"]}, "no model_type ['llama']"),
        ({"model_type": "bert", "num_key_value_heads": 2}, "bert lets tokens see"),
        ({"model_type": "t5"}, "no causal language model of model_type t5"),
        ({"hidden_size": 63}, "size (63) is not a multiple of the number of attention heads (32)"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ({"model_type": "falcon", "head_dim": 4}, "falcon does not accept these values"),
        (
            {"model_type": "gemma3", "text_config": {"hiden_size": 64}},
            "model.config.text_config.hiden_size: gemma3_text has no such field",
        ),
    ],
)
def test_a_config_that_is_not_what_was_meant(fields, told):
    assert told in error(load_config, None, {"model_type": "llama", **fields})


@pytest.mark.parametrize(
    "fields",
    [
        # Older names, names of other architectures, fields that few config classes declare.
        {"model_type": "llama", "rope_theta": 1e4, "torch_dtype": "bfloat16"},
        {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"model_type": "qwen2", "head_dim": 8},
        {"model_type": "glm", "partial_rotary_factor": 0.5},
        {"model_type": "gemma2", "attn_logit_softcapping": 20.0},
        {"model_type": "gemma3_text", "sliding_window_pattern": 3},
        {"model_type": "gpt2", "hidden_size": 64, "num_hidden_layers": 2},
        {"model_type": "gpt_neox", "rotary_pct": 0.5},
        {"model_type": "bloom", "n_embed": 64, "n_head": 2, "max_position_embeddings": 512},
    ],
)
def test_fields_that_are_taken_up_are_no_mistakes(fields):
    load_config(None, fields)


def test_a_value_that_only_the_model_looks_at():
    config = load_config(None, {"model_type": "llama", **SMALL, "hidden_act": "nope"})
    told = error(load_model, None, config, dtype="float32", attention="sdpa", seed=0)
    assert told == "model.config: llama cannot be built with these values: KeyError: 'nope'"


def sees_ahead(kind, **more):
    """Whether the model's logits change with a token that comes later."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **ODD.get(kind, SMALL), **more)
    config.use_cache = False
    lm = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(3, 19)[None]
    other = ids.clone()
    other[0, -1] = 40
    with torch.no_grad():
        return not torch.equal(lm(input_ids=ids).logits[:, :-1], lm(input_ids=other).logits[:, :-1])


@pytest.mark.parametrize(
    ("kind", "causal"),
    [
        *[
            (kind, {"is_decoder": True})
            for kind in ("bert", "roberta", "electra", "camembert", "rembert", "xmod")
        ],
        ("xlm", {"causal": True}),
        ("xlnet", {"attn_type": "uni"}),
        ("gemma", {"use_bidirectional_attention": None}),
        ("cpmant", None),
    ],
)
def test_an_encoder_is_refused_unless_it_is_made_causal(kind, causal):
    ahead = {"use_bidirectional_attention": True} if kind == "gemma" else {}
    assert sees_ahead(kind, **ahead)
    told = error(load_config, None, {"model_type": kind, **ODD.get(kind, SMALL), **ahead})
    assert f"{kind} lets tokens see those after them" in told
    if causal is not None:
        ((name, value),) = causal.items()
        assert f"set {name}: {'null' if value is None else str(value).lower()} in" in told
        assert not sees_ahead(kind, **causal)
        load_config(None, {"model_type": kind, **ODD.get(kind, SMALL), **causal})


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt_neox_japanese", "trocr"])
def test_is_decoder_false_means_nothing_where_it_is_not_read(kind):
    config = load_config(None, {"model_type": kind, **ODD.get(kind, SMALL)})
    assert config.is_decoder is False
    assert not sees_ahead(kind)


def test_a_saved_encoder_is_refused_and_an_old_llama_is_not(tmp_path):
    AutoConfig.for_model("bert", **SMALL).save_pretrained(tmp_path / "bert")
    assert "bert lets tokens see" in error(load_config, str(tmp_path / "bert"), None)
    old = AutoConfig.for_model("llama", **SMALL, is_decoder=False)
    old.save_pretrained(tmp_path / "llama")
    assert load_config(str(tmp_path / "llama"), None).is_decoder is False


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_weights_cut_off(size, tmp_path):
    folder = tiny_model(tmp_path / "whole")
    shutil.copytree(folder, tmp_path / "cut")
    with (tmp_path / "cut" / "model.safetensors").open("r+b") as file:
        file.truncate(size)
    cut = str(tmp_path / "cut")
    config = load_config(cut, None)
    told = error(load_model, cut, config, dtype="float32", attention="sdpa", seed=0)
    assert told.startswith(f"model.path: a safetensors file at {cut!r} is cut off or damaged")


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash_attn is there")
@pytest.mark.parametrize("stage3", [pytest.param(False, marks=pytest.mark.slow), True])
def test_weights_that_are_missing_or_of_another_model(stage3, tmp_path):
    """Fresh random ones in their place would be trained without a word."""
    whole = tiny_model(tmp_path / "whole", tie_word_embeddings=True)
    wide = tiny_model(tmp_path / "wide", hidden_size=64)
    weights = load_file(f"{whole}/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    shutil.copytree(whole, tmp_path / "holes")
    save_file(weights, tmp_path / "holes/model.safetensors", {"format": "pt"})
    shutil.copytree(whole, tmp_path / "mixed")
    shutil.copy(f"{wide}/model.safetensors", tmp_path / "mixed")
    kind = "deepspeed" if stage3 else "torch"
    told = {}
    for name in ("whole", "holes", "mixed"):
        made = tiny_config(
            str(tmp_path / name), tmp_path / f"run-{name}", engine={"kind": kind}, steps=1
        )
        (told[name],) = run_ranks(refusal, 1, made)
    assert told["whole"] == ""
    assert "lack model.layers.1.mlp.up_proj.weight: copy" in told["holes"]
    assert "have other shapes than its config.json says" in told["mixed"]


def refusal(config):
    try:
        prepare(config)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("attention", "told"),
    [
        ("flash_attention_2", "model.attention 'flash_attention_2' needs a package that cannot"),
        ("flash_attention_3", "model.attention 'flash_attention_3' needs a package that cannot"),
        ("flash_attention_4", "model.attention 'flash_attention_4' needs a package that cannot"),
        ("nope", "model.attention is 'nope', which llama does not have"),
    ],
)
def test_an_attention_that_is_not_there(attention, told):
    config = load_config(None, {"model_type": "llama", **SMALL})
    text = error(load_model, None, config, dtype="float32", attention=attention, seed=0)
    assert told in text
    assert "try packed, sdpa or eager" in text
