from __future__ import annotations

import pytest
import torch

from fedmoe.data.vowels import load_vowels, parse_vowels


def text(num_speakers: int = 2) -> str:
    """Rows as Deterding's file has them; features say speaker, repetition and vowel."""
    rows = [
        [0, speaker, speaker % 2, speaker, repetition, vowel, *[0.5] * 7, vowel]
        for speaker in range(num_speakers)
        for repetition in range(6)
        for vowel in range(11)
    ]
    return "\n".join(", ".join(map(str, row)) for row in rows)


def test_columns_are_split_speaker_sex_ten_features_and_class():
    x_ND, y_N, speaker_N, woman_N = parse_vowels(text())
    assert (x_ND.shape, x_ND.dtype) == ((132, 10), torch.float32)
    assert x_ND[66 + 11 * 4 + 3].tolist() == [1, 4, 3, *[0.5] * 7]
    assert y_N.tolist() == [*range(11)] * 12
    assert speaker_N.tolist() == [0] * 66 + [1] * 66
    assert woman_N.tolist() == [False] * 66 + [True] * 66


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: "", "14 numbers .* got no rows"),
        (lambda t: t + ", 1", "each row must have 14 numbers .* got 15 in row 131"),
        (lambda t: t.rpartition("\n")[0], "speaker 1 must say .* 6 times, got 65 rows"),
        (lambda t: t.replace(", 10\n", ", 9\n", 1), r"speaker 0 must say .* starting \[0, 1.* 9\]"),
    ],
)
def test_rows_of_another_form_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        parse_vowels(change(text()))


def test_another_file_of_that_name_is_refused(tmp_path):
    (tmp_path / "vowel-context.data").write_text(text())
    with pytest.raises(ValueError, match="vowel-context.data: .* SHA-256 2e95c7.* 990 rows"):
        load_vowels(tmp_path)


def test_the_real_vowels_are_whole(real_vowels):
    x_ND, y_N, speaker_N, woman_N = real_vowels
    assert x_ND.shape == (990, 10)
    assert torch.bincount(speaker_N).tolist() == [66] * 15
    assert torch.bincount(y_N).tolist() == [90] * 11
    assert len(speaker_N[woman_N].unique()) == 7
    assert x_ND[0, :3].tolist() == pytest.approx([-3.639, 0.418, -0.670])
