"""However clients are trained, the result is that of one after another."""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import nn

from fedmoe.data.examples import ClientData, Examples
from fedmoe.federated import cohort, compiled
from fedmoe.federated.cohort import TRAINERS, Answered, choose, supported, work_many
from fedmoe.federated.local import (
    LocalMethod,
    LocalPlan,
    Phase,
    Trained,
    fedper,
    frozen_router,
    train,
    work,
)
from fedmoe.federated.methods.apfl import APFL
from fedmoe.federated.methods.blend import Blend
from fedmoe.federated.methods.clusters import BestMember
from fedmoe.federated.methods.ditto import Ditto
from fedmoe.federated.methods.personal import is_norm
from fedmoe.federated.methods.reap import Reaping
from fedmoe.federated.methods.scaffold import Controlled, zeros_by_role
from fedmoe.native import client as native
from fedmoe.nn.classifier import StemAndHead, dense_classifier
from fedmoe.nn.experts.ffn import FFN
from fedmoe.nn.gates.topk import TopKGate
from fedmoe.nn.init import seeded
from fedmoe.nn.members import ChosenGate, Members
from fedmoe.nn.moe import MoE
from fedmoe.nn.sensors import motion_cnn
from fedmoe.nn.tabular import vowel_mlp
from fedmoe.nn.text import CharacterStem, character_model
from fedmoe.nn.vision import Residual, dense_cnn, fashion_cnn, flat_moe
from fedmoe.state import ROW, is_expert, layer_sizes, split_state, state_hash
from fedmoe.types import Assignment, ClientUpdate, ExpertId, Job, MoEState
from tests.tiny import tiny

EXPERTS, CLASSES, PIXELS = 5, 3, 12
SIZES = (8, 4, 11, 6, 8)  # training examples of each client
HELD = ((0, 1, 2, 3, 4), (1, 3), (0, 2, 4), (2, 3, 4), (0, 1))

needs_a_compiler = pytest.mark.skipif(not native.available(), reason="no compiler here")
FAST = [pytest.param("compiled", marks=needs_a_compiler), "batched"]


def two_mixtures():
    """A MoE layer within a residual, with GELU and without biases, and another for a head."""

    def experts(out, activation, bias):
        return {e: FFN(8, 6, out, activation, bias=bias) for e in range(EXPERTS)}

    def build():
        inner = MoE(TopKGate(8, EXPERTS, 2), experts(8, "gelu", False), EXPERTS)
        head = MoE(TopKGate(8, EXPERTS, 1), experts(CLASSES, "relu", True), EXPERTS)
        body = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 8, bias=False), nn.GELU())
        return StemAndHead(nn.Sequential(body, Residual(inner), nn.Linear(8, 8)), head)

    return seeded(build, 3)



MODELS = {
    "flat": partial(flat_moe, PIXELS, 8, EXPERTS, 6, num_classes=CLASSES),
    "two of two": partial(
        vowel_mlp, PIXELS, 8, EXPERTS, 6, 2, CLASSES, gate_mass="renormalise"
    ),
    "two, summed": partial(vowel_mlp, PIXELS, 8, EXPERTS, 6, 2, CLASSES, gate_mass="sum"),
    "two, full": partial(vowel_mlp, PIXELS, 8, EXPERTS, 20, 2, CLASSES, gate_mass="full"),
    "two layers": two_mixtures,
    "dense": partial(
        dense_classifier, lambda: nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 17)), 17, 7, CLASSES
    ),
}
PLAN = LocalPlan((Phase(epochs=2),), lr=0.1, batch_size=5)
PLANS = {
    "plain": PLAN,
    "clip": replace(PLAN, clip=0.3),
    "momentum": replace(PLAN, momentum=0.9),
    "decay": replace(PLAN, weight_decay=0.1, clip=2.0),
    "balance": replace(PLAN, balance=0.3),
    "z": replace(PLAN, z=0.1),
    "smoothing": replace(PLAN, label_smoothing=0.2),
    "proximal": replace(PLAN, proximal=0.5),
    "all": replace(
        PLAN, momentum=0.5, weight_decay=0.05, clip=1.0, balance=0.1, z=0.1, proximal=0.2,
        label_smoothing=0.1, lr_decay=0.9,
    ),
    "phases": replace(
        PLAN, phases=(Phase(is_expert, 1), Phase(lambda n: not is_expert(n), 2)), momentum=0.5
    ),
    "frozen": replace(PLAN, frozen=lambda n: n.startswith("experts.0.1.") or "stem" in n),
    "frozen router": frozen_router(PLAN),
    "one batch": replace(PLAN, batch_size=50),
    "personal": fedper(lambda n: "bias" in n, PLAN),
}  # fmt: skip


def data_of(client, shape=(PIXELS,), num=None, num_classes=CLASSES):
    draw = torch.Generator().manual_seed(70 + client)

    def examples(n):
        return Examples(
            torch.randn(n, *shape, generator=draw),
            torch.randint(0, num_classes, (n,), generator=draw),
        )

    return ClientData(examples(num or SIZES[client]), examples(3), examples(6))


def assignment(make, client=0, **changes):
    whole = make()
    sizes = layer_sizes(whole)
    held = frozenset(ExpertId(layer, e) for layer in range(len(sizes)) for e in HELD[client])
    return replace(Assignment(2, split_state(whole).only(held), held), **changes)


def jobs_of(make, **changes):
    return {c: assignment(make, c, **changes) for c in range(len(SIZES))}


def both(make, plan, trainer, data=data_of, jobs=None, own=None):
    """One after another and by `trainer`, by client."""
    jobs = jobs or jobs_of(make)
    own = own or {}
    slow = {c: work(c, a, make, data(c), plan, own.get(c), 7) for c, a in jobs.items()}
    load = lambda c, a: (data(c), own.get(c))  # noqa: E731
    fast = dict(work_many(jobs.items(), make, load, plan, 7, trainer=trainer))
    assert [*fast] == [*slow]
    return slow, fast


def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def same_state(a: MoEState | None, b: MoEState | None):
    assert (a is None) == (b is None)
    if a is not None:
        close(dict(a.shared), dict(b.shared))
        close(dict(a.experts), dict(b.experts))


def same(slow, fast):
    for c, (update, kept) in slow.items():
        assert not isinstance(fast[c], Exception), fast[c]
        got, mine = fast[c]
        same_state(update.model, got.model)
        same_state(kept, mine)
        a, b = update.profile, got.profile
        assert torch.equal(a.count_LE, b.count_LE) and torch.equal(a.token_L, b.token_L)
        close((a.weight_LE, a.score_LE), (b.weight_LE, b.score_LE), atol=1e-5)
        close(dict(update.extra), dict(got.extra))
        assert got.metrics == pytest.approx(dict(update.metrics), abs=1e-6)
        assert (got.client, got.num_examples) == (update.client, update.num_examples)


@pytest.mark.parametrize("trainer", FAST)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model", MODELS)
def test_every_trainer_does_the_work_of_one_after_another(model, plan, trainer):
    make = MODELS[model]
    assert supported(make(), PLANS[plan], trainer) is None
    load = lambda c, a: (data_of(c), None)  # noqa: E731
    jobs = jobs_of(make).items()
    fast = work_many(jobs, make, load, PLANS[plan], 7, trainer=trainer)
    same(one_by_one(model, plan), dict(fast))


@cache
def one_by_one(model, plan):
    make = MODELS[model]
    return {c: work(c, a, make, data_of(c), PLANS[plan], None, 7) for c, a in jobs_of(make).items()}


METHODS = {
    "ditto": Ditto(0.3),
    "ditto, longer": Ditto(0.3, epochs=3),
    "blend": Blend(),
    "reap": Reaping(),
    "scaffold": Controlled(),
    "apfl": APFL(0.3),
    "apfl, fixed": APFL(0.3, adaptive=False),
}
IN_TORCH = {  # a part of the training, at least
    "apfl": {"decay", "all", "proximal", "phases", "frozen", "frozen router"},
    "apfl, fixed": {"decay", "all"},
}
SIMPLE = ("ditto, longer", "blend", "reap")
FITTING = [
    *((m, p) for m in METHODS if m not in SIMPLE for p in PLANS),
    *((m, "momentum") for m in SIMPLE),
]


def rounds(make, plan, data, trainer, clients=(0, 1)):
    """Two rounds of the same work, one by one and by `trainer`, from the same kept tensors."""
    assert supported(make(), plan, trainer) is None
    own, found = {}, []
    for round in range(2):
        jobs = {c: assignment(make, c, round=round, evaluate=True) for c in clients}
        if round:  # what came is another model than what the client had
            jobs = {c: replace(a, model=scaled(a.model)) for c, a in jobs.items()}
        if isinstance(plan.method, Controlled):
            control = {n: t + 0.01 for n, t in zeros_by_role(split_state(make())).items()}
            jobs = {c: replace(a, extra=control) for c, a in jobs.items()}
        slow, fast = both(make, plan, trainer, data, jobs, own)
        same(slow, fast)
        own = {c: kept for c, (_, kept) in slow.items()}
        found.append(fast)
    return found


def scaled(model: MoEState) -> MoEState:
    def by(state):
        return {n: 0.9 * t if t.is_floating_point() else t for n, t in state.items()}

    return MoEState(by(model.shared), {e: by(s) for e, s in model.experts.items()})


@needs_a_compiler
@pytest.mark.parametrize("method, plan", FITTING)
def test_methods_that_train_in_their_own_way_are_compiled_too(method, plan, monkeypatch):
    """The clients hold different experts. A step of client 0 with its last three examples leaves at
    least two of its five experts in the last layer without tokens."""
    fitted = watched(monkeypatch)
    made = replace(PLANS[plan], method=METHODS[method])
    rounds(MODELS["two layers"], made, data_of, "compiled")
    assert any(fitted) and all(fitted) == (plan not in IN_TORCH.get(method, ()))


@needs_a_compiler
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("method", ["ditto", "scaffold", "apfl"])
def test_methods_are_compiled_with_convolutions_too(method, norm, monkeypatch):
    plan = replace(PLAN, lr=0.005, momentum=0.5, clip=1.0, method=METHODS[method])
    # With other examples a pool may have two nearly equal values, of which rounding picks one.
    data = lambda c: data_of(c, (1, 28, 28), num=9)  # noqa: E731
    fitted = watched(monkeypatch)
    make = partial(fashion_cnn, EXPERTS, 6, num_classes=CLASSES, norm=norm)
    rounds(make, plan, data, "compiled", clients=(0, 3))
    assert fitted and all(fitted)


def watched(monkeypatch):
    """Of each training by the compiled way, whether it was not left to torch."""
    fitted, fit = [], compiled.train

    def watch(*args, **named):
        before = len(left)
        answer = fit(*args, **named)
        fitted.append(len(left) == before)
        return answer

    left, slow = [], compiled.local.train
    one_by_one = lambda *a, **n: left.append(1) or slow(*a, **n)  # noqa: E731
    monkeypatch.setattr(compiled.local, "train", one_by_one)
    monkeypatch.setattr(compiled, "train", watch)
    return fitted


CONTEXT, CODES, MET = 4, 9, 6  # characters of an example; codes; those that occur
CODE_TYPES = (torch.uint8, torch.int64, torch.float32, torch.int16, torch.int32)
characters = partial(character_model, CONTEXT, 3, 8, EXPERTS, 6, 2, CODES)


def codes_of(client, met=MET):
    data = data_of(client, (CONTEXT,), num_classes=CODES)

    def coded(examples):
        code_NT = examples.x.mul(100).long().remainder(met)
        return Examples(code_NT.to(CODE_TYPES[client]), examples.y)

    return ClientData(coded(data.train), coded(data.validation), coded(data.test))


@needs_a_compiler
@pytest.mark.parametrize(
    "method, plan",
    [
        *((None, p) for p in ("plain", "momentum", "decay", "all", "phases", "frozen", "personal")),
        ("ditto", "clip"),
        ("scaffold", "all"),
        ("apfl", "momentum"),
        ("apfl, fixed", "plain"),
    ],
)
def test_embeddings_of_characters_are_compiled_too(method, plan, monkeypatch):
    """Codes are of many types; some are met more than once in a step, and some never."""
    fitted = watched(monkeypatch)
    made = PLANS[plan] if method is None else replace(PLANS[plan], method=METHODS[method])
    rounds(characters, made, codes_of, "compiled", clients=(0, 2, 3))
    assert fitted and all(fitted)


@needs_a_compiler
def test_codes_that_the_model_does_not_have_fail_as_one_after_another():
    data = codes_of(0, met=CODES + 1)
    with pytest.raises(IndexError) as one:
        work(0, assignment(characters), characters, data, PLAN, None, 0)
    load = lambda c, a: (data, None)  # noqa: E731
    [(_, why)] = work_many(
        [(0, assignment(characters))], characters, load, PLAN, 0, trainer="compiled"
    )
    assert isinstance(why, IndexError) and str(why) == str(one.value)


def test_embeddings_are_not_trained_side_by_side():
    assert "embedding" in supported(characters(), PLAN, "batched")
    jobs = {c: assignment(characters, c) for c in (0, 1)}
    slow, fast = both(characters, PLAN, "batched", codes_of, jobs)
    for c, (update, _) in slow.items():
        assert state_hash(update.model) == state_hash(fast[c][0].model)


def members(mixes, shape, make_member):
    def build():
        inner = [make_member() for _ in range(EXPERTS)]
        return Members(ChosenGate(EXPERTS), inner, CLASSES, shape, mixes=mixes)

    return seeded(build, 4)


def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 7), nn.ReLU(), nn.Linear(7, CLASSES))


@needs_a_compiler
@pytest.mark.parametrize(
    "mixes, plan",
    [("logits", "plain"), *(("probabilities", p) for p in PLANS if p not in ("z", "all"))],
)
def test_the_chosen_of_several_members_is_compiled(mixes, plan, monkeypatch):
    make = partial(members, mixes, (3, PIXELS // 3), small)
    fitted = watched(monkeypatch)
    plan = replace(PLANS[plan], method=BestMember())
    shapes = ((3, PIXELS // 3), (PIXELS,))  # pictures and rows
    data = lambda c: data_of(c, shapes[c % 2])  # noqa: E731
    for done in rounds(make, plan, data, "compiled"):
        for update, _ in done.values():
            assert len(update.model.experts) == 1
            assert update.profile.count_LE.count_nonzero() == 1
    assert fitted and all(fitted)


@needs_a_compiler
def test_normalisation_that_stays_on_the_client_is_compiled_too():
    """Over two rounds; what is kept has the running statistics and how many steps they are of."""
    make = partial(fashion_cnn, EXPERTS, 6, num_classes=CLASSES, norm="batch")
    plan = fedper(is_norm, replace(PLAN, lr=0.02, clip=1.0))
    for done in rounds(make, plan, lambda c: data_of(c, (1, 28, 28), num=7), "compiled", (0, 3)):
        for update, own in done.values():
            assert not any("norm" in name for name in update.model.shared)
            counted = [t for n, t in own.shared.items() if n.endswith("num_batches_tracked")]
            assert len(counted) == 2 and {int(t) for t in counted} <= {4, 8}


@needs_a_compiler
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_the_chosen_member_may_be_of_convolutions(norm, monkeypatch):
    member = partial(dense_cnn, hidden=9, num_classes=CLASSES, norm=norm)
    make = partial(members, "probabilities", (1, 28, 28), member)
    fitted = watched(monkeypatch)
    jobs = {c: assignment(make, c) for c in (0, 3)}
    plan = replace(PLAN, lr=0.02, momentum=0.9, method=BestMember())
    shapes = {0: (1, 28, 28), 3: (784,)}
    same(*both(make, plan, "compiled", lambda c: data_of(c, shapes[c], num=7), jobs))
    assert fitted == [True, True]


@needs_a_compiler
def test_the_chosen_member_may_read_characters(monkeypatch):
    """Codes may come as they are, or as rows of numbers."""

    def reader():
        return StemAndHead(CharacterStem(CODES, CONTEXT, 3, 8), FFN(8, 7, CLASSES))

    def data(client):
        x = codes_of(client).train.x
        return replace(data_of(client), train=Examples(x, data_of(client).train.y))

    make = partial(members, "logits", (CONTEXT,), reader)
    fitted = watched(monkeypatch)
    jobs = {c: assignment(make, c) for c in (0, 2)}
    plan = replace(PLANS["decay"], method=BestMember())
    empty = Examples(torch.empty(0, CONTEXT), torch.empty(0, dtype=torch.int64))
    load = lambda c: replace(data(c), validation=empty, test=empty)  # noqa: E731
    same(*both(make, plan, "compiled", load, jobs))
    assert fitted == [True, True]


@needs_a_compiler
def test_members_whose_gate_has_no_logits_fail_at_a_z_loss_as_one_after_another():
    make = partial(members, "probabilities", (PIXELS,), small)
    plan = replace(PLANS["z"], method=BestMember())
    with pytest.raises(ValueError, match="z-loss needs a gate with logits"):
        work(0, assignment(make), make, data_of(0), plan, None, 7)
    load = lambda c, a: (data_of(c), None)  # noqa: E731
    [(_, why)] = work_many([(0, assignment(make))], make, load, plan, 7, trainer="compiled")
    assert isinstance(why, ValueError) and "z-loss needs a gate with logits" in str(why)


@needs_a_compiler
@pytest.mark.parametrize("plan", ["plain", "all", "frozen", "phases"])
@pytest.mark.parametrize(
    "make, shape",
    [
        (partial(fashion_cnn, EXPERTS, 6, num_classes=CLASSES), (1, 28, 28)),
        (partial(fashion_cnn, EXPERTS, 6, num_classes=CLASSES, norm="batch"), (1, 28, 28)),
        (partial(motion_cnn, EXPERTS, 6, num_classes=CLASSES), (6, 128)),
    ],
    ids=["pictures", "normalised", "signals"],
)
def test_convolutions_are_compiled_too(make, shape, plan):
    data = lambda c: data_of(c, shape, num=7)  # noqa: E731
    jobs = {c: assignment(make, c) for c in (0, 3)}
    assert supported(make(), PLANS[plan], "compiled") is None
    same(*both(make, replace(PLANS[plan], lr=0.02), "compiled", data, jobs))


@pytest.mark.parametrize("trainer", FAST)
def test_experts_without_tokens_stay_as_they_were_to_the_bit(trainer):
    make, plan = MODELS["flat"], replace(PLANS["all"], phases=(Phase(),))
    data = lambda c: data_of(c, num=2)  # noqa: E731
    _, fast = both(make, plan, trainer, data)
    start, idle = split_state(make()), 0
    for c, (update, _) in fast.items():
        used = {e for e in range(EXPERTS) if update.profile.count_LE[0, e]}
        assert {e.expert for e in update.model.experts} == used
        idle += len(set(HELD[c]) - used)
    assert idle
    # Of what moved, a client that holds it and never used it would have the old bits.
    model = make()
    task = cohort._task(0, model, data_of(0, num=2).train, plan, 0, torch.device("cpu"))
    [trained] = cohort._train([task], trainer)
    for e in range(EXPERTS):
        if not trained.profile.count_LE[0, e]:
            for name, value in start.experts[ExpertId(0, e)].items():
                if not name.startswith(ROW):
                    assert torch.equal(split_state(model).experts[ExpertId(0, e)][name], value)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_one_clients_failure_is_its_own(trainer):
    """Client 1 has no data, 2 diverges, 3 was assigned an expert that nobody sent."""
    make = MODELS["flat"]
    jobs = jobs_of(make)
    stranger = jobs[3].sub_moe | {ExpertId(0, 0)}
    jobs[3] = replace(jobs[3], sub_moe=stranger)

    def load(client, _):
        data = data_of(client)
        x, y = data.train
        if client == 1:
            raise OSError("the disk is gone")
        return (replace(data, train=Examples(x * 1e30, y)) if client == 2 else data), None

    done = dict(work_many(jobs.items(), make, load, PLAN, 7, trainer=trainer))
    reasons = {c: str(d) for c, d in done.items() if isinstance(d, Exception)}
    assert [*reasons] == [1, 2, 3]
    assert "disk" in reasons[1] and "assigned expert 0" in reasons[3]
    assert reasons[2] == (
        "client 2: the training loss must be finite, got nan; a smaller lr than 0.1 may help"
    )
    slow = {c: work(c, jobs[c], make, data_of(c), PLAN, None, 7) for c in (0, 4)}
    same(slow, {c: done[c] for c in slow})


@pytest.mark.parametrize("trainer", FAST)
def test_labels_that_the_model_does_not_have_fail_as_one_after_another(trainer):
    make = MODELS["flat"]
    data = replace(data_of(0), train=data_of(0, num_classes=9).train)
    [(_, why)] = work_many(
        [(0, assignment(make))], make, lambda c, a: (data, None), PLAN, 0, trainer=trainer
    )
    with pytest.raises(IndexError) as one:
        work(0, assignment(make), make, data, PLAN, None, 0)
    assert isinstance(why, IndexError) and str(why) == str(one.value)


def of_another_norm():
    model = fashion_cnn(norm="batch")
    model.stem.norm1 = nn.GroupNorm(2, 32)
    return model


class Odd(LocalMethod):
    """Never asks its task how to train."""

    def train(self, task):
        return Trained(
            *train(task.model, task.examples, task.plan, task.generator, task.device)
        )


@pytest.mark.parametrize("trainer", FAST)
@pytest.mark.parametrize(
    "make, plan, told",
    [
        (tiny, PLAN, "Tiny is not known"),
        (MODELS["flat"], replace(PLAN, method=Odd()), "Odd trains in its own way"),
        (lambda: MODELS["dense"]().double(), PLAN, "float32"),
        (of_another_norm, PLAN, "normalisation GroupNorm is not known"),
    ],
    ids=["unknown part", "another method", "float64", "another norm"],
)
def test_what_a_trainer_cannot_do_it_tells(make, plan, told, trainer):
    assert told in supported(make(), plan, trainer)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_a_trainer_cannot_do_is_done_one_by_one_to_the_bit(trainer, tmp_path):
    from tests.tiny import client_data

    jobs = {c: Assignment(0, split_state(tiny()), frozenset(split_state(tiny()).experts))
            for c in (0, 1)}  # fmt: skip
    plan = replace(PLAN, method=Ditto())
    slow, fast = both(tiny, plan, trainer, client_data, jobs)
    for c, (update, kept) in slow.items():
        assert state_hash(update.model) == state_hash(fast[c][0].model)
        assert state_hash(kept) == state_hash(fast[c][1])


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("job", [Job.SCOUT, Job.EVALUATE, Job.SERVE])
def test_jobs_that_bring_no_update_are_done_as_one_after_another(job, trainer):
    make = MODELS["two of two"]
    slow, fast = both(make, PLAN, trainer, jobs=jobs_of(make, job=job, evaluate=True))
    same(slow, fast)


@pytest.mark.parametrize("trainer", FAST)
def test_what_clients_keep_goes_from_round_to_round(trainer):
    make, plan = MODELS["two of two"], PLANS["personal"]
    first, fast = both(make, plan, trainer)
    same(first, fast)
    own = {c: kept for c, (_, kept) in first.items()}
    jobs = {c: replace(a, round=3) for c, a in jobs_of(make).items()}
    same(*both(make, plan, trainer, jobs=jobs, own=own))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_answers_come_in_the_order_of_assignments_whatever_the_group(trainer, monkeypatch):
    monkeypatch.setattr(cohort, "AT_ONCE", 2)
    make = MODELS["flat"]
    jobs = [(c, assignment(make, c)) for c in (3, 0, 4, 2, 1)]
    asked = []

    def load(client, _):
        asked.append(client)
        return data_of(client), None

    answers = work_many(iter(jobs), make, load, PLAN, 7, trainer=trainer)
    first = next(answers)
    assert isinstance(first, Answered) and isinstance(first.done[0], ClientUpdate)
    assert len(asked) <= 2  # data are loaded when their turn comes
    assert [first.client, *(a.client for a in answers)] == [3, 0, 4, 2, 1]


@needs_a_compiler
def test_compiled_bits_do_not_depend_on_who_else_is_trained():
    make = MODELS["two of two"]
    load = lambda c, a: (data_of(c), None)  # noqa: E731
    jobs = jobs_of(make)
    together = dict(work_many(jobs.items(), make, load, PLAN, 7, trainer="compiled"))
    for c, a in jobs.items():
        [(_, alone)] = work_many([(c, a)], make, load, PLAN, 7, trainer="compiled")
        assert state_hash(alone[0].model) == state_hash(together[c][0].model)


@pytest.mark.parametrize("make", [MODELS["flat"], tiny], ids=["known", "unknown"])
def test_the_choice_is_one_that_can_train_the_model(make, monkeypatch):
    monkeypatch.setattr(cohort, "PROBE_S", 0.05)
    shape = (PIXELS,) if make is not tiny else (3,)
    examples = data_of(0, shape, num_classes=2).train
    chosen = choose(make, examples, PLAN)
    assert supported(make(), PLAN, chosen) is None
    if make is tiny:
        assert chosen == "one-by-one"


def test_the_choice_is_the_way_that_took_the_least_time(monkeypatch):
    cost = {"one-by-one": 3.0, "batched": 1.0, "compiled": 2.0}
    clock = [0.0]
    monkeypatch.setattr(cohort.time, "perf_counter", lambda: clock[0])

    def train(tasks, trainer):
        clock[0] += cost[trainer] * len(tasks)
        return iter([None] * len(tasks))

    monkeypatch.setattr(cohort, "_train", train)

    def ask():
        monkeypatch.setattr(cohort, "_chosen", {})
        return choose(MODELS["flat"], data_of(0).train, PLAN)

    assert ask() == "batched"
    cost["batched"] = 4.0
    assert choose(MODELS["flat"], data_of(0).train, PLAN) == "batched"  # it was measured before
    assert ask() == ("compiled" if native.available() else "one-by-one")
    cost["compiled"] = 2.95  # within what a measurement may be wrong by
    assert ask() == "one-by-one"


def test_a_trainer_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="one-by-one, batched, compiled, got 'fast'"):
        list(work_many([], MODELS["flat"], None, PLAN, 0, trainer="fast"))


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_clients_are_trained_side_by_side_on_a_gpu(model):
    """Products are bfloat16 there, on both sides."""
    make = MODELS[model]
    jobs, load = jobs_of(make), lambda c, a: (data_of(c), None)
    slow = {c: work(c, a, make, data_of(c), PLAN, None, 7, "cuda") for c, a in jobs.items()}
    fast = dict(work_many(jobs.items(), make, load, PLAN, 7, "cuda", "batched"))
    for c, (update, _) in slow.items():
        for e, own in fast[c][0].model.experts.items():
            if e in update.model.experts:
                close(dict(own), dict(update.model.experts[e]), atol=0.02)
