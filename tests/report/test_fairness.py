"""What is said under a table, and when nothing is marked as best."""

from __future__ import annotations

import pytest

from fedmoe.report.fairness import comparison_notes, refused
from fedmoe.report.measures import Row


def row(method: str, seed: int, **changed: object) -> Row:
    return {
        "protocol": "p",
        "method": method,
        "seed": seed,
        "rounds": 10,
        "rounds_done": 10,
        "personal_mean": 0.8,
        "global": 0.6,
        "partition_hash": f"part{seed}",
        "num_clients": 5,
        "clients_evaluated": 5,
        "num_test": 500,
        "num_classes": 10,
        "num_experts_L": [16],
        "experts_held_mean": 4.0,
        "rounds_exploring": 0,
        "bytes_once": 0,
        **changed,
    }


def rows(**changed_in_b: object) -> list[Row]:
    """Two methods, three seeds, all fair; then method b changed."""
    return [row("a", s) for s in range(3)] + [row("b", s, **changed_in_b) for s in range(3)]


def texts(given: list[Row]) -> str:
    return " | ".join(note.text for note in comparison_notes(given))


def test_a_fair_comparison_needs_no_words() -> None:
    assert comparison_notes(rows()) == []


@pytest.mark.parametrize(
    "change, words",
    [
        ({"partition_hash": "elsewhere"}, "partitioned differently for the same seed (0)"),
        ({"rounds_exploring": 2}, "One-off bytes of exploring are missing (b)"),
        ({"closed": False}, "Not all rounds are done (b seed 0: no closing evaluation;"),
        ({"rounds_done": 4}, "Not all rounds are done (b seed 0: 4 of 10;"),
    ],
)
def test_an_unfair_comparison_is_refused(change: Row, words: str) -> None:
    given = rows(**change)
    assert words in texts(given)
    assert refused(comparison_notes(given))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"global": 0.11}, "b: its merged model is at chance level (11.0 % with 10 classes)"),
        ({"personal_mean": 0.12}, "b: its clients' models are at chance level (12.0 %"),
        ({"experts_held_mean": 16.0}, "holds about as many experts as a 4.0, b 16.0"),
        ({"clients_evaluated": 4}, "Not every client was measured at the end (b seed 0: 4 of 5;"),
        ({"rounds": 20, "rounds_done": 20}, "different numbers of rounds"),
    ],
)
def test_a_doubtful_comparison_is_flagged_and_not_refused(change: Row, words: str) -> None:
    given = rows(**change)
    assert words in texts(given)
    assert not refused(comparison_notes(given))


def test_a_method_of_another_size_is_named_and_the_others_are_still_compared() -> None:
    given = rows() + [row("mix", s, num_experts_L=[4], experts_held_mean=2.0) for s in range(3)]
    [note] = comparison_notes(given)
    assert note.text.startswith("Methods marked § have other experts per layer than the usual [16]")
    assert "mix [4]" in note.text and not note.refuses


def test_fewer_than_three_seeds_are_too_few() -> None:
    given = [r for r in rows() if r["seed"] < 2]
    assert "Fewer than 3 seeds (a 2, b 2)" in texts(given)
    assert refused(comparison_notes(given))


def test_many_methods_with_few_seeds_are_not_all_named() -> None:
    given = [row(f"m{i}", 0) for i in range(9)]
    assert "Fewer than 3 seeds (all 9 methods): differences" in texts(given)


def test_one_method_alone_is_not_a_comparison() -> None:
    assert comparison_notes([row("a", 0)]) == []


def test_different_partitions_for_different_seeds_are_as_they_should_be() -> None:
    assert len({r["partition_hash"] for r in rows()}) == 3
    assert comparison_notes(rows()) == []


def test_methods_with_different_seeds_are_flagged() -> None:
    given = [row("a", s) for s in range(3)] + [row("b", s) for s in range(1, 4)]
    assert "ran with different seeds" in texts(given)


def test_few_test_examples_make_chance_wider() -> None:
    # 2 standard errors of guessing 1 in 10 on 36 examples: 2 * sqrt(0.09 / 36) = 0.1
    assert "chance" in texts(rows(num_test=36, **{"global": 0.199}))
    assert "chance" not in texts(rows(num_test=36, **{"global": 0.201}))


def test_a_task_without_classes_has_no_chance_level() -> None:
    assert comparison_notes(rows(num_classes=None, **{"global": 0.01})) == []


def test_a_matched_control_answers_the_doubt_about_size() -> None:
    control = [row("c", s, experts_held_mean=16.5) for s in range(3)]
    given = rows(experts_held_mean=16.0)
    assert "a 4.0" in texts(given + control) and "b 16.0" not in texts(given + control)


def test_published_rows_are_marked_and_never_judged() -> None:
    published = {"protocol": "p", "method": "paper", "published": True, "personal_mean": 0.1}
    notes = comparison_notes([*rows(), published])
    assert [n.text for n in notes] == ["Rows marked † are published figures from another set-up."]
