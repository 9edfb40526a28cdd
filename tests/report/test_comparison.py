"""The comparison from rows alone: targets, leads and the Markdown, by hand."""

from __future__ import annotations

import pytest

from fedmoe.report.comparison import (
    by_protocol,
    bytes_to,
    comparison_markdown,
    facts,
    leads,
    leads_table,
    target_of,
    with_target,
)
from fedmoe.report.log import Run
from fedmoe.report.measures import Row
from fedmoe.report.paired import paired_over_clients, paired_over_seeds
from fedmoe.report.rows import full_row


def row(method: str, seed: int, end: float, **changed: object) -> Row:
    """A run that has 0.4 after 100 bytes, 0.7 after 200 and `end` after 300; two clients."""
    course = [(0, 100, 0.4), (10, 200, 0.7), (20, 300, end)]
    return {
        "protocol": "p",
        "method": method,
        "seed": seed,
        "rounds": 20,
        "rounds_done": 20,
        "personal_mean": end,
        "bytes_total": 330,
        "partition_hash": f"part{seed}",
        "num_clients": 2,
        "clients_evaluated": 2,
        "num_test": 500,
        "num_classes": 10,
        "num_experts_L": [16],
        "chosen_by_client": {"0": end + 0.1, "1": end - 0.1},
        "curve": [{"round": r, "bytes": b, "chosen": a} for r, b, a in course],
        **changed,
    }


def rows() -> list[Row]:
    """a ends at 0.8, 0.8, 0.8; b at 0.7, 0.6, 0.5; the control c at 0.9."""
    ends = {"a": (0.8, 0.8, 0.8), "b": (0.7, 0.6, 0.5), "c": (0.9, 0.9, 0.9)}
    return [
        row(method, seed, end, control=method == "c")
        for method, own in ends.items()
        for seed, end in enumerate(own)
    ]


def test_the_target_is_a_share_of_the_best_method_and_controls_set_none() -> None:
    target = target_of(rows())
    assert target is not None
    assert (target.best_method, target.best) == ("a", pytest.approx(0.8))
    assert target.accuracy == pytest.approx(0.76)  # 0.95 * 0.8
    assert target_of([row("a", 0, 0.5, personal_mean=None)]) is None


@pytest.mark.parametrize("share", [0, -1, 1.01])
def test_a_share_that_is_none_is_an_error(share: float) -> None:
    with pytest.raises(ValueError, match="share must be above 0 and at most 1, got"):
        target_of(rows(), share)


@pytest.mark.parametrize(
    "accuracy, traffic", [(0.3, 100), (0.4, 100), (0.41, 200), (0.8, 300), (0.81, None)]
)
def test_the_first_evaluation_at_or_above_the_target_counts(
    accuracy: float, traffic: int | None
) -> None:
    assert bytes_to(row("a", 0, 0.8), accuracy) == traffic


def test_an_evaluation_without_the_accuracy_is_passed_over() -> None:
    curve = [{"round": 0, "bytes": 1, "chosen": None}, {"round": 1, "bytes": 2, "chosen": 0.9}]
    assert bytes_to(row("a", 0, 0.9, curve=curve), 0.5) == 2


def test_a_method_reaches_the_target_only_if_all_its_seeds_do() -> None:
    own = [row("a", s, 0.8) for s in range(3)]
    own += [row("b", s, end) for s, end in enumerate((0.8, 0.8, 0.72))]
    lines = comparison_markdown(own, "a").splitlines()
    head, _, a, b = ([cell.strip() for cell in line.split("|")] for line in lines[4:8])
    column = head.index("To target MiB")
    assert (a[1], b[1]) == ("a", "b") and a[column] != "-" and b[column] == "-"
    reached = [r["bytes_to_target"] for r in with_target(own, target_of(own))]
    assert reached == [300] * 5 + [None]


def test_a_lead_is_paired_by_seed_and_by_client() -> None:
    b, c = leads(rows(), "a")
    assert (b.method, b.control, c.method, c.control) == ("b", False, "c", True)
    assert b.over_seeds is not None and b.over_clients is not None
    assert b.over_seeds.mean == pytest.approx(0.2)  # (0.1 + 0.2 + 0.3) / 3
    # standard deviation 0.1, t of 2 degrees 4.303: 4.303 * 0.1 / sqrt(3)
    assert b.over_seeds.high == pytest.approx(0.2 + 0.24843, abs=1e-5)
    assert (b.over_clients.num_pairs, b.over_clients.mean) == (6, pytest.approx(0.2))


def test_leads_from_rows_are_those_of_their_logs(few_runs: list[Run]) -> None:
    by_method: dict[str, list[Run]] = {}
    for run in few_runs:
        by_method.setdefault(run.info.method, []).append(run)
    found = {x.method: x for x in leads([full_row(run, "p") for run in few_runs], "fedmoe")}
    assert found.keys() == {"fedavg", "local"}
    for method, lead in found.items():
        own = by_method["fedmoe"], by_method[method]
        assert lead.over_seeds == paired_over_seeds(*own)
        exact = paired_over_clients(*own)
        assert lead.over_clients is not None and exact.low is not None
        assert lead.over_clients.mean == pytest.approx(exact.mean, abs=1e-4)
        assert lead.over_clients.low == pytest.approx(exact.low, abs=1e-4)


def test_a_lead_over_a_method_of_another_size_is_drawn_and_marked() -> None:
    changed = [{**r, "num_experts_L": [32]} if r["method"] == "b" else r for r in rows()]
    found = {lead.method: lead for lead in leads(changed, "a")}
    assert found["b"].over_seeds is not None
    assert {m: lead.mark for m, lead in found.items()} == {"b": "§", "c": "‡"}
    assert "| b§ | **+20.00**" not in leads_table(leads(changed, "a"), "a")  # 0 within its interval
    assert "| b§ | +20.00 |" in leads_table(leads(changed, "a"), "a")


@pytest.mark.parametrize(
    "change, why",
    [
        ({"partition_hash": "elsewhere"}, "partitioned differently"),
        ({"closed": False}, "Not all rounds are done"),
        ({"personal_mean": None}, "must share a seed that measured personal_mean"),
    ],
)
def test_no_lead_is_drawn_where_the_two_do_not_compare(change: Row, why: str) -> None:
    changed = [{**r, **change} if r["method"] == "b" else r for r in rows()]
    b, c = leads(changed, "a")
    assert b.over_seeds is None and why in b.why_not
    assert c.over_seeds is not None  # the others still compare
    assert f"- No difference to b: {b.why_not}" in comparison_markdown(changed, "a")


def test_methods_with_the_same_reason_share_its_line() -> None:
    fewer = [r for r in rows() if r["method"] == "a" or r["seed"] == 0]
    other = [{**r, "method": "d"} for r in rows() if r["method"] == "b"]
    table = leads_table(leads([*fewer, *other], "a"), "a")
    assert "| b |" not in table and "| d | +20.00 |" in table
    assert table.endswith(
        "\n\n- No difference to b, c: Fewer than 3 seeds: differences may be luck, "
        "so none is marked as best."
    )


def test_from_two_seeds_no_lead_is_drawn() -> None:
    two = [r for r in rows() if r["seed"] < 2]
    assert all(x.over_seeds is None and "Fewer than 3 seeds" in x.why_not for x in leads(two, "a"))
    assert "a less" not in comparison_markdown(two, "a")


def test_a_reference_that_did_not_run_leads_nobody() -> None:
    assert leads(rows(), "z") == []


def test_markdown_has_a_section_for_each_protocol_with_table_target_and_leads() -> None:
    published = {"protocol": "q", "method": "theirs", "published": True, "personal_mean": 0.99}
    both = [*rows(), *({**r, "protocol": "q"} for r in rows()), published]
    assert [len(own) for own in by_protocol(both).values()] == [9, 10]
    text = comparison_markdown(both, "a")
    first, second = text.split("## q")
    assert first.startswith("## p\n\n2 clients, 20 rounds. Partition `part0` (seed 0), `part1`")
    for lines in (first.splitlines(), second.splitlines()):
        assert any(line.startswith("| a | 3 | **80.0 ± 0.0**") for line in lines)
        assert any(line.startswith("| c‡ | 3 | 90.0 ± 0.0") for line in lines)
        assert "| b | +20.00 | -4.84 to +44.84 | +10.61 to +29.39 | 3 |" in lines
        assert "| c‡ | **-10.00** | -10.00 to -10.00 | -10.00 to -10.00 | 3 |" in lines
        assert any(
            line.startswith("Target: 76.0 %, 95 % of what the best method, a, has at the end (80.0")
            for line in lines
        )
    assert "theirs†" not in first and "| theirs† | 1 | 99.0 |" in second
    assert "after 0, 10 and 20 rounds" in text


def test_facts_name_every_partition_once() -> None:
    same = [row("a", s, 0.8, partition_hash="one", rounds=20 + s) for s in range(3)]
    assert facts(same) == "2 clients, 20 to 22 rounds. Partition `one` (seeds 0, 1, 2)."
