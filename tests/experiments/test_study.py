import pytest

from fedmoe.experiments.run import Spec
from fedmoe.experiments.study import folder_of, is_finished, run_study
from fedmoe.report.log import read_run

pytestmark = pytest.mark.slow


def jobs(target, root, methods=("fedavg", "local"), rounds=2):
    specs = [Spec(target, m, 0, rounds) for m in methods]
    return [(s, folder_of(root, s)) for s in specs]


def test_runs_side_by_side_finish_and_are_not_run_again(tiny_target, tmp_path):
    todo = jobs(tiny_target, tmp_path)
    seen = []
    first = run_study(todo, 2, watch=seen.append, every_s=0.1)
    assert [p.done for p in first] == [True, True]
    assert [p.rounds_done for p in first] == [3, 3]  # two rounds and the closing evaluation
    assert all(p.error is None for p in first) and seen[-1] == first
    before = {f: (f / "rounds.jsonl").stat().st_mtime_ns for _, f in todo}
    assert run_study(todo, 2)[0].done
    assert before == {f: (f / "rounds.jsonl").stat().st_mtime_ns for _, f in todo}


def test_a_run_is_the_same_beside_others_and_alone(tiny_target, tmp_path):
    together = jobs(tiny_target, tmp_path / "a", ("fedmoe", "fedavg"))
    run_study(together, 2)
    [alone] = jobs(tiny_target, tmp_path / "b", ("fedmoe",))
    run_study([alone], 1)
    hashes = [[r.model_hash for r in read_run(f).rounds] for f in (together[0][1], alone[1])]
    assert hashes[0] == hashes[1]


def test_a_run_that_fails_is_told_by_its_error_and_does_not_stop_the_others(tiny_target, tmp_path):
    target = tiny_target.replace(":tiny", ":broken")
    bad, good = run_study(jobs(target, tmp_path, ("fedmoe", "fedavg")), 2)
    assert bad.error is not None and "memory_bytes must be at least" in bad.error
    assert not bad.done and good.done and good.error is None


def test_two_runs_cannot_share_a_folder(tiny_target, tmp_path):
    spec = Spec(tiny_target, "fedavg", 0, 2)
    with pytest.raises(ValueError, match="folder of its own"):
        run_study([(spec, tmp_path), (spec, tmp_path)], 1)


def test_a_folder_without_a_run_is_not_finished(tmp_path):
    assert not is_finished(tmp_path)
