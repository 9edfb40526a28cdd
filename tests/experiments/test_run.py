import json
import shutil
from dataclasses import replace

import pytest
import torch

from fedmoe.checkpoint import content_hash, newest_checkpoint
from fedmoe.experiments import run as run_module
from fedmoe.experiments.experiment import with_budgets
from fedmoe.experiments.memory import peak_bytes
from fedmoe.experiments.run import Spec, merged_accuracy, run_experiment, versions, without
from fedmoe.federated.fedavg import ServerState
from fedmoe.federated.fedmoe import FedMoE, FedMoEState
from fedmoe.federated.local import fedper, private_router
from fedmoe.federated.per_group import PerGroup
from fedmoe.federated.rounds import Schedule
from fedmoe.federated.select import memory_for
from fedmoe.report.log import read_run
from fedmoe.state import everything, is_expert, is_gate, rows_of, split_state, state_hash
from fedmoe.types import Assignment, ClientFailure, ExpertId, Job
from fedmoe.wire.codecs import TopK
from fedmoe.wire.messages import message_bytes
from fedmoe.wire.packing import Codecs
from tests.tiny import experiment, federated_data, tiny


def is_stem(name):
    return name.startswith("stem.")


def fedavg():
    return experiment()


def fedmoe():
    """FedMoE on devices of two sizes, with all that it may do, and a personal stem."""
    base = experiment()
    return replace(
        base,
        method="fedmoe",
        strategy=FedMoE(smooth_over=1, patience=1),
        clients=with_budgets(base.data, split_state(tiny()), (0.25, 0.5)),
        plan=fedper(is_stem, base.plan),
        schedule=Schedule(3, seed=5, clients_per_round=3, evaluate_every=2),
    )


def records(folder):
    """The log without what no two runs share."""
    return [replace(r, seconds=0.0) for r in read_run(folder).rounds]


def own_files(folder):
    paths = sorted((folder / "personal").rglob("*.safetensors"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


# The log


def test_the_log_of_a_run_is_complete(tmp_path):
    e = fedavg()
    digest = run_experiment(e, tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert not run.notes
    info = run.info
    assert (info.experiment, info.method, info.seed, info.rounds) == ("tiny", "fedavg", 0, 3)
    assert (info.num_experts_L, info.num_classes) == ((4,), 2)
    assert info.partition_hash == "tiny-partition"
    assert info.versions["torch"] == versions()["torch"] != "not installed"
    assert [(c.id, c.group, c.num_train, c.num_validation, c.num_test) for c in info.clients] == [
        (k, "odd" if k % 2 else "even", 12, 6, 6) for k in range(4)
    ]
    model = split_state(tiny())
    assert info.model_parameters == sum(p.numel() for p in tiny().parameters())
    assert [(r.round, r.phase) for r in run.rounds] == [
        (0, "train"), (1, "train"), (2, "train"), (3, "final")
    ]
    whole = frozenset(model.experts)
    down = message_bytes(Assignment(0, model, whole))
    for r in run.rounds:
        assert list(r.clients) == [0, 1, 2, 3] and not r.failed and not r.refused
        assert r.bytes_down == 4 * down and r.bytes_up > 0
        assert r.bytes_once == 0 and r.seconds > 0 and r.loss > 0
        assert {c: [list(x) for x in held] for c, held in r.held.items()} == {
            c: [[0, 1, 2, 3]] for c in range(4)
        }
        assert set(r.memory_bytes.values()) == {peak_bytes(e, whole)}
        for a in r.accuracy.values():
            shares = (a.received_validation, a.received_test, a.trained_validation, a.trained_test)
            assert all(share is not None and 0 <= share <= 1 for share in shares)
    for r in run.rounds[:3]:
        assert all(sum(count[0]) == 12 for count in r.count.values())  # 1 epoch of 12 examples
        assert r.global_accuracy is None
    assert not any(any(count[0]) for count in run.rounds[3].count.values())
    assert run.rounds[3].global_accuracy is not None
    assert run.rounds[2].model_hash == run.rounds[3].model_hash == digest
    assert len({r.model_hash for r in run.rounds}) == 3


def test_the_last_checkpoint_is_the_state_that_the_hash_is_of(tmp_path):
    digest = run_experiment(fedavg(), tmp_path)
    round, state = newest_checkpoint(tmp_path / "checkpoints", ServerState, pytest.fail)
    assert round == 3 and content_hash(state) == digest


def test_what_is_evaluated_is_the_model_as_the_round_began(tmp_path):
    e, wanted, logged = fedavg(), [], []

    def see(record):
        _, state = newest_checkpoint(tmp_path / "checkpoints", ServerState, pytest.fail)
        wanted.append(merged_accuracy(e, state.model))  # for the next round
        shares = [a.received_test for a in record.accuracy.values()]
        logged.append(sum(shares) / len(shares))

    run_experiment(e, tmp_path, on_round=see)
    assert logged == pytest.approx([merged_accuracy(e, split_state(tiny())), *wanted[:3]])
    assert read_run(tmp_path).rounds[-1].global_accuracy == pytest.approx(wanted[2])
    assert len(set(logged)) > 1


def test_a_run_of_fedmoe_logs_its_phases_choices_and_one_off_bytes(tmp_path):
    run_experiment(fedmoe(), tmp_path)
    rounds = read_run(tmp_path).rounds
    assert [r.phase for r in rounds] == ["explore", "train", "train", "final"]
    assert rounds[0].bytes_once == rounds[0].bytes_down > 0
    assert all(r.bytes_once == 0 for r in rounds[1:])
    assert rounds[0].loss is None and rounds[0].accuracy is None and not rounds[0].memory_bytes
    chosen = {c.client for r in rounds for c in r.changes if c.action == "choose"}
    assert chosen == {0, 1, 2, 3}
    limit = {c.id: c.memory_bytes for c in fedmoe().clients}
    model = split_state(tiny())
    for r in rounds[1:]:
        for client, [numbers] in r.held.items():
            part = frozenset(ExpertId(0, e) for e in numbers)
            held = memory_for(model.only(part), 1.0) if part else 0
            assert held <= limit[client]
    assert set(rounds[-1].accuracy) == {0, 1, 2, 3}
    assert rounds[-1].global_accuracy is None  # the stem is everybody's own


def test_failures_and_refusals_are_logged_and_strangers_complained_of(tmp_path, monkeypatch):
    real = run_module.in_process

    def spoiled(*args, **kwargs):
        inner = real(*args, **kwargs)

        def exchange(assignments):
            for reply in inner(assignments):
                if reply.client == 1:
                    yield ClientFailure(1, "out of memory")
                elif reply.client == 2:
                    yield replace(reply, num_examples=0)
                    yield replace(reply, client=99)
                    yield ClientFailure(98, "client 98: who is that?")
                else:
                    yield reply

        return exchange

    monkeypatch.setattr(run_module, "in_process", spoiled)
    said = []
    run_experiment(fedavg(), tmp_path, complain=said.append)
    for r in read_run(tmp_path).rounds:
        assert [(f.client, f.reason) for f in r.failed] == [(1, "out of memory")]
        assert [f.client for f in r.refused] == [2]
        assert sorted(r.accuracy) == sorted(r.memory_bytes) == [0, 3]
    assert len(said) == 2 * 4
    assert any("client 99: was not asked this round" in line for line in said)


@pytest.mark.parametrize(
    "change, shown",
    [
        (lambda e: e, True),
        (lambda e: replace(e, plan=fedper(is_stem, e.plan)), False),
        (lambda e: replace(e, plan=private_router(e.plan)), False),
        (lambda e: replace(e, plan=replace(e.plan, personal=everything)), False),
        (lambda e: replace(e, strategy=PerGroup(e.data.groups)), False),
    ],
    ids=["shared", "stem", "router", "everything", "per group"],
)
def test_there_is_a_global_accuracy_just_where_there_is_one_model_for_all(tmp_path, change, shown):
    run_experiment(change(fedavg()).shortened(1), tmp_path)
    assert (read_run(tmp_path).rounds[-1].global_accuracy is not None) == shown


# The same again


@pytest.mark.parametrize("make", [fedavg, fedmoe], ids=lambda m: m.__name__)
def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path, make):
    e = make()
    one = run_experiment(e, tmp_path / "one")
    assert run_experiment(make(), tmp_path / "two") == one
    assert records(tmp_path / "one") == records(tmp_path / "two")
    assert own_files(tmp_path / "one") == own_files(tmp_path / "two")
    other = replace(e, schedule=replace(e.schedule, seed=e.schedule.seed + 1))
    assert run_experiment(other, tmp_path / "three") != one


def test_the_global_generators_do_not_matter(tmp_path):
    torch.manual_seed(1)
    one = run_experiment(fedmoe(), tmp_path / "one")
    torch.manual_seed(2)
    assert run_experiment(fedmoe(), tmp_path / "two") == one


# Going on


class Killed(BaseException):
    pass


def killer(at):
    """A function whose call number `at`, from 0, is the process's last."""
    calls = iter(range(1_000_000))

    def kill(*_):
        if next(calls) == at:
            raise Killed

    return kill


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    calls = {"on_client": 0, "on_round": 0}

    def count(name):
        def call(_):
            calls[name] += 1

        return call

    hooks = {name: count(name) for name in calls}
    return folder, run_experiment(fedmoe(), folder, **hooks), calls


def assert_goes_on(folder, expected, digest):
    assert run_experiment(fedmoe(), folder, resume=True, complain=pytest.fail) == digest
    assert records(folder) == records(expected)
    assert own_files(folder) == own_files(expected)
    names = [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (folder, expected)]
    assert names[0] == names[1]
    assert not list(folder.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["on_client", "on_round"])
def test_a_run_that_is_killed_anywhere_ends_like_one_that_was_not(undisturbed, tmp_path, hook):
    expected, digest, calls = undisturbed
    assert calls[hook] >= 4
    for at in range(calls[hook]):
        folder = tmp_path / str(at)
        with pytest.raises(Killed):
            run_experiment(fedmoe(), folder, **{hook: killer(at)})
        assert_goes_on(folder, expected, digest)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["save_checkpoint", "_record"])
def test_a_run_that_is_killed_between_a_round_and_its_checkpoint_ends_like_one_that_was_not(
    undisturbed, tmp_path, monkeypatch, name
):
    expected, digest, _ = undisturbed
    real = getattr(run_module, name)
    for at in range(fedmoe().schedule.rounds):
        kill, folder = killer(at), tmp_path / str(at)

        def before(*args, kill=kill):
            kill()
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(run_module, name, before)
            with pytest.raises(Killed):
                run_experiment(fedmoe(), folder)
        assert_goes_on(folder, expected, digest)


@pytest.mark.slow
def test_a_run_that_is_killed_at_every_client_still_gets_through(undisturbed, tmp_path):
    expected, digest, _ = undisturbed
    kills = 0
    for at in [0, 1, 2, 5, 0, 3, 4, 1, 7, 2]:
        try:
            run_experiment(fedmoe(), tmp_path, resume=True, on_client=killer(at))
        except Killed:
            kills += 1
    assert kills >= 5
    assert_goes_on(tmp_path, expected, digest)


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [1, 2])
def test_a_run_with_damaged_checkpoints_goes_back_and_ends_the_same(undisturbed, tmp_path, damaged):
    expected, digest, _ = undisturbed
    folder = tmp_path / "run"
    shutil.copytree(expected, folder)
    for path in sorted((folder / "checkpoints").iterdir())[-damaged:]:
        (path / "state.safetensors").write_bytes(b"damage")
    said = []
    assert run_experiment(fedmoe(), folder, resume=True, complain=said.append) == digest
    assert len(said) == damaged and all("falling back" in line for line in said)
    assert records(folder) == records(expected)
    assert own_files(folder) == own_files(expected)


def test_without_any_whole_checkpoint_a_run_begins_again_and_ends_the_same(undisturbed, tmp_path):
    expected, digest, _ = undisturbed
    folder = tmp_path / "run"
    shutil.copytree(expected, folder)
    for path in (folder / "checkpoints").rglob("state.json"):
        path.unlink()
    with pytest.raises(Killed):  # and is killed once more on its way
        run_experiment(fedmoe(), folder, resume=True, on_round=killer(1))
    assert_goes_on(folder, expected, digest)


def test_a_torn_last_line_of_the_log_is_written_again(undisturbed, tmp_path):
    expected, digest, _ = undisturbed
    folder = tmp_path / "run"
    shutil.copytree(expected, folder)
    log = folder / "rounds.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    assert_goes_on(folder, expected, digest)


def test_a_finished_run_may_be_resumed_and_is_the_same(undisturbed, tmp_path):
    expected, digest, _ = undisturbed
    folder = tmp_path / "run"
    shutil.copytree(expected, folder)
    assert_goes_on(folder, expected, digest)


def test_resuming_where_there_is_nothing_begins(tmp_path):
    assert run_experiment(fedavg(), tmp_path / "new", resume=True) == run_experiment(
        fedavg(), tmp_path / "other"
    )


# What is refused


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run_experiment(fedavg().shortened(1), tmp_path)
    before = (tmp_path / "rounds.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="a run was started here"):
        run_experiment(fedavg().shortened(1), tmp_path)
    assert (tmp_path / "rounds.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda e: replace(e, name="other"), "experiment tiny, got other"),
        (lambda e: replace(e, method="other"), "method fedavg, got other"),
        (lambda e: replace(e, schedule=replace(e.schedule, seed=1)), "seed 0, got 1"),
        (lambda e: e.shortened(9), "rounds 1, got 9"),
        (lambda e: replace(e, clients=e.clients[:2]), r"clients \[0, 1, 2, 3\], got \[0, 1\]"),
        (
            lambda e: replace(e, data=replace(e.data, partition_hash="x")),
            "partition tiny-partition, got x",
        ),
        (
            lambda e: replace(e, factory=lambda: tiny(num_experts=5)),
            r"experts per layer \(4,\), got \(5,\)",
        ),
    ],
)
def test_a_run_of_another_experiment_is_not_gone_on_with(tmp_path, change, what):
    run_experiment(fedavg().shortened(1), tmp_path)
    before = (tmp_path / "rounds.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"holds a run with {what}: go on with"):
        run_experiment(change(fedavg().shortened(1)), tmp_path, resume=True)
    assert (tmp_path / "rounds.jsonl").read_bytes() == before


@pytest.mark.parametrize("left", ["checkpoints", "personal", "owed"])
@pytest.mark.parametrize("resume", [False, True])
def test_the_remains_of_a_run_are_not_taken_for_the_new_ones(tmp_path, left, resume):
    run_experiment(replace(fedmoe(), up=Codecs(experts=TopK(0.5))), tmp_path)
    (tmp_path / "run.json").unlink()
    for other in {"checkpoints", "personal", "owed"} - {left}:
        shutil.rmtree(tmp_path / other, ignore_errors=True)
    (tmp_path / left).mkdir(exist_ok=True)
    with pytest.raises(FileExistsError, match=f"{left} is left of a run whose run.json is missing"):
        run_experiment(fedmoe(), tmp_path, resume=resume)


def test_a_client_without_memory_for_anything_is_named_before_anything_is_written(tmp_path):
    e = fedmoe()
    e = replace(e, clients=(*e.clients[:3], replace(e.clients[3], memory_bytes=10)))
    with pytest.raises(ValueError, match="client 3: memory_bytes must be at least"):
        run_experiment(e, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Smaller parts


def test_what_is_personal_is_taken_out_of_an_assignment():
    model = split_state(tiny())
    held = frozenset({ExpertId(0, 1)})
    rows = rows_of(model, frozenset(model.experts) - held)
    a = Assignment(4, model.only(held), held, Job.SCOUT, True, False, rows)
    assert without(a, fedavg().plan.personal) is a
    assert not without(a, is_stem).model.shared
    assert without(a, is_stem).absent_rows.keys() == rows.keys()
    bare = without(a, is_gate)
    assert not bare.absent_rows and bare.sub_moe == held
    assert all(not is_gate(n) and "gate" not in n for n in bare.model.experts[ExpertId(0, 1)])
    assert without(a, is_expert).absent_rows.keys() == rows.keys()
    assert not without(a, everything).model.experts
    assert (bare.round, bare.job, bare.validate, bare.evaluate) == (4, Job.SCOUT, True, False)


def test_global_accuracy_is_over_all_examples_together():
    e = fedavg()
    model, right, total = tiny(), 0, 0
    for k in range(4):
        x, y = e.data.load(k).test
        right += int((model(x).argmax(-1) == y).sum())
        total += len(y)
    assert merged_accuracy(e, split_state(tiny())) == pytest.approx(right / total)


def test_budgets_go_round_within_each_group():
    model = split_state(tiny())
    clients = with_budgets(federated_data(6), model, (0.25, 0.5, 1.0))
    small, middle, large = (memory_for(model, s) for s in (0.25, 0.5, 1.0))
    assert [c.memory_bytes for c in clients] == [small, small, middle, middle, large, large]
    assert small < middle < large


def test_a_part_needs_less_memory_than_the_whole():
    e = fedavg()
    whole = frozenset(split_state(tiny()).experts)
    sizes = [peak_bytes(e, frozenset(sorted(whole)[:n])) for n in range(1, 5)]
    assert sizes == sorted(set(sizes))


def test_a_spec_comes_back_from_its_folder(tmp_path):
    spec = Spec("demo", "fedmoe", 3, 12, {"partition": "dirichlet", "share": 0.2})
    spec.write(tmp_path / "new")
    assert Spec.read(tmp_path / "new") == spec
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["experiment.json"]


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "holds no run: experiment.json is missing"),
        ("{", "does not describe an experiment"),
        (json.dumps({"target": "demo"}), "does not describe an experiment"),
        (json.dumps({"a": 1}), "does not describe an experiment"),
        ("[1]", "does not describe an experiment"),
    ],
    ids=str,
)
def test_a_folder_without_a_spec_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "experiment.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Spec.read(tmp_path)


def test_a_run_moves_the_model_but_not_what_is_everybodys_own(tmp_path):
    run_experiment(fedmoe(), tmp_path)
    _, state = newest_checkpoint(tmp_path / "checkpoints", FedMoEState, pytest.fail)
    start = split_state(tiny())
    assert state.round == 3 and state_hash(state.model) != state_hash(start)
    assert all(torch.equal(t, start.shared[n]) for n, t in state.model.shared.items())
