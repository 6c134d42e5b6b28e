"""What reads input that others write, and what must hold for every input: a value, or one of the
errors that are told to users. Anything else, and any input that takes seconds, is a finding.

Each target takes bytes, so that hypothesis and atheris can both drive it.
"""

# A target is a test: what an error must say stands where it is caught.
# ruff: noqa: PT017

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st

from slap_ds import jsonl
from slap_ds.checkpoint import find as checkpoint
from slap_ds.config.file import read_config
from slap_ds.data.formats import Conversation, Reject, read_conversations
from slap_ds.distributed.comm import Comm
from slap_ds.engine.tensor_files import read_tensors
from slap_ds.launch.environment import read_hostfile

_folder = Path(tempfile.mkdtemp(prefix="slap-fuzz-"))
atexit.register(shutil.rmtree, _folder, ignore_errors=True)


def config(data: bytes) -> None:
    path = _folder / "run.yaml"
    path.write_bytes(data)
    try:
        read_config(str(path))
    except (ValueError, FileNotFoundError) as error:
        assert str(error)


def overrides(data: bytes) -> None:
    path = _folder / "base.yaml"
    path.write_text("run_dir: r\nsteps: 1\nmodel: {path: m}\ndata: {train: [d]}\n")
    try:
        read_config(str(path), data.decode("utf-8", "replace").split("\x1f"))
    except (ValueError, FileNotFoundError) as error:
        assert str(error)


def rows(data: bytes) -> None:
    path = _folder / "data.jsonl"
    path.write_bytes(data)
    found = list(read_conversations([str(path)]))
    assert all(isinstance(row, (Conversation, Reject)) for row in found)
    lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    assert len(found) == len(lines)
    for row in found:
        if isinstance(row, Conversation):
            assert row.messages
            "".join(message.content for message in row.messages).encode()


def json_file(data: bytes) -> None:
    path = _folder / "data.json"
    path.write_bytes(data)
    try:
        list(read_conversations([str(path)]))
    except ValueError as error:
        assert "data.json" in str(error)


def hostfile(data: bytes) -> None:
    path = _folder / "hostfile"
    path.write_bytes(data)
    try:
        hosts = read_hostfile(str(path))
    except ValueError as error:
        assert str(error)
    else:
        assert hosts
        assert all(name and not name.isspace() and slots > 0 for name, slots in hosts.items())


def manifest(data: bytes) -> None:
    folder = _folder / "run" / "checkpoints" / "step-000001"
    folder.mkdir(parents=True, exist_ok=True)
    try:  # as it is, and with a right hash, as somebody would write it who means harm
        value = jsonl.loads(data)
        assert isinstance(value, dict)
        data = jsonl.dumps(checkpoint.sealed(value)).encode()
    except (ValueError, AssertionError):
        pass
    (folder / "manifest.json").write_bytes(data)
    try:
        checkpoint.check(checkpoint.read(folder))
    except checkpoint.CheckpointDamaged as error:
        assert "manifest.json" in str(error) or "step-000001" in str(error)
    else:
        raise AssertionError("a checkpoint without files was taken")


def tag(data: bytes) -> None:
    root = _folder / "tags" / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    (root / "latest").write_bytes(data)
    try:
        assert checkpoint.newest(root.parent, Comm()) is None
    except checkpoint.CheckpointDamaged as error:
        assert "\n" not in str(error).replace(repr(data), "")


def tensors(data: bytes) -> None:
    path = _folder / "shard.pt"
    path.write_bytes(data)
    try:
        read_tensors(path)
    except ValueError as error:
        assert "shard.pt is refused" in str(error)


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
_words = (
    "run_dir steps epochs seed model path config data train eval max_tokens batch candidates "
    "selection method keep checkpoint every async engine kind messages role content prompt "
    "completion conversations from value instruction output history step files bytes sha256 "
    "world_size state.json state.safetensors"
)
_keys = st.sampled_from(_words.split()) | st.text(max_size=6)
_trees = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=5),
    max_leaves=12,
)
_raw = st.binary(max_size=200) | st.text(max_size=120).map(lambda text: text.encode())
_json = _trees.map(lambda tree: json.dumps(tree).encode())
_lines = st.lists(_json | _raw, max_size=5).map(b"\n".join)
_flags = st.lists(
    st.builds("--{}={}".format, st.lists(_keys, max_size=3).map(".".join), _scalars), max_size=4
)
_hosts = st.lists(
    st.builds(
        "{}{}slots={}{}".format, *[st.text(max_size=4)] * 2, st.integers(-2, 9), st.text("# x")
    )
    | st.sampled_from(["node-1 slots=8", "node-2 slots=8", "# note", "node-1 slots=0"]),
    max_size=5,
).map(lambda lines: "\n".join(lines).encode())
_pickles = st.lists(
    st.sampled_from(
        [b"\x80\x02", b"cos\nsystem\n", b"(", b"t", b"R", b".", b"}", b"q\x00", b"X\1\0\0\0a"]
    )
    | st.binary(max_size=8),
    max_size=12,
).map(b"".join)

TARGETS: dict[str, tuple[Callable[[bytes], None], st.SearchStrategy[bytes]]] = {
    "config": (config, _json | _raw),
    "overrides": (overrides, _flags.map(lambda flags: "\x1f".join(flags).encode()) | _raw),
    "rows": (rows, _lines),
    "json_file": (json_file, _json | st.lists(_trees, max_size=4).map(json.dumps).map(str.encode)),
    "hostfile": (hostfile, _hosts | _raw),
    "manifest": (manifest, _json | _raw),
    "tag": (tag, _raw | st.sampled_from([b"../elsewhere", b"/etc", b"step-000001", b""])),
    "tensors": (tensors, _pickles | _raw),
}
