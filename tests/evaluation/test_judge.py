"""Pairwise judging against a local server that misbehaves in every way; the key stays secret."""

import json
import logging
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from slap_ds.cli.evaluation import _endpoint
from slap_ds.evaluation import chat
from slap_ds.evaluation.chat import Endpoint, NoReply, endpoint_url
from slap_ds.evaluation.judge import judge, verdict, wilson

KEY = "sk-canary-5f1c"


def completion(text) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@contextmanager
def server(reply):
    """`reply(handler, body, count)` answers the count-th request (from 1). Yields the base address
    and the list of (headers, body) received."""
    seen: list = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append(({k.lower(): v for k, v in self.headers.items()}, body))
                count = len(seen)
            reply(self, body, count)

        def send(self, status, data, **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.daemon_threads = True
    thread = threading.Thread(target=http_server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http_server.server_address[1]}/v1", seen
    finally:
        http_server.shutdown()
        http_server.server_close()
        thread.join()


def endpoint(url, **changes):
    settings = {"key": KEY, "timeout_s": 1.0, "tries": 4, "workers": 2}
    return Endpoint(endpoint_url(url), "a-judge", **{**settings, **changes})


def ask(where, body):
    with chat.connect(where) as client:
        return chat.ask(client, where, body)


def line(number, prediction, task="qa"):
    prompt = [{"role": "user", "content": f"问题 {number}"}]
    return {"id": number, "task": task, "prompt": prompt, "prediction": prediction}


def answers(body) -> tuple[str, str]:
    text = body["messages"][1]["content"]
    first = text.split("<answer A>\n")[1].split("\n</answer A>")[0]
    return first, text.split("<answer B>\n")[1].split("\n</answer B>")[0]


def prefers(better):
    """A judge that finds the same answer better in either order."""

    def reply(handler, body, _):
        a, b = answers(body)
        handler.send(200, completion(f"Both are short. [[{better(a, b)}]]"))

    return reply


def longer(a, b):
    return "C" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


def test_both_orders_decide(tmp_path):
    ours = [line(0, "long answer"), line(1, "x"), line(2, "same"), line(3, "abc"), line(9, "alone")]
    theirs = [line(1, "longer"), line(0, "short"), line(2, "same"), line(3, "xyz"), line(8, "no")]
    with server(prefers(longer)) as (url, seen):
        found = judge(ours, theirs, endpoint(url), tmp_path)
    assert {k: found[k] for k in ("win", "tie", "loss", "pairs", "identical")} == {
        "win": 1,
        "tie": 2,
        "loss": 1,
        "pairs": 4,
        "identical": 1,
    }
    assert (found["ours_alone"], found["theirs_alone"]) == (1, 1)
    assert found["win_share"] == 0.5
    assert len(seen) == 6  # both orders of three pairs; equal answers are not asked about
    assert all(body["model"] == "a-judge" and body["temperature"] == 0 for _, body in seen)
    lines = [json.loads(x) for x in (tmp_path / "judgements.jsonl").open(encoding="utf-8")]
    assert [x["result"] for x in lines] == ["win", "loss", "tie", "tie"]
    assert lines[0]["verdicts"] == ["A", "B"]


@pytest.mark.parametrize("place", ["A", "B"])
def test_a_judge_that_goes_by_place_gives_ties(place, tmp_path):
    ours = [line(n, f"ours {n}", task="dialogue") for n in range(5)]
    theirs = [line(n, f"theirs {n}") for n in range(5)]
    with server(prefers(lambda a, b: place)) as (url, _):
        found = judge(ours, theirs, endpoint(url), tmp_path)
    assert (found["win"], found["tie"], found["loss"]) == (0, 5, 0)
    assert found["orders_disagree"] == 5
    assert found["win_share"] is None
    assert found["interval_95"] is None
    assert found["by_task"]["dialogue"]["tie"] == 5


def test_replies_are_cached_and_a_second_start_goes_on(tmp_path):
    ours = [line(n, "o" * (n + 1)) for n in range(6)]
    theirs = [line(n, "ttt") for n in range(6)]
    with server(prefers(longer)) as (url, seen):
        whole = judge(ours, theirs, endpoint(url), tmp_path)
        assert len(seen) == 12
        cache = tmp_path / "judge-cache.jsonl"
        lines = cache.read_text("utf-8").split("\n")[:-1]
        cache.write_text("\n".join([*lines[:-3], lines[-3][:30]]), "utf-8")  # a crash
        assert judge(ours, theirs, endpoint(url), tmp_path) == whole
        assert len(seen) == 15
        assert judge(ours, theirs, endpoint(url, workers=1), tmp_path) == whole
        assert len(seen) == 15
        # Another question to the judge is not answered from the cache.
        judge(ours[:1], [line(0, "else")], endpoint(url), tmp_path)
        assert len(seen) == 17


def raw(text: bytes):
    def reply(handler, body, _):
        handler.send(200, text)

    return reply


@pytest.mark.parametrize(
    "reply",
    [
        raw(b"not json"),
        raw(b""),
        raw(b"[]"),
        raw(b'{"choices": []}'),
        raw(b'{"choices": [{"message": {"content": null}}]}'),
        raw(b'{"choices": [{"message": {"content": ["A"]}}]}'),
        raw(b"[" * 100_000),
        raw(completion("I cannot decide.")),
        raw(completion("[[D]] [A] [[a]]")),
        raw(completion("")),
        raw(b"\xff\xfe" * 10),
    ],
)
def test_malformed_replies_are_counted(reply, tmp_path):
    with server(reply) as (url, _):
        found = judge(
            [line(0, "a"), line(1, "b")],
            [line(0, "c"), line(1, "b")],
            endpoint(url, tries=2),
            tmp_path,
        )
    assert (found["malformed"], found["failed"], found["tie"], found["pairs"]) == (1, 0, 1, 2)


def status(code, times, **headers):
    """`code` the first `times` times, then a verdict."""

    def reply(handler, body, count):
        if count <= times:
            handler.send(code, b'{"error": "wait"}', **{"Retry_After_Ms": "1", **headers})
        else:
            handler.send(200, completion("[[A]]"))

    return reply


@pytest.mark.parametrize("code", [408, 429, 500, 503, 529])
def test_trying_again_helps(code):
    with server(status(code, 3)) as (url, seen):
        assert ask(endpoint(url), {}) == "[[A]]"
        assert len(seen) == 4


def test_retry_after_is_waited_for():
    started = time.monotonic()
    with server(status(429, 1, Retry_After_Ms="400")) as (url, _):
        assert ask(endpoint(url), {}) == "[[A]]"
    assert time.monotonic() - started >= 0.4
    with server(status(429, 1, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT")) as (url, _):
        assert ask(endpoint(url), {}) == "[[A]]"


def hang_up(handler, body, count):
    handler.connection.close()


def too_slow(handler, body, count):
    time.sleep(0.6)
    handler.send(200, completion("[[A]]"))


def drip(handler, body, count):
    """A byte now and then, each within the socket's time-out."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(20):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def half(handler, body, count):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(completion("[[A]]")[:20])
    handler.connection.close()


@pytest.mark.parametrize("reply", [hang_up, too_slow, drip, half, status(500, 99), status(400, 99)])
def test_no_reply_is_counted_and_asked_again_next_time(reply, tmp_path):
    pair = [line(0, "a")], [line(0, "b")]
    with server(reply) as (url, _):
        found = judge(*pair, endpoint(url, tries=2, timeout_s=0.2), tmp_path)
        assert found["failed"] + found["malformed"] == 1
        assert found["pairs"] == 1
        assert found["reasons"]
    assert not (tmp_path / "judge-cache.jsonl").read_text()
    with server(prefers(lambda a, b: "A" if a == "a" else "B")) as (url, _):
        assert judge(*pair, endpoint(url), tmp_path)["win"] == 1


def test_half_a_surrogate_pair_in_a_reply(tmp_path):
    def reply(handler, body, count):
        handler.send(200, completion("I say \ud83d [[A]]"))

    ours, theirs = [line(0, "short")], [line(0, "different")]
    with server(reply) as (url, _):
        found = judge(ours, theirs, endpoint(url), tmp_path)
    assert found["tie"] == 1
    kept = json.loads((tmp_path / "judge-cache.jsonl").read_text("utf-8").split("\n")[0])
    assert kept["reply"] == "I say ? [[A]]"


def test_a_bad_request_is_not_repeated():
    with server(status(400, 99)) as (url, seen):
        with pytest.raises(NoReply, match="HTTP 400"):
            ask(endpoint(url), {})
        assert len(seen) == 1


def test_a_reply_without_end_is_cut_off():
    with (
        server(raw(b" " * (chat.MAX_REPLY_BYTES + 1))) as (url, _),
        pytest.raises(NoReply, match="more than 4 MiB"),
    ):
        ask(endpoint(url, tries=1, timeout_s=20.0), {})


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "slap_ds.evaluation.chat")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"pip install 'slap_ds\[judge\]'"):
        _endpoint(SimpleNamespace(judge="https://h/v1"))


def test_no_server_at_all():
    with server(prefers(longer)) as (url, _):
        pass
    with pytest.raises(NoReply, match="refused"):
        ask(endpoint(url, tries=2), {})


@pytest.mark.parametrize("code", [301, 302, 307, 308, 401, 403, 404])
def test_what_can_never_work_stops_at_once(code, tmp_path):
    ours, theirs = [line(n, "a") for n in range(20)], [line(n, "b") for n in range(20)]
    with server(prefers(longer)) as (elsewhere, led_on):
        with server(status(code, 99, Location=elsewhere)) as (url, seen):
            with pytest.raises(ValueError, match=f"refuses: HTTP {code}"):
                judge(ours, theirs, endpoint(url), tmp_path)
            assert len(seen) < 20
        assert not led_on  # the key must not follow a redirect


def echo(handler, body, count):
    """Sends the key back: in an error, in a malformed reply, in a reply."""
    secret = handler.headers["Authorization"]
    if count == 1:
        handler.send(500, f"you sent {secret}".encode())
    elif count == 2:
        handler.send(400, f"bad key {secret}".encode())
    else:
        handler.send(200, completion(f"{secret} [[A]]"))


def test_the_key_is_sent_and_never_kept(tmp_path, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    ours, theirs = [line(n, "a") for n in range(3)], [line(n, "b") for n in range(3)]
    with server(echo) as (url, seen):
        where = endpoint(url + "?secret=in-the-query", workers=1)
        found = judge(ours, theirs, where, tmp_path)
        assert all(headers["authorization"] == f"Bearer {KEY}" for headers, _ in seen)
    assert found["failed"] == 1
    assert any("***" in reason for reason in found["reasons"])
    with (
        server(lambda h, body, _: h.send(401, h.headers["Authorization"].encode())) as (url, _),
        pytest.raises(ValueError, match=r"\*\*\*") as caught,
    ):
        judge(ours, theirs, endpoint(url), tmp_path / "refused")
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    out, err = capsys.readouterr()
    for text in (
        written.decode(),
        str(found),
        repr(where),
        str(caught.value),
        out,
        err,
        caplog.text,
    ):
        assert KEY not in text
        assert "in-the-query" not in text


def test_without_a_key_none_is_sent(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, KEY)
    with server(prefers(longer)) as (url, seen):
        body = {
            "messages": [{}, {"content": "<answer A>\nx\n</answer A><answer B>\ny\n</answer B>"}]
        }
        ask(endpoint(url, key=""), body)
        assert "content-type" in seen[0][0]
        assert KEY not in str(seen[0][0])
        assert "authorization" not in seen[0][0]


def test_addresses():
    assert endpoint_url("https://h/v1/") == "https://h/v1/chat/completions"
    assert endpoint_url("http://h:8/v1/chat/completions") == "http://h:8/v1/chat/completions"
    assert endpoint_url("https://h/v1?v=2") == "https://h/v1/chat/completions?v=2"
    for wrong in ("h/v1", "ftp://h", "file:///etc/passwd", ""):
        with pytest.raises(ValueError, match="expected an address"):
            endpoint_url(wrong)
    with pytest.raises(ValueError, match="environment variable") as caught:
        endpoint_url("https://me:secret@h/v1")
    assert "secret" not in str(caught.value)


def test_no_prompt_in_common(tmp_path):
    with pytest.raises(ValueError, match="no prompt in common"):
        judge([line(0, "a")], [line(1, "b")], endpoint("http://127.0.0.1:9"), tmp_path)


def test_the_last_verdict_counts():
    assert verdict("[[A]] looks good at first, but [[B]]") == "B"
    assert verdict("[[C]]") == "C"
    assert verdict("A") is None


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17), table I: method 3, score without correction.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_as_published(wins, n, low, high):
    found = wilson(wins, n)
    assert found == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))
