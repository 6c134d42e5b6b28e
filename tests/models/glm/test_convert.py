"""`convert chatglm`: the same logits and text as the published architecture, and the way back."""

import io
import json

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from slap_ds.models.glm.convert import KEPT, convert_chatglm
from slap_ds.models.glm.layout import glm_config, layout, read_sizes
from slap_ds.models.glm.tokenizer import build_tokenizer
from tests import chatglm

VARIANTS = {
    "chatglm3": {},
    "fused_mha": {"multi_query_attention": False},
    "fused_mha_no_bias": {"multi_query_attention": False, "add_qkv_bias": False},
    "no_bias": {"add_qkv_bias": False},
    "rope_ratio": {"rope_ratio": 50},
    "chatglm2": {"_name_or_path": "THUDM/chatglm2-6b"},
    "chatglm2_32k": {"_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 4},
    "glm4": {
        "_name_or_path": "THUDM/glm-4-9b-chat",
        "rope_ratio": 500,
        "layernorm_epsilon": 1.5625e-07,
        "torch_dtype": "bfloat16",
        "eos_token_id": [1114, 1121, 1123],
        "pad_token_id": 1114,
    },
}
PROMPT = "你好 people"


def quiet():
    return Console(file=io.StringIO())


def published(folder, name="chatglm3", dtype=torch.float32, kind="safetensors", files=2):
    """A tiny checkpoint folder of that variant, its config and its weights."""
    config = {**chatglm.CONFIG, **VARIANTS[name]}
    weights = chatglm.original_weights(config, dtype)
    ranks = name.startswith("glm4")
    model = chatglm.tiktoken_ranks() if ranks else chatglm.sentencepiece_model()
    chatglm.write_checkpoint(folder, config, weights, model, kind, files)
    return config, weights


def tokenizer_family(name):
    return next((family for family in ("chatglm2", "glm4") if family in name), "chatglm3")


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def assert_same_bytes(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        raw = [t.contiguous().view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*raw), name


@pytest.mark.parametrize("name", VARIANTS)
def test_same_logits_and_greedy_text_and_back(tmp_path, name):
    kind = "bin" if name in ("fused_mha", "glm4") else "safetensors"
    config, weights = published(tmp_path / "src", name, kind=kind, files=3)
    convert_chatglm(tmp_path / "src", tmp_path / "glm", console=quiet())

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "glm").eval()
    assert type(model).__name__ == "GlmForCausalLM"
    assert model.dtype == torch.float32
    torch.manual_seed(1)
    ids = torch.randint(0, config["padded_vocab_size"], (40,))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    expected = chatglm.forward(config, weights, ids)
    assert expected.std() > 0.5
    assert (logits - expected).abs().max() <= 1e-5

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "glm")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False
    )
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    built = build_tokenizer(tmp_path / "src", tokenizer_family(name))
    for text in (PROMPT, "sophisticated <|user|>\n 你好 </s>"):
        assert tokenizer.encode(text) == built.encode(text)
        assert tokenizer.encode(text, split_special_tokens=True) == built.encode(
            text, split_special_tokens=True
        )
    assert model.generation_config.eos_token_id[0] == tokenizer.eos_token_id
    by_hand = chatglm.greedy(config, weights, prompt, 12)
    assert out[0].tolist() == by_hand
    assert tokenizer.decode(out[0]) == tokenizer.decode(by_hand)

    convert_chatglm(tmp_path / "glm", tmp_path / "back", reverse=True, console=quiet())
    assert_same_bytes(tensors(tmp_path / "back"), weights)
    for path in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "back" / path).read_bytes() == (tmp_path / "src" / path).read_bytes()
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back == {**config, "torch_dtype": "float32"}


@pytest.mark.parametrize(
    ("name", "misread"),
    [
        ("rope_ratio", {"rope_ratio": 1}),
        ("chatglm2_32k", {"_name_or_path": "THUDM/chatglm3-6b"}),
        ("glm4", {"layernorm_epsilon": 1e-2}),
        ("fused_mha", {"multi_query_attention": True, "multi_query_group_num": 4}),
    ],
)
def test_the_reference_tells_the_variants_apart(name, misread):
    config = {**chatglm.CONFIG, **VARIANTS[name]}
    weights = chatglm.original_weights(config)
    ids = torch.arange(40)
    right = chatglm.forward(config, weights, ids)
    wrong = chatglm.forward({**config, **misread}, weights, ids)
    assert (right - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keeps_the_type_or_changes_it(tmp_path, dtype):
    config, weights = published(tmp_path / "src", dtype=dtype, kind="bin", files=1)
    convert_chatglm(tmp_path / "src", tmp_path / "glm", console=quiet())
    assert AutoConfig.from_pretrained(tmp_path / "glm").dtype == dtype
    assert {t.dtype for t in tensors(tmp_path / "glm").values()} == {dtype}
    convert_chatglm(tmp_path / "glm", tmp_path / "back", reverse=True, console=quiet())
    assert_same_bytes(tensors(tmp_path / "back"), weights)

    convert_chatglm(tmp_path / "src", tmp_path / "f32", dtype="float32", console=quiet())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "f32")
    assert model.dtype == torch.float32
    ids = torch.arange(20)
    wide = {name: tensor.float() for name, tensor in weights.items()}
    with torch.no_grad():
        error = model(ids[None]).logits[0] - chatglm.forward(config, wide, ids)
    assert error.abs().max() <= 1e-5


def test_files_of_limited_size_and_q_k_v_in_different_ones(tmp_path):
    _, weights = published(tmp_path / "src")
    limit = 20_000
    convert_chatglm(tmp_path / "src", tmp_path / "glm", shard_bytes=limit, console=quiet())
    files = sorted((tmp_path / "glm").glob("model-*.safetensors"))
    assert len(files) > 10
    for path in files:
        found = {}
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert len(found) == 1 or sum(t.nbytes for t in found.values()) <= limit
    index = json.loads((tmp_path / "glm" / "model.safetensors.index.json").read_text())
    parts = [index["weight_map"][f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv"]
    assert len(set(parts)) > 1
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for name, t in weights.items() if not name.endswith("inv_freq")
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "glm")
    convert_chatglm(tmp_path / "glm", tmp_path / "back", reverse=True, console=quiet())
    assert_same_bytes(tensors(tmp_path / "back"), weights)


@pytest.mark.parametrize("name", ["chatglm3", "fused_mha_no_bias", "chatglm2_32k"])
def test_a_tuned_model_goes_back(tmp_path, name):
    config, _ = published(tmp_path / "src", name)
    convert_chatglm(tmp_path / "src", tmp_path / "glm", console=quiet())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "glm").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01
    # Without the folder of kept files, as transformers saves it.
    model.save_pretrained(tmp_path / "tuned")
    log = quiet()
    convert_chatglm(tmp_path / "tuned", tmp_path / "back", reverse=True, console=log)
    assert "copy tokenizer.model" in log.file.getvalue()
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    ids = torch.arange(30)
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    names = {"_name_or_path": config["_name_or_path"]}
    expected = chatglm.forward({**back, **names}, tensors(tmp_path / "back"), ids)
    assert (logits - expected).abs().max() <= 1e-5
    # And as it came, where the folder is there.
    (tmp_path / "glm" / KEPT).rename(tmp_path / "tuned" / KEPT)
    convert_chatglm(tmp_path / "tuned", tmp_path / "full", reverse=True, console=quiet())
    expected = chatglm.forward(config, tensors(tmp_path / "full"), ids)
    assert (logits - expected).abs().max() <= 1e-5


def test_names_what_it_drops_and_tells_the_family(tmp_path):
    published(tmp_path / "src")
    log = quiet()
    convert_chatglm(tmp_path / "src", tmp_path / "glm", console=log)
    assert "dropped transformer.rotary_pos_emb.inv_freq" in log.file.getvalue()
    assert "chatglm3, 3 layers" in log.file.getvalue()
    assert json.loads((tmp_path / "glm" / "slap_ds.json").read_text()) == {"template": "chatglm3"}
    # The same folder under another name, with the older tokenizer's code: no roles in it.
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    (tmp_path / "src" / "config.json").write_text(json.dumps({**config, "_name_or_path": "x"}))
    (tmp_path / "src" / "tokenization_chatglm.py").write_text("class ChatGLMTokenizer: ...")
    convert_chatglm(tmp_path / "src", tmp_path / "two", console=quiet())
    assert json.loads((tmp_path / "two" / "slap_ds.json").read_text()) == {"template": "chatglm2"}
    convert_chatglm(tmp_path / "src", tmp_path / "three", family="chatglm3", console=quiet())
    note = json.loads((tmp_path / "three" / "slap_ds.json").read_text())
    assert note == {"template": "chatglm3"}


PUBLISHED_SIZES = {
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "num_layers": 28,
    "padded_vocab_size": 65024,
}


@pytest.mark.parametrize(
    ("sizes", "keys", "parameters"),
    [
        (PUBLISHED_SIZES, 311, 12_487_168_064 // 2 - 32),
        ({**PUBLISHED_SIZES, "num_layers": 40, "padded_vocab_size": 151552}, 443, 9_399_951_360),
    ],
)
def test_the_published_sizes_fill_transformers_model(tmp_path, sizes, keys, parameters):
    config = {**chatglm.CONFIG, **sizes}
    found = read_sizes(config, tmp_path)
    ours = {name: shape for link in layout(found) for name, shape in link.ours.items()}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            glm_config(config, found, "chatglm3", {"pad_token_id": 0})
        )
    assert ours == {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert len(ours) == keys
    assert sum(weight.numel() for weight in model.parameters()) == parameters
