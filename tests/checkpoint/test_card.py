"""The model card of an export, and its way to a hub: a small one made here."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import HfApi, ModelCard, constants

from slap_ds.checkpoint import card
from slap_ds.checkpoint.card import _public
from slap_ds.checkpoint.export import export
from slap_ds.jsonl import read_lines
from tests.recipes import run_config, tiny_config, tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_config(
        tiny_model(folder / "base"), folder / "mine", steps=2, engine={"kind": "torch"}
    )
    run_config(config)
    return folder / "mine"


def test_the_card_says_what_was_trained(run, tmp_path):
    made = export(run, tmp_path / "model", licence="apache-2.0")
    found = ModelCard.load(made / "README.md")
    assert found.data.license == "apache-2.0"
    assert found.data.library_name == "transformers"
    assert found.data.pipeline_tag == "text-generation"
    assert found.data.base_model is None  # a folder of this machine is none of a hub's
    evaluations = [r for r in read_lines(run / "metrics.jsonl") if r["event"] == "eval"]
    first, last = (f"{evaluations[at]['eval_loss']:.4f}" for at in (0, -1))
    for told in (
        "# mine",
        "fine-tuned from base",
        "| selection method | slap |",
        "| keep ratio | 0.6 |",
        "| optimizer steps | 2 |",
        "| task | after 0 steps | after 2 steps |",
        f"| all | {first} | {last} |",
        "transformers 5",
    ):
        assert told in found.text, told
    assert str(run.parent) not in found.content
    plain = ModelCard.load(export(run, tmp_path / "other") / "README.md")
    assert plain.data.license is None
    assert "No licence is stated" in plain.text


def test_names_of_hubs_stay_and_paths_do_not():
    assert _public("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert _public("/home/me/secret-project/base") == "base"
    assert _public("data/mine/*.jsonl") == "*.jsonl"


class Hub(BaseHTTPRequestHandler):
    """As much of a hub's interface as an upload of small files needs."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        hub = self.server
        hub.tokens.add(self.headers["Authorization"])
        if self.path == "/api/repos/create":
            hub.created = json.loads(body)
        code = hub.refusals.get(self.path)
        if code is not None:
            return self.answer(code, {"error": "not for you"})
        if self.path == "/api/repos/create":
            return self.answer(200, {"url": f"{hub.address}/me/mine"})
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            each = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self.answer(200, {"files": [{"path": f["path"], **each} for f in files]})
        if "/commit/main" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    hub.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{hub.address}/me/mine/commit/abc"
            return self.answer(200, {"commitUrl": url, "commitOid": "abc", "success": True})
        return self.answer(200, {"errors": [], "warnings": []})

    def do_GET(self):
        self.answer(200, {"id": "me/mine", "sha": "abc", "siblings": [], "tags": []})

    def answer(self, code, value):
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.tokens, server.files, server.created, server.refusals = set(), {}, None, {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def push(run, out, address, *flags):
    environ = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": "hf_ours"}
    environ |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environ |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-m", "slap_ds", "export", str(run), "--out", str(out), *flags]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)


def test_push_uploads_the_folder_as_it_is(run, tmp_path, hub):
    done = push(run, tmp_path / "model", hub.address, "--push", "me/mine")
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub.address}/me/mine" in done.stdout
    assert hub.created["name"] == "mine"
    assert hub.created["visibility"] == "private"
    assert hub.tokens == {"Bearer hf_ours"}
    files = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir() if p.is_file()}
    assert hub.files == files
    assert {"README.md", "config.json", "model.safetensors", "slap_ds.json"} <= set(files)
    assert not [name for name, data in files.items() if b"hf_ours" in data]


CREATE, UPLOAD = "/api/repos/create", "/api/models/me/mine/commit/main"
NOT_NOW, LOG_IN, REACH = "did not take it now", "hf auth login", "is a hub that can be reached"


@pytest.mark.parametrize(
    ("refusals", "told", "remedy"),
    [
        ({UPLOAD: 401}, "401", LOG_IN),
        ({UPLOAD: 403}, "403", LOG_IN),
        ({CREATE: 404}, "404", LOG_IN),
        ({CREATE: 409}, "", REACH),  # a hub that does not say which repository is there already
        ({UPLOAD: 409}, "409", NOT_NOW),
        ({UPLOAD: 429}, "429", NOT_NOW),
        ({CREATE: 500}, "500", NOT_NOW),
        ({UPLOAD: 503}, "503", NOT_NOW),
    ],
)
def test_a_hub_that_refuses(refusals, told, remedy, hub, tmp_path, monkeypatch):
    hub.refusals = refusals
    (tmp_path / "README.md").write_text("mine")
    monkeypatch.setattr(card, "HfApi", lambda: HfApi(endpoint=hub.address, token="hf_ours"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(ValueError, match=r"^--push me/mine: ") as caught:
        card.push(tmp_path, "me/mine", public=False)
    text = str(caught.value)
    assert told in text
    assert remedy in text
    assert text.endswith(f"is in {tmp_path}: `hf upload me/mine {tmp_path}` tries again")
    assert "\n" not in text
    assert "hf_ours" not in text


def test_what_could_not_be_pushed_is_exported(run, tmp_path):
    done = push(run, tmp_path / "model", "http://127.0.0.1:9", "--push", "me/mine")
    assert done.returncode == 1
    assert f"wrote {tmp_path / 'model'}: step 2 of 2" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("slap-ds: error: --push me/mine: ")
    assert REACH in line
    assert (tmp_path / "model" / "model.safetensors").exists()
