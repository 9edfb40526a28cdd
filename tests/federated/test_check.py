from dataclasses import replace

import pytest
import torch

from fedmoe.federated.check import MAX_EXAMPLES, MAX_TOKENS, RefusedUpdateError, check_update
from fedmoe.federated.sums import UPDATE_LIMIT
from fedmoe.types import ActivationProfile, Assignment, ExpertId, Job, MoEState
from tests.tiny import number, profile, update

E0, E1, E2 = (ExpertId(0, e) for e in range(3))
LAST = ExpertId(1, 0)  # the second layer has one expert

MODEL = MoEState(
    {"w": torch.zeros(2), "steps": torch.tensor(4), "mask": torch.tensor([True])},
    {e: {"v": number(0.0)} for e in (E0, E1, E2, LAST)},
)
HELD = frozenset({E0, E2, LAST})
TRAIN = Assignment(3, MODEL.only(HELD), HELD)


def counted(*rows):
    return profile(*rows)


GOOD = replace(
    update(7, MODEL.only(HELD), num_examples=20, metrics={"loss": 2.5, "trained_test": 1.0}),
    profile=counted([5, 0, 6], [9, 0, 0]),
)


def table(**changes):
    return replace(GOOD, profile=replace(GOOD.profile, **changes))


def shared(**changes):
    part = {n: t for n, t in {**MODEL.shared, **changes}.items() if t is not None}
    return replace(GOOD, model=replace(GOOD.model, shared=part))


def experts(changes):
    part = {e: s for e, s in {**GOOD.model.experts, **changes}.items() if s is not None}
    return replace(GOOD, model=replace(GOOD.model, experts=part))


def test_an_honest_update_is_accepted():
    check_update(GOOD, TRAIN, MODEL)


def test_the_largest_claims_that_are_believed():
    check_update(replace(GOOD, num_examples=MAX_EXAMPLES), TRAIN, MODEL)
    check_update(table(token_L=torch.tensor([MAX_TOKENS, MAX_TOKENS])), TRAIN, MODEL)
    below = torch.nextafter(number(UPDATE_LIMIT / 20), number(0.0))
    check_update(experts({E0: {"v": below}}), TRAIN, MODEL)


NAN, INF = float("nan"), float("inf")
REFUSED = {
    "no examples": (replace(GOOD, num_examples=0), "num_examples must be between 1 and"),
    "less than none": (replace(GOOD, num_examples=-5), "num_examples .* got -5"),
    "too many examples": (
        replace(GOOD, num_examples=MAX_EXAMPLES + 1),
        f"num_examples .* got {MAX_EXAMPLES + 1}",
    ),
    "a loss that is not a number": (
        replace(GOOD, metrics={"loss": NAN}),
        "metric 'loss' must be finite, got nan",
    ),
    "an accuracy above 1": (
        replace(GOOD, metrics={"trained_validation": 1.01}),
        "'trained_validation' must be between 0 and 1, got 1.01",
    ),
    "an error below 0": (replace(GOOD, metrics={"mass_error": -0.1}), "must be 0 or more, got -0"),
    "an accuracy below 0": (replace(GOOD, metrics={"received_test": -0.1}), "between 0 and 1"),
    "nan in the shared part": (
        shared(w=torch.tensor([0.0, NAN])),
        "shared parameter 'w' must be finite",
    ),
    "infinity in an expert": (
        experts({E2: {"v": number(-INF)}}),
        "expert 2 of layer 0: 'v' must be finite",
    ),
    "another shape": (shared(w=torch.zeros(3)), r"'w' must have shape \(2,\), got \(3,\)"),
    "a shape that would broadcast": (
        experts({E0: {"v": torch.zeros(())}}),
        r"expert 0 of layer 0: 'v' must have shape \(1,\), got \(\)",
    ),
    "another dtype": (
        shared(w=torch.zeros(2).double()),
        "'w' must be torch.float32, got torch.float64",
    ),
    "a whole number as a real one": (
        shared(steps=torch.tensor(4.0)),
        "'steps' must be torch.int64, got torch.float32",
    ),
    "a value too large": (
        shared(w=torch.tensor([1.0, UPDATE_LIMIT / 20])),
        "'w' times its weight must stay below 16777216, got 1.68e[+]07 for a weight of 20",
    ),
    "the least whole number": (
        shared(steps=torch.tensor(torch.iinfo(torch.int64).min)),
        "'steps' times its weight",
    ),
    "a shared parameter missing": (shared(steps=None), "shared parameter 'steps' is missing"),
    "a shared parameter too many": (shared(x=torch.zeros(1)), "'x' was not sent to it"),
    "an expert missing": (experts({E2: None}), "expert 2 of layer 0: 'v' is missing"),
    "an expert's parameter missing": (experts({E2: {}}), "expert 2 of layer 0: 'v' is missing"),
    "an expert's parameter too many": (
        experts({E2: {"v": number(0.0), "x": number(0.0)}}),
        "expert 2 of layer 0: 'x' was not sent to it",
    ),
    "an expert that is another's": (
        experts({E1: {"v": number(0.0)}}),
        "expert 1 of layer 0 was not assigned to it",
    ),
    "an expert that nobody has": (
        experts({ExpertId(5, 5): {"v": number(0.0)}}),
        "expert 5 of layer 5 was not assigned to it",
    ),
    "tokens for another's expert": (
        replace(GOOD, profile=counted([5, 1, 6], [9, 0, 0])),
        "reports tokens for expert 1 of layer 0, which it has not",
    ),
    "tokens for an expert that is not": (
        replace(GOOD, profile=counted([5, 0, 6], [9, 0, 2])),
        "count_LE names expert 2 of layer 1, which is not",
    ),
    "a score for an expert that is not": (
        table(score_LE=torch.tensor([[5.0, 0, 6], [9, 1, 0]]).double()),
        "score_LE names expert 1 of layer 1, which is not",
    ),
    "a negative count": (
        replace(GOOD, profile=counted([-5, 0, 6], [9, 0, 0])),
        "count_LE must not be negative",
    ),
    "a negative score": (table(score_LE=-GOOD.profile.score_LE), "score_LE must not be negative"),
    "weights that are not numbers": (
        table(weight_LE=GOOD.profile.weight_LE * NAN),
        "weight_LE must be finite",
    ),
    "more tokens than passed": (
        table(token_L=torch.tensor([5, 9])),
        "ran more tokens than passed its layer",
    ),
    "too many tokens": (
        table(token_L=torch.tensor([11, MAX_TOKENS + 1])),
        f"token_L must be at most {MAX_TOKENS}, got {MAX_TOKENS + 1}",
    ),
    "counts that are not whole": (
        table(count_LE=GOOD.profile.count_LE.double()),
        "count_LE must be torch.int64 .* got torch.float64",
    ),
    "complex counts": (
        table(count_LE=GOOD.profile.count_LE.to(torch.complex64)),
        "count_LE must be torch.int64 .* got torch.complex64",
    ),
    "a layer too few": (
        replace(GOOD, profile=counted([5, 0, 6])),
        r"count_LE must be torch.int64 of shape \(2, 3\), got torch.int64 of shape \(1, 3\)",
    ),
    "a layer too many": (replace(GOOD, profile=counted([5, 0, 6], [9, 0, 0], [0, 0, 0])), "shape"),
    "tables of different shapes": (table(token_L=torch.tensor([[11, 9]])), "token_L must be"),
    "an empty profile": (
        replace(GOOD, profile=ActivationProfile.empty(0, 0)),
        r"got torch.int64 of shape \(0, 0\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_is_wrong_with_an_update_is_said_with_the_clients_number(case):
    bad, message = REFUSED[case]
    with pytest.raises(RefusedUpdateError, match=f"^client 7: .*{message}"):
        check_update(bad, TRAIN, MODEL)


def test_an_experts_tokens_weigh_its_values():
    many = replace(GOOD, profile=counted([5, 0, 6], [1000, 0, 0]))
    state = {LAST: {"v": number(-UPDATE_LIMIT / 1000)}}
    bad = replace(many, model=replace(many.model, experts={**many.model.experts, **state}))
    with pytest.raises(RefusedUpdateError, match="must stay below .* a weight of 1000"):
        check_update(bad, TRAIN, MODEL)


SCOUT = Assignment(3, MODEL.only(frozenset()), frozenset(), Job.SCOUT)
SCOUTED = replace(GOOD, model=MoEState({}, {}), metrics={}, profile=counted([5, 4, 6], [9, 0, 0]))


def test_a_scout_reports_tokens_for_experts_that_it_does_not_hold():
    check_update(SCOUTED, SCOUT, MODEL)


@pytest.mark.parametrize("job", [Job.SCOUT, Job.EVALUATE])
@pytest.mark.parametrize(
    "model", [MoEState({"w": torch.zeros(2)}, {}), MODEL.only(HELD)], ids=["shared", "all"]
)
def test_who_does_not_train_sends_no_parameters(job, model):
    with pytest.raises(RefusedUpdateError, match=f"a {job.value} job sends no parameters back"):
        check_update(replace(SCOUTED, model=model), replace(SCOUT, job=job), MODEL)


def test_a_scout_may_not_speak_of_experts_that_are_not():
    bad = replace(SCOUTED, profile=counted([5, 4, 6], [9, 1, 0]))
    with pytest.raises(RefusedUpdateError, match="names expert 1 of layer 1, which is not"):
        check_update(bad, SCOUT, MODEL)


def test_what_is_a_clients_own_does_not_come_back():
    # The server sent neither "w" nor any expert: the client has those itself.
    sent = MoEState({n: t for n, t in MODEL.shared.items() if n != "w"}, {})
    assignment = replace(TRAIN, model=sent)
    honest = replace(GOOD, model=sent)
    check_update(honest, assignment, MODEL)
    with pytest.raises(RefusedUpdateError, match="'w' was not sent to it"):
        check_update(shared(), assignment, MODEL)
    generous = replace(sent, experts=MODEL.only(HELD).experts)
    with pytest.raises(RefusedUpdateError, match="expert 0 of layer 0 was not assigned"):
        check_update(replace(GOOD, model=generous), assignment, MODEL)


def test_a_model_without_experts_has_an_empty_profile():
    dense = MoEState({"w": torch.zeros(2)}, {})
    good = replace(GOOD, model=dense, profile=ActivationProfile.empty(0, 0))
    check_update(good, Assignment(0, dense, frozenset()), dense)
