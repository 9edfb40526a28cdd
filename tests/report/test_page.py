"""The page as a file: whole, self-contained, the same each time, and safe to open."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedmoe.report.log import ClientEntry, RoundRecord, Run, RunInfo
from fedmoe.report.page import render_report, write_report
from fedmoe.types import ClientFailure


@pytest.fixture(scope="module")
def page(few_runs: list[Run]) -> str:
    return render_report(few_runs)


def without_plotly(page: str) -> str:
    """The page less the longest script, which is not ours."""
    scripts = re.findall(r"<script>.*?</script>", page, re.DOTALL)
    return page.replace(max(scripts, key=len), "")


def test_the_page_asks_for_nothing_from_elsewhere(page: str) -> None:
    own = without_plotly(page)
    assert len(own) < len(page) / 2
    assert re.findall(r"https?://|//[a-z]+\.|@import|url\(", own) == []
    assert set(re.findall(r"""(?:src|href)=["']?([^"'# >]*)""", own)) <= {"", "data:,"}
    assert "default-src 'none'" in own


@pytest.mark.slow
def test_the_same_runs_give_the_same_page(few_runs: list[Run], page: str) -> None:
    assert render_report(list(reversed(few_runs))) == page


def test_the_page_shows_what_the_table_says(page: str) -> None:
    for words in ("four-domains", "9f31c07ab2e0", "torch 2.13.0", "fedavg", "How to read this"):
        assert words in page
    assert "24 clients" not in page and "8 clients in 4 groups" in page
    assert "Is fedmoe ahead?" in page


@pytest.mark.slow
def test_no_difference_is_claimed_from_one_seed(few_runs: list[Run]) -> None:
    text = render_report([run for run in few_runs if run.info.seed == 0])
    assert "Fewer than 3 seeds" in text and "ahead?" not in text


def test_every_figure_says_how_to_read_it(page: str) -> None:
    assert page.count("<figure>") == 7
    assert page.count("How to read this") >= page.count("<figure>")
    assert page.count('role="img"') == page.count("<figure>")


def test_names_cannot_write_into_the_page(
    info: Callable[..., RunInfo], record: Callable[..., RoundRecord]
) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    bad = replace(
        info(evil),
        experiment=evil,
        versions={evil: evil},
        clients=[ClientEntry(0, evil, None, 1, 1, 1)],
    )
    failed = replace(record(0), failed=[ClientFailure(0, evil)], held={0: [[0]]})
    text = render_report([Run(bad, [failed], [evil])])
    assert evil not in text
    assert "<img" not in without_plotly(text) and "<script>alert" not in without_plotly(text)


def test_a_run_that_just_started_has_a_page(info: Callable[..., RunInfo]) -> None:
    text = render_report([Run(info(), [])])
    assert "<h1>tiny</h1>" in text and "<figure>" not in text


def test_a_model_without_experts_has_no_figures_of_experts(few_runs: list[Run]) -> None:
    rounds = [replace(r, held={}, count={}, changes=[]) for r in few_runs[0].rounds]
    dense = Run(replace(few_runs[0].info, num_experts_L=()), rounds)
    text = render_report([dense])
    assert text.count("<figure>") == 3


def test_a_torn_log_is_mentioned(info: Callable[..., RunInfo]) -> None:
    torn = Run(info(), [], ["rounds.jsonl, line 9: torn, left out"])
    assert "rounds.jsonl, line 9: torn, left out" in render_report([torn])


def test_no_runs_make_no_page() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        render_report([])


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_page_that_cannot_be_finished_leaves_the_old_one(
    tmp_path: Path, info: Callable[..., RunInfo], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "deep" / "report.html"
    write_report([Run(info("one"), [])], path)
    before = path.read_bytes()

    def full_disk(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(OSError, match="no space"):
        write_report([Run(info("other"), [])], path)
    assert path.read_bytes() == before
