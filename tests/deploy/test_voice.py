"""Lines to read and lines to collect."""

from __future__ import annotations

import datetime
import io
import json
import math

from rich.console import Console

from fedmoe.deploy.voice import Voice


def test_a_json_line_stands_alone_and_tells_when_what_and_how_bad(capsys):
    voice = Voice(Console(file=io.StringIO()), json=True)
    voice.say("round", "round 1\nis done", {"round": 1, "loss": math.nan, "accuracy": 0.5})
    voice.say("trouble", "[bold]", level="warning")
    out, err = capsys.readouterr()
    first, second = (json.loads(line) for line in err.splitlines())
    assert out == ""
    moment = datetime.datetime.fromisoformat(first.pop("time"))
    assert moment.utcoffset() == datetime.timedelta(0)
    assert first == {
        "level": "info",
        "event": "round",
        "message": "round 1\nis done",
        "round": 1,
        "loss": None,
        "accuracy": 0.5,
    }
    assert (second["level"], second["message"]) == ("warning", "[bold]")


def test_a_reader_is_told_the_text_and_a_quiet_one_only_what_is_wrong():
    for quiet in (False, True):
        out = io.StringIO()
        voice = Voice(Console(file=out), quiet=quiet)
        voice.say("start", "begins [at] once", {"round": 1})
        voice.say("trouble", "something is wrong", level="warning")
        lines = out.getvalue().splitlines()
        assert lines == ["begins [at] once"] * (not quiet) + ["! something is wrong"]
