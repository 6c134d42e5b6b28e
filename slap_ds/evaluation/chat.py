"""One question to an OpenAI-compatible chat endpoint, through the `openai` package.

    connect(endpoint) -> client;  ask(client, endpoint, body) -> reply

The package waits and tries again. What it would not do by itself is here: the key goes to no other
address, into no message and no file; replies are limited in size and in time.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import httpx2
from openai import APIConnectionError, APIStatusError, DefaultHttpxClient, Omit, OpenAI

MAX_REPLY_BYTES = 2**22
HOPELESS = {*range(300, 400), 401, 402, 403, 404, 405}


@dataclass(frozen=True)
class Endpoint:
    """Where to ask. `url` as `endpoint_url` gives it."""

    url: str = field(repr=False)
    model: str
    key: str = field(default="", repr=False)
    timeout_s: float = 120.0  # of one request, from first byte sent to last one read
    tries: int = 6
    workers: int = 4

    @property
    def shown(self) -> str:
        """The address without its query, which may hold secrets."""
        return self.url.partition("?")[0]

    def clean(self, text: str) -> str:
        """`text` without the key."""
        return text.replace(self.key, "***") if self.key else text


class NoReply(Exception):
    """No usable reply after all tries. `kind` says what the pair counts as."""

    def __init__(self, kind: Literal["failed", "malformed"], reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def endpoint_url(url: str) -> str:
    """The chat endpoint of a base address such as https://host/v1.

    Raises:
        ValueError: it is no http address, or holds a user name or password.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("--judge: expected an address such as https://host/v1")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "--judge: the address holds a user name or password; put the key into an "
            "environment variable (--judge-key-env)"
        )
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def connect(endpoint: Endpoint) -> OpenAI:
    """A client for `ask`, to be closed after use; several threads may share it."""
    for name in ("openai", "httpx2", "httpcore2"):  # their lines hold the address with its query
        logging.getLogger(name).setLevel(logging.WARNING)

    def limit(response: httpx2.Response) -> None:
        assert isinstance(response.stream, httpx2.SyncByteStream)
        response.stream = _Limited(response.stream, endpoint.timeout_s)

    return OpenAI(
        api_key=endpoint.key or "none",
        base_url=endpoint.shown,
        timeout=endpoint.timeout_s,
        max_retries=endpoint.tries - 1,
        # A redirect would lead the Authorization header to wherever it points.
        http_client=DefaultHttpxClient(follow_redirects=False, event_hooks={"response": [limit]}),
    )


def ask(client: OpenAI, endpoint: Endpoint, body: Mapping[str, Any]) -> str:
    """The endpoint's reply to one request, tried again where that may help.

    Raises:
        ValueError: no request can succeed (wrong key, address or model).
        NoReply: this one did not, after all tries.
    """
    # Neither what the environment says of an account at OpenAI nor an empty key is sent.
    unsent = ["OpenAI-Organization", "OpenAI-Project"] + ["Authorization"] * (not endpoint.key)
    headers: dict[str, str | Omit] = {name: Omit() for name in unsent}
    try:
        response = client.post(
            endpoint.url, body=dict(body), cast_to=httpx2.Response, options={"headers": headers}
        )
        return endpoint.clean(_message(response.content))
    except APIStatusError as error:
        # Struck out before it is cut, or half a key could remain.
        text = endpoint.clean(" ".join(error.response.text.split()))
        told = f"HTTP {error.status_code}: {text[:200]}"
        if error.status_code in HOPELESS:
            raise ValueError(f"the judge at {endpoint.shown} refuses: {told}") from None
        raise NoReply("failed", told) from None
    except APIConnectionError as error:
        cause = error.__cause__ or error
        told = endpoint.clean(f"{type(cause).__name__}: {cause}")
        raise NoReply("failed", told) from None
    except _Malformed as error:
        raise NoReply("malformed", str(error)) from None


class _Malformed(Exception):
    """A reply without a text."""


class _Limited(httpx2.SyncByteStream):
    """A body of limited size that comes in limited time; the client's own time-out begins anew with
    every byte that drips in."""

    def __init__(self, inner: httpx2.SyncByteStream, timeout_s: float) -> None:
        self.inner, self.timeout_s = inner, timeout_s
        self.deadline = time.monotonic() + timeout_s

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for chunk in self.inner:
            size += len(chunk)
            if time.monotonic() > self.deadline:
                raise httpx2.ReadTimeout(f"no whole reply within {self.timeout_s:g} s")
            if size > MAX_REPLY_BYTES:
                raise httpx2.ReadError(f"a reply of more than {MAX_REPLY_BYTES >> 20} MiB")
            yield chunk

    def close(self) -> None:
        self.inner.close()


def _message(data: bytes) -> str:
    """The text in a chat completion."""
    try:
        text = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _Malformed("the reply is no chat completion") from None
    if not isinstance(text, str):
        raise _Malformed("the reply is a chat completion without text")
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair fits into no file
