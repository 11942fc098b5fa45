from __future__ import annotations

import pickle

import pytest

from meiqa.errors import MeiqaError, StoreLocked, UsageError


def test_the_line_says_what_seen_allowed_and_what_to_do() -> None:
    error = UsageError("unknown device", seen="tpu", allowed="cpu, cuda", hint="use --device cpu")
    assert str(error) == "unknown device; got tpu; allowed: cpu, cuda; use --device cpu"
    assert (error.what, error.seen, error.allowed) == ("unknown device", "tpu", "cpu, cuda")
    assert error.hint == "use --device cpu"


def test_parts_that_are_not_given_are_left_out_but_zero_is_shown() -> None:
    assert str(MeiqaError("no")) == "no"
    assert str(MeiqaError("too small", seen=0)) == "too small; got 0"


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\tb", "a\x1b[31mb", "a\udc80b", "a\u2028b"])
def test_it_stays_one_printable_line(text: str) -> None:
    assert str(MeiqaError(text)).isprintable()


def test_letters_of_every_script_are_kept() -> None:
    assert str(MeiqaError("größe 写真")) == "größe 写真"


def test_only_a_locked_store_is_worth_a_second_try() -> None:
    assert StoreLocked("locked").retryable
    assert not UsageError("wrong").retryable


def test_errors_cross_process_borders() -> None:
    error = pickle.loads(pickle.dumps(StoreLocked("locked", seen=3, hint="wait")))
    assert (type(error), str(error)) == (StoreLocked, "locked; got 3; wait")
