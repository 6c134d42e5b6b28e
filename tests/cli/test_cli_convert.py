"""`slap-ds convert chatglm` from the command line, to training, export and back."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from slap_ds.cli import main
from slap_ds.data.templates import make_template
from slap_ds.models.glm.convert import KEPT
from slap_ds.models.load import load_tokenizer
from tests import chatglm
from tests.recipes import tiny_config
from tests.small_tokenizers import byte_tokenizer

GLM_TOKENS = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "chatglm3"
    weights = chatglm.original_weights(chatglm.CONFIG)
    chatglm.write_checkpoint(folder, chatglm.CONFIG, weights, chatglm.sentencepiece_model())
    return folder


def tensors(folder):
    return {k: v for path in folder.glob("model*.safetensors") for k, v in load_file(path).items()}


def test_convert_train_export_and_back(published, tmp_path, capsys):
    main(["convert", "chatglm", str(published), str(tmp_path / "glm"), "--dtype", "float32"])
    assert f"wrote {tmp_path / 'glm'}" in capsys.readouterr().err
    assert make_template("auto", load_tokenizer(str(tmp_path / "glm"))).name == "chatglm3"

    config = tiny_config(
        str(tmp_path / "glm"),
        tmp_path / "run",
        steps=2,
        engine={"kind": "torch"},
        model={"tokenizer": None},
        data={"max_tokens": 64},
        evaluation={"max_samples": 2},
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    main(["train", str(tmp_path / "run.yaml")])
    main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "tuned")])
    assert json.loads((tmp_path / "tuned" / "slap_ds.json").read_text())["template"] == "chatglm3"
    assert (tmp_path / "tuned" / KEPT / "tokenizer.model").is_file()

    main(["convert", "chatglm", str(tmp_path / "tuned"), str(tmp_path / "back"), "--reverse"])
    back, original = tensors(tmp_path / "back"), tensors(published)
    assert back.keys() == original.keys()
    moved = {name for name, value in back.items() if not torch.equal(value, original[name])}
    assert "transformer.embedding.word_embeddings.weight" in moved
    assert "transformer.rotary_pos_emb.inv_freq" not in moved
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == chatglm.sentencepiece_model()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--dtype", "int4"], "unknown dtype 'int4': expected float32"),
        (["--family", "glm4"], "family 'glm4' does not fit"),
        (["--reverse"], "--reverse takes a folder that `convert chatglm` wrote"),
    ],
)
def test_mistakes_are_one_line(published, tmp_path, capsys, arguments, told):
    with pytest.raises(SystemExit) as caught:
        main(["convert", "chatglm", str(published), str(tmp_path / "out"), *arguments])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("slap-ds: error") == 1
    assert not (tmp_path / "out").exists()


def test_auto_knows_glm_by_its_tokens():
    glm4 = byte_tokenizer(("<|endoftext|>", *GLM_TOKENS), eos_token="<|endoftext|>")
    assert make_template("auto", glm4).name == "glm4"
    # GLM-4.5 writes its thoughts first: not the prompts of GLM-4.
    thinks = byte_tokenizer(("<|endoftext|>", *GLM_TOKENS, "<think>"), eos_token="<|endoftext|>")
    with pytest.raises(ValueError, match="no chat template of its own"):
        make_template("auto", thinks)
