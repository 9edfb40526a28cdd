"""The round log: what goes in comes out, a kill costs one line, and damage is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.report import log as log_module
from fedmoe.report.fields import parse
from fedmoe.report.log import (
    ClientAccuracy,
    ClientEntry,
    LogError,
    Others,
    RoundRecord,
    Run,
    RunInfo,
    RunLog,
    read_run,
    read_runs,
)
from fedmoe.types import Change, ClientFailure, ExpertId

FULL = RoundRecord(
    round=0,
    phase="explore",
    seconds=1.5,
    bytes_down=300,
    bytes_up=100,
    bytes_once=200,
    clients=[0],
    failed=[ClientFailure(1, "no answer")],
    refused=[ClientFailure(1, "too little memory")],
    loss=0.25,
    held={0: [[0, 2]]},
    count={0: [[7, 0, 3, 0]]},
    changes=[Change(0, "choose", (ExpertId(0, 0), ExpertId(0, 2)))],
    accuracy={0: ClientAccuracy(received_validation=0.5, received_test=0.25)},
    global_accuracy=0.125,
    memory_bytes={0: 4096},
    model_hash="ab12",
    unseen={7: {"served_test": 0.5, "bytes_down": 12.0}},
)


@pytest.fixture
def log(tmp_path: Path, info: Callable[..., RunInfo]) -> RunLog:
    return RunLog.create(tmp_path / "fedmoe-seed0", info(rounds=3))


@pytest.fixture
def two_rounds(log: RunLog, record: Callable[..., RoundRecord]) -> RunLog:
    log.append(FULL)
    log.append(replace(record(1), loss=0.5))
    return log


def test_a_run_reads_back_as_it_was_written(two_rounds: RunLog) -> None:
    run = read_run(two_rounds.directory)
    assert run.info.to_json() == two_rounds.info.to_json()
    assert run.rounds[0].to_json() == FULL.to_json()
    assert [r.round for r in run.rounds] == [0, 1]
    assert run.notes == []


counts = st.integers(0, 2**62)
shares = st.none() | st.floats(0, 1)


@given(
    seconds=st.floats(0, 1e9),
    bytes_down=counts,
    bytes_up=counts,
    loss=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    accuracy=st.none() | st.dictionaries(counts, st.builds(ClientAccuracy, *[shares] * 4)),
    reason=st.text(),
    count=st.dictionaries(counts, st.lists(st.lists(counts))),
)
def test_any_record_survives_its_own_json(
    seconds: float,
    bytes_down: int,
    bytes_up: int,
    loss: float | None,
    accuracy: dict[int, ClientAccuracy] | None,
    reason: str,
    count: dict[int, list[list[int]]],
) -> None:
    record = RoundRecord(
        3,
        "train",
        seconds,
        bytes_down,
        bytes_up,
        loss=loss,
        accuracy=accuracy,
        failed=[ClientFailure(1, reason)],
        count=count,
    )
    written = json.dumps(record.to_json())
    assert "\n" not in written
    assert RoundRecord.from_json(parse(written, "here")).to_json() == record.to_json()


def test_the_documentation_names_every_field_that_is_written() -> None:
    documented = set(re.findall(r"\b[a-z]\w*\b", log_module.__doc__ or "")) | {"num_experts_L"}
    client = ClientEntry(0, "photo", 1, 2, 3, 4)
    accuracy = ClientAccuracy(0.1, 0.2, 0.3, 0.4)
    run = RunInfo("e", "m", 0, 1, [4], 10, "p", {}, {}, 1, 1, [client])
    written = {**run.to_json(), **client.to_json(), **FULL.to_json(), **accuracy.to_json()}
    assert set(written) <= documented


@pytest.mark.parametrize("kept", [1, 40, -1], ids=["one byte", "forty", "all but one"])
def test_a_torn_last_line_is_left_out_with_a_note(two_rounds: RunLog, kept: int) -> None:
    first, second = two_rounds.path.read_bytes().splitlines(keepends=True)
    two_rounds.path.write_bytes(first + second.rstrip()[:kept])
    run = read_run(two_rounds.directory)
    assert [r.round for r in run.rounds] == [0]
    assert len(run.notes) == 1 and "line 2" in run.notes[0]


def test_a_line_cut_inside_a_character_is_torn_too(log: RunLog) -> None:
    log.path.write_bytes('{"round": 0, "model_hash": "é'.encode()[:-1])
    assert read_run(log.directory).rounds == []


def test_a_damaged_line_before_the_last_is_an_error_with_file_and_line(two_rounds: RunLog) -> None:
    first, second = two_rounds.path.read_text().splitlines(keepends=True)
    two_rounds.path.write_text(first[:30] + "\n" + second)
    with pytest.raises(LogError, match=r"rounds.jsonl, line 1: not JSON"):
        read_run(two_rounds.directory)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("format", 2, "field 'format' is 2, and this fedmoe reads format 1 only"),
        ("round", -1, "field 'round' must be a whole number of at least 0, got -1"),
        ("round", True, "field 'round' must be a whole number of at least 0, got True"),
        ("phase", "lunch", "field 'phase' must be one of 'explore', 'train', 'final', got 'lunch'"),
        ("seconds", "long", "field 'seconds' must be a finite number, got 'long'"),
        ("seconds", float("nan"), "field 'seconds' must be a finite number, got nan"),
        ("bytes_once", 301, "field 'bytes_once' must be at most bytes_down, 300, got 301"),
        ("clients", [0, "x"], "field 'clients' must be a list of whole numbers of at least 0"),
        ("failed", [{"client": 0}], r"field 'failed\[0\].reason' is missing"),
        ("held", {"a": []}, "field 'held' must be keyed by client numbers, got the key 'a'"),
        ("held", {"0": [[4]]}, "field 'held.0' must name experts of 1 layers with .4. experts"),
        ("count", {"0": [[1, 2]]}, "field 'count.0' must have 1 rows for .4. experts"),
        ("count", {"0": [[1, 2, 3, 4, 5]]}, "field 'count.0' must have 1 rows for .4. experts"),
        ("count", {"9": [[0, 0, 0, 0]]}, "field 'count' names client 9, not in run.json"),
        (
            "changes",
            [{"client": 0, "action": "eat", "experts": []}],
            r"field 'changes\[0\].action' must be one of 'choose'",
        ),
        (
            "changes",
            [{"client": 0, "action": "add", "experts": [[0]]}],
            r"field 'changes\[0\].experts\[0\]' must be \[layer, expert\], got \[0\]",
        ),
        (
            "changes",
            [{"client": 0, "action": "add", "experts": [[0, 9]]}],
            r"field 'changes' names expert \[0, 9\]",
        ),
        ("accuracy", {"0": {"received_test": 1.5}}, "'accuracy.0.received_test' must be a share"),
        ("global", "good", "field 'global' must be a finite number, got 'good'"),
        ("memory_bytes", [], r"field 'memory_bytes' must be an object, got \[\]"),
        ("model_hash", None, "field 'model_hash' must be a string, got None"),
        ("round", 3, "field 'round' must be below 3, or equal to it in phase 'final'"),
    ],
)
def test_a_wrong_field_is_named_with_its_file_line_and_value(
    two_rounds: RunLog, field: str, value: object, message: str
) -> None:
    first, second = map(json.loads, two_rounds.path.read_text().splitlines())
    lines = [json.dumps({**first, field: value}), json.dumps({**second, "round": 2})]
    two_rounds.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(LogError, match=rf"rounds.jsonl, line 1: .*{message}"):
        read_run(two_rounds.directory)


@pytest.mark.parametrize("field", sorted(FULL.to_json().keys() - {"unseen"}))
def test_a_missing_field_is_named(two_rounds: RunLog, field: str) -> None:
    first, second = map(json.loads, two_rounds.path.read_text().splitlines())
    del first[field]
    two_rounds.path.write_text(json.dumps(first) + "\n" + json.dumps(second) + "\n")
    with pytest.raises(LogError, match=rf"line 1: field '{field}' is missing"):
        read_run(two_rounds.directory)


def test_a_log_from_before_there_were_unseen_clients_is_read(log: RunLog) -> None:
    first = FULL.to_json()
    assert first.pop("unseen")
    log.path.write_text(json.dumps(first) + "\n")
    assert read_run(log.directory).rounds[0].unseen == {}


def test_fields_that_a_later_writer_added_are_ignored(log: RunLog) -> None:
    log.path.write_text(json.dumps({**FULL.to_json(), "weather": "fine"}) + "\n")
    assert read_run(log.directory).rounds[0].to_json() == FULL.to_json()


def test_rounds_out_of_order_are_an_error(two_rounds: RunLog) -> None:
    lines = two_rounds.path.read_text().splitlines(keepends=True)
    two_rounds.path.write_text("".join(reversed(lines)))
    with pytest.raises(LogError, match=r"line 2: field 'round' must come after 1, got 0"):
        read_run(two_rounds.directory)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("clients", [{"id": 0}], r"field 'clients\[0\].memory_bytes' is missing"),
        ("num_experts_L", [0], r"field 'num_experts_L\[0\]' must be a whole number of at least 1"),
        ("versions", {"torch": 2}, "field 'versions.torch' must be a string, got 2"),
        ("seed", 1.5, "field 'seed' must be a whole number, got 1.5"),
        ("format", "1", "field 'format' is '1'"),
    ],
)
def test_a_wrong_field_of_the_run_is_named(
    log: RunLog, field: str, value: object, message: str
) -> None:
    path = log.directory / "run.json"
    content: dict[str, Any] = json.loads(path.read_text())
    if field == "clients":
        value = [{**entry, "group": None} for entry in [{"id": 0}]]
    path.write_text(json.dumps({**content, field: value}))
    with pytest.raises(LogError, match=rf"run.json: .*{message}"):
        read_run(log.directory)


def test_clients_with_the_same_id_are_an_error(
    tmp_path: Path, info: Callable[..., RunInfo]
) -> None:
    twice = replace(info(), clients=[ClientEntry(0, None, None, 1, 1, 1)] * 2)
    with pytest.raises(LogError, match="clients with different ids"):
        RunLog.create(tmp_path, twice)


def test_truncating_keeps_earlier_rounds_and_drops_a_torn_line(
    two_rounds: RunLog, record: Callable[..., RoundRecord]
) -> None:
    with open(two_rounds.path, "ab") as file:
        file.write(b'{"format":1,"round":2')
    log = RunLog.open(two_rounds.directory)
    log.truncate_to(1)
    assert [r.round for r in read_run(log.directory).rounds] == [0]
    log.append(replace(record(1), loss=0.75))
    run = read_run(log.directory)
    assert [r.loss for r in run.rounds] == [0.25, 0.75] and run.notes == []


def test_appending_after_a_torn_line_is_refused(
    two_rounds: RunLog, record: Callable[..., RoundRecord]
) -> None:
    with open(two_rounds.path, "ab") as file:
        file.write(b"{")
    with pytest.raises(LogError, match=r"torn; call truncate_to"):
        two_rounds.append(record(2))


def test_the_writer_refuses_what_no_reader_would_accept(log: RunLog) -> None:
    with pytest.raises(LogError, match=r"round 0: field 'held' names client 7"):
        log.append(replace(FULL, held={7: [[0]]}))
    assert log.path.read_bytes() == b""


def test_a_log_is_not_started_over_another(log: RunLog) -> None:
    with pytest.raises(FileExistsError, match="resume it, or choose another directory"):
        RunLog.create(log.directory, log.info)


def test_numbers_from_numpy_and_a_loss_that_diverged_can_be_written(log: RunLog) -> None:
    log.append(
        replace(
            FULL,
            bytes_down=np.int64(300),  # type: ignore[arg-type]
            loss=float("inf"),
            count={np.int64(0): np.array([[1, 2, 3, 4]])},  # type: ignore[dict-item]
            global_accuracy=np.float32(0.5),  # type: ignore[arg-type]
        )
    )
    read = read_run(log.directory).rounds[0]
    assert read.loss is None and read.count == {0: ((1, 2, 3, 4),)}
    assert (read.bytes_down, read.global_accuracy) == (300, 0.5)


def test_a_count_may_have_zeros_behind_a_short_layer(
    tmp_path: Path, info: Callable[..., RunInfo]
) -> None:
    log = RunLog.create(tmp_path, info(num_experts_L=[4, 2]))
    log.append(
        replace(FULL, held={0: [[0], [1]]}, count={0: [[1, 0, 0, 0], [0, 5, 0, 0]]}, changes=[])
    )
    assert len(read_run(tmp_path).rounds) == 1


def test_runs_come_by_method_then_seed(
    tmp_path: Path,
    info: Callable[..., RunInfo],
    on_disk: Callable[[list[Run], Path], None],
) -> None:
    runs = [Run(info(m, seed), []) for m, seed in [("b", 10), ("b", 2), ("a", 1)]]
    on_disk(runs, tmp_path)
    found = [(r.info.method, r.info.seed) for r in read_runs(tmp_path)]
    assert found == [("a", 1), ("b", 2), ("b", 10)]
    assert [r.info.seed for r in read_runs(tmp_path / "b-seed2")] == [2]


def test_a_place_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run"):
        read_runs(tmp_path)


OTHERS = Others(998, 4000, 100, None, "0123456789abcdef")


def test_clients_that_are_not_listed_are_told_in_sum(
    tmp_path: Path, info: Callable[..., RunInfo], record: Callable[..., RoundRecord]
) -> None:
    log = RunLog.create(tmp_path / "run", replace(info(rounds=3), others=OTHERS))
    log.append(replace(record(0), clients=[1, 700], held={700: [[1]]}))
    run = read_run(tmp_path / "run")
    assert run.info.others == OTHERS and run.info.num_clients == 1000
    assert run.rounds[0].clients == (1, 700)


def test_where_all_clients_are_listed_a_round_may_name_no_other(
    log: RunLog, record: Callable[..., RoundRecord]
) -> None:
    with pytest.raises(LogError, match="'clients' names client 700, not in run.json"):
        log.append(replace(record(0), clients=[700]))
    assert log.info.num_clients == 2


def test_a_run_without_word_of_others_lists_all(log: RunLog) -> None:
    path = log.directory / "run.json"
    raw = json.loads(path.read_text())
    assert raw.pop("others") is None
    path.write_text(json.dumps(raw))
    assert read_run(log.directory).info.others is None
