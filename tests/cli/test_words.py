from __future__ import annotations

import json
import os

import pytest

from fedmoe.cli.words import duration, listed, nothing_on_stdout, plural, size, write_json


@pytest.mark.parametrize(
    "number, text",
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (10_240, "10.0 KiB"), (102_400, "100 KiB"),
     (1024**2 - 1, "1024 KiB"), (1.5 * 2**30, "1.50 GiB"), (5 * 2**50, "5120 TiB")],
)  # fmt: skip
def test_sizes(number, text):
    assert size(number) == text


@pytest.mark.parametrize(
    "seconds, text",
    [(0.02, "20 ms"), (0.31, "0.3 s"), (41.4, "41 s"), (59.7, "1:00"), (125, "2:05"),
     (3725, "1:02:05"), (36_000, "10:00:00")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_lists_and_plurals():
    assert [listed(x) for x in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "", "a", "a and b", "a, b and c",
    ]  # fmt: skip
    assert (plural(1, "run"), plural(0, "run"), plural(2000, "run")) == (
        "1 run", "0 runs", "2,000 runs",
    )  # fmt: skip


def test_json_has_null_where_a_number_is_not_finite(capsys):
    write_json({"a": [float("nan"), 1.0, (float("inf"),)], 3: None})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.0, [None]], "3": None}


def test_what_is_printed_meanwhile_goes_to_stderr_from_child_processes_too(capfd):
    with nothing_on_stdout():
        print("from here")
        os.system("echo from a child")
    print("the result")
    out, err = capfd.readouterr()
    assert out == "the result\n"
    assert "from here" in err and "from a child" in err
