"""A few thousand inputs on every run of the tests; `make fuzz N=100000` makes more."""

import pytest

from tests.fuzz.run import fuzz
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_every_input_gives_a_value_or_an_error_for_users(name):
    assert fuzz(name, 150) >= 50


def test_a_target_that_breaks_is_found(monkeypatch):
    def broken(data: bytes) -> None:
        assert b"}" not in data

    monkeypatch.setitem(TARGETS, "broken", (broken, TARGETS["rows"][1]))
    with pytest.raises(AssertionError):
        fuzz("broken", 300)
