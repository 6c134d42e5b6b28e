"""Files are whole or as they were; hashes are those of the system's own tool."""

import contextlib
import subprocess

import pytest

from slap_ds.files import BLOCK_BYTES, feed, replacing, sha256, write_text


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path) as part:
        part.write_text("half")
        assert not path.exists()
        part.write_text("whole")
    assert path.read_text() == "whole"
    write_text(path, "另一个")
    assert path.read_text("utf-8") == "另一个"
    assert list(path.parent.iterdir()) == [path]


def test_after_an_error_it_is_as_it_was(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with contextlib.suppress(RuntimeError), replacing(path) as part:
        part.write_text("after")
        raise RuntimeError("stop")
    assert path.read_text() == "before"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud83d")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 3])
def test_hashes_are_those_of_sha256sum(size, tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    expected = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True)
    assert sha256(path) == expected.stdout.split()[0]

    class Nothing:
        def update(self, data: bytes) -> None: ...

    blocks = []
    assert feed(Nothing(), path, lambda: blocks.append(1)) == size
    assert len(blocks) == -(-size // BLOCK_BYTES)
