"""`convert chatglm` refuses what it cannot convert with one line, and leaves nothing behind."""

import io
import json
import os
from functools import partial

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from slap_ds.models.glm.convert import KEPT, convert_chatglm
from tests import chatglm

FIRST = "model-00001-of-00002.safetensors"


@pytest.fixture
def src(tmp_path):
    weights = chatglm.original_weights(chatglm.CONFIG)
    model = chatglm.sentencepiece_model()
    return chatglm.write_checkpoint(tmp_path / "src", chatglm.CONFIG, weights, model)


@pytest.fixture
def src_bin(tmp_path):
    weights = chatglm.original_weights(chatglm.CONFIG)
    model = chatglm.sentencepiece_model()
    return chatglm.write_checkpoint(tmp_path / "src", chatglm.CONFIG, weights, model, "bin")


def refuses(src, *parts, error=ValueError, **options):
    dst = src.parent / "dst"
    with pytest.raises(error) as caught:
        convert_chatglm(src, dst, console=Console(file=io.StringIO()), **options)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text
    assert sorted(path.name for path in src.parent.iterdir()) == ["src"]


def change_config(src, **changes):
    config = {**json.loads((src / "config.json").read_text()), **changes}
    kept = {key: value for key, value in config.items() if value is not ...}
    (src / "config.json").write_text(json.dumps(kept))


def change_weights(src, change):
    found = load_file(src / FIRST)
    change(found)
    save_file(found, src / FIRST)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            # The published fields of ChatGLM-6B (v1).
            {"position_encoding_2d": True, "inner_hidden_size": 16384, "num_layers": 28},
            ["ChatGLM-6B (v1)", "use ChatGLM2-6B, ChatGLM3-6B or GLM-4-9B"],
        ),
        ({"model_type": "llama"}, ["'llama'", "expected 'chatglm'"]),
        ({"model_type": "glm"}, ["transformers' own layout already"]),
        ({"quantization_bit": 4}, ["quantised", "full-precision"]),
        ({"vision_config": {"width": 8}}, ["vision"]),
        ({"pre_seq_len": 128}, ["P-tuning"]),
        ({"add_bias_linear": True}, ["add_bias_linear = True", "expected False"]),
        ({"rmsnorm": False}, ["rmsnorm = False", "expected True"]),
        ({"ffn_hidden_size": ...}, ["lacks ffn_hidden_size"]),
        ({"seq_length": None, "kv_channels": ...}, ["lacks kv_channels, seq_length"]),
        ({"multi_query_group_num": 3}, ["4 heads", "3 groups"]),
        ({"hidden_size": 64}, ["has shape", "config.json says"]),
        ({"num_layers": 4}, ["lack 7 tensors", "layers.3"]),
        ({"num_layers": 2}, ["unknown in this layout", "layers.2"]),
    ],
)
def test_another_architecture(src, changes, parts):
    change_config(src, **changes)
    refuses(src, *parts)


def test_too_small_a_vocabulary(src):
    weights = chatglm.original_weights({**chatglm.CONFIG, "padded_vocab_size": 1000})
    save_file(weights, src / "model.safetensors")
    (src / "model.safetensors.index.json").unlink()
    change_config(src, padded_vocab_size=1000)
    refuses(src, "1209 tokens", "1000 embeddings")


def test_missing_files(src):
    (src / FIRST).rename(src / "elsewhere")
    refuses(src, "lacks 1 of the 2 weight files", FIRST, error=FileNotFoundError)
    (src / "model.safetensors.index.json").unlink()
    refuses(src, "has no weights", error=FileNotFoundError)
    (src / "config.json").unlink()
    refuses(src, "has no config.json", error=FileNotFoundError)


def test_missing_tokenizer(src):
    (src / "tokenizer.model").unlink()
    refuses(src, "no tokenizer.model", error=FileNotFoundError)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_safetensors(src, size):
    os.truncate(src / FIRST, size % (src / FIRST).stat().st_size)
    refuses(src, FIRST, "truncated", "download it again")


@pytest.mark.parametrize("size", [0, 5, 100, 20_000, -1])
def test_truncated_bin(src_bin, size):
    path = src_bin / "pytorch_model-00002-of-00002.bin"
    os.truncate(path, size % path.stat().st_size)
    refuses(src_bin, path.name, "truncated", "download it again")


def test_truncated_json_and_tokenizer(src):
    index = src / "model.safetensors.index.json"
    whole = index.read_bytes()
    index.write_bytes(whole[:300])
    refuses(src, index.name, "truncated")
    index.write_text("{}")
    refuses(src, index.name, "names no weight file")
    index.write_bytes(whole)
    for size in (0, 1, 3000, -2):
        (src / "tokenizer.model").write_bytes(chatglm.sentencepiece_model()[:size])
        refuses(src, "tokenizer.model")


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_does_not_run(src_bin, tmp_path_factory, zipped):
    mark = tmp_path_factory.mktemp("mark") / "ran"
    path = src_bin / "pytorch_model-00001-of-00002.bin"
    found = {**torch.load(path), "x": Runs(mark)}
    torch.save(found, path, _use_new_zipfile_serialization=zipped)
    refuses(src_bin, path.name, "could run code", "refused")
    assert not mark.exists()


def test_files_from_before_zip_archives(src_bin, tmp_path):
    path = src_bin / "pytorch_model-00001-of-00002.bin"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    convert_chatglm(src_bin, tmp_path / "dst", console=Console(file=io.StringIO()))
    assert (tmp_path / "dst" / "model.safetensors").is_file()


def test_tensors_that_do_not_belong(src):
    name = "transformer.encoder.layers.0.input_layernorm.weight"
    change_weights(src, lambda found: found.update(extra=torch.zeros(2)))
    refuses(src, "unknown in this layout", "extra")
    change_weights(src, lambda found: (found.pop("extra"), found.pop(name)))
    refuses(src, "lack 1 tensor (", name)
    change_weights(src, lambda found: found.update({name: torch.zeros(48, dtype=torch.int8)}))
    refuses(src, name, "I8", "floating-point")
    change_weights(src, lambda found: found.update({name: torch.zeros(48)}))
    late = "transformer.output_layer.weight"
    change_weights(src, lambda found: found.update({late: torch.zeros(1280, 48)}))
    refuses(src, late, "once more")


def test_tokens_added_to_the_tokenizer(src, tmp_path):
    count = 1200
    for ids, fits in (
        ({count + 3: "sop", count + 6: "<|user|>"}, True),
        ({1209: "<|mine|>"}, False),
    ):
        added = {str(key): {"content": name} for key, name in ids.items()}
        path = src / "tokenizer_config.json"
        path.write_text(json.dumps({"added_tokens_decoder": added}))
        if fits:
            convert_chatglm(src, tmp_path / "glm", console=Console(file=io.StringIO()))
            (tmp_path / "glm").rename(src / "done")
        else:
            refuses(src, "id 1209", "'<|mine|>'")


def test_wrong_options(src, tmp_path):
    refuses(src, "unknown dtype 'int8'", "float32, bfloat16, float16", dtype="int8")
    refuses(src, "family 'glm4' does not fit", "chatglm2 or chatglm3", family="glm4")
    refuses(src, "'chatglm'", "expected 'glm'", reverse=True)
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "mine").touch()
    with pytest.raises(ValueError, match="is in use: name a new folder"):
        convert_chatglm(src, tmp_path / "dst", console=Console(file=io.StringIO()))
    assert (tmp_path / "dst" / "mine").exists()


def test_back_with_the_files_of_another_model(src, tmp_path):
    convert = partial(convert_chatglm, console=Console(file=io.StringIO()))
    convert(src, tmp_path / "glm")
    change_config(tmp_path / "glm" / KEPT, num_layers=5)
    with pytest.raises(ValueError, match="describes another model"):
        convert(tmp_path / "glm", tmp_path / "back", reverse=True)
