from dataclasses import replace
from itertools import permutations

import pytest
import torch

from fedmoe.checkpoint import content_hash
from fedmoe.federated.average import by_examples
from fedmoe.federated.fedavg import random_choice
from fedmoe.federated.fedmoe import FedMoE, FedMoEState, Progress, as_published, frequency, mass
from fedmoe.federated.select import expert_bytes_of, memory_for
from fedmoe.federated.similar import similarity
from fedmoe.population import Population
from fedmoe.profile import FREQUENCY_ERROR
from fedmoe.state import ROW, parameter_bytes, split_state, state_hash
from fedmoe.types import (
    ActivationProfile,
    Change,
    ClientInfo,
    ClientUpdate,
    ExpertId,
    Job,
    MoEState,
)
from tests.tiny import number, one_layer, profile, ragged, tiny, update

NOTHING = MoEState({}, {})
MODEL = one_layer(1.0, 1.0, 2.0, 3.0, 4.0)  # 4 bytes shared, 4 for each of 4 experts
# Chooses by a client's own counts alone, so that its choices can be told by hand.
PLAIN = FedMoE(measure=frequency, centred=False, smooth_over=0, sharpness=0.0)


def bytes_for(count):
    return 4 + 4 * count


def chosen(*numbers):
    return frozenset(ExpertId(0, e) for e in numbers)


def scouted(client, count):
    return update(client, NOTHING, count, num_examples=10)


def scored(client, sub_moe, score):
    """A training round of a client that sent a token to each of its experts."""
    count = [int(ExpertId(0, e) in sub_moe) for e in range(4)]
    metrics = {"loss": 1.0} | ({} if score is None else {"trained_validation": score})
    return update(client, NOTHING, count, metrics=metrics)


def state_of(sub_moes, p, clients=None, model=MODEL, **fields):
    """One that has just chosen these sub-MoEs, having observed these shares in round 0."""
    p = {k: torch.tensor([row], dtype=torch.float64) for k, row in p.items()}
    return FedMoEState(
        round=1,
        model=model,
        clients=clients or {k: ClientInfo(k) for k in p},
        p=p,
        seen={k: torch.zeros(1, 4, dtype=torch.int64) for k in p},
        whole={},
        sub_moes=sub_moes,
        progress={},
        **fields,
    )


# Phases


def test_exploring_comes_first_and_then_training():
    strategy = replace(PLAIN, explore_rounds=2)
    state = strategy.init(MODEL, [ClientInfo(0)])
    phases, jobs = [], []
    for _ in range(4):
        [a] = strategy.assign(state, [ClientInfo(0)]).values()
        phases.append(strategy.phase(state))
        jobs.append(a.job)
        state = strategy.aggregate(state, [scouted(0, [1, 2, 3, 0])])
    assert phases == ["explore", "explore", "train", "train"]
    assert jobs == [Job.SCOUT, Job.SCOUT, Job.TRAIN, Job.TRAIN]


def test_without_exploring_everybody_trains_experts_that_were_drawn():
    clients = [ClientInfo(k, bytes_for(1 + k)) for k in range(3)] + [ClientInfo(3)]
    strategy = replace(PLAIN, explore_rounds=0, kinship=1.0, seed=7)
    state = strategy.init(MODEL, clients)
    assert state.sub_moes == random_choice(MODEL, clients, 7)
    assert [len(state.sub_moes[k]) for k in range(4)] == [1, 2, 3, 4]
    assert strategy.phase(state) == "train"
    assignments = strategy.assign(state, clients)
    assert {k: a.sub_moe for k, a in assignments.items()} == state.sub_moes
    assert {a.job for a in assignments.values()} == {Job.TRAIN}
    after = strategy.aggregate(state, [scored(k, state.sub_moes[k], 0.5) for k in range(4)])
    assert after.sub_moes == state.sub_moes and after.kin == {}
    # The first choice leaves the reserve free: half of the room for 3 experts holds 1.
    few = replace(strategy, alpha=0.5).init(MODEL, [ClientInfo(0, bytes_for(3))])
    assert len(few.sub_moes[0]) == 1


def test_a_scout_of_one_moe_layer_gets_no_expert_but_every_row():
    model = split_state(tiny())
    strategy = FedMoE()
    [a] = strategy.assign(strategy.init(model, [ClientInfo(0)]), [ClientInfo(0)]).values()
    assert (a.job, a.sub_moe, a.model.experts) == (Job.SCOUT, frozenset(), {})
    assert a.model.shared.keys() == model.shared.keys()
    assert a.absent_rows.keys() == model.experts.keys()
    for e, rows in a.absent_rows.items():
        assert rows.keys() == {ROW + "proj.weight"}
        assert torch.equal(rows[ROW + "proj.weight"], model.experts[e][ROW + "proj.weight"])


@pytest.mark.parametrize("share, count", [(0.5, 1), (0.9, 2), (1.0, 2)])
def test_a_scout_of_several_layers_holds_what_it_can_of_all_but_the_last(share, count):
    model = split_state(ragged())
    client = ClientInfo(0, memory_for(model, share))
    strategy = FedMoE()
    [a] = strategy.assign(strategy.init(model, [client]), [client]).values()
    assert {e.layer for e in a.sub_moe} == {0} and len(a.sub_moe) == count
    assert a.model.experts.keys() == a.sub_moe
    assert a.sub_moe | a.absent_rows.keys() == model.experts.keys()
    assert not a.sub_moe & a.absent_rows.keys()
    sizes = expert_bytes_of(model)
    assert parameter_bytes(model.shared) + sum(sizes[e] for e in a.sub_moe) <= client.memory_bytes


def test_scouts_draw_experts_by_seed_round_and_client():
    model = split_state(ragged())
    clients = [ClientInfo(k, memory_for(model, 0.5)) for k in range(12)]

    def drawn(strategy, round=0):
        state = replace(strategy.init(model, clients), round=round)
        return [a.sub_moe for a in strategy.assign(state, clients).values()]

    assert drawn(FedMoE()) == drawn(FedMoE())
    assert len(set(drawn(FedMoE()))) == 3  # of three experts, each is drawn by somebody
    assert drawn(FedMoE(seed=1)) != drawn(FedMoE()) != drawn(FedMoE(), round=1)


def test_exploring_by_training_gives_the_whole_model_to_those_who_can_hold_it():
    strategy = replace(PLAIN, explore_trains=True)
    clients = [ClientInfo(0), ClientInfo(1, bytes_for(4)), ClientInfo(2, bytes_for(4) - 1)]
    assignments = strategy.assign(strategy.init(MODEL, clients), clients)
    assert [a.job for a in assignments.values()] == [Job.TRAIN, Job.TRAIN, Job.SCOUT]
    assert [len(a.sub_moe) for a in assignments.values()] == [4, 4, 0]
    assert [len(a.model.experts) for a in assignments.values()] == [4, 4, 0]


def test_in_training_a_client_is_sent_its_sub_moe_and_no_more():
    state = state_of({0: chosen(1, 3)}, {0: [0.0, 0.5, 0.0, 0.5]})
    [a] = PLAIN.assign(state, [ClientInfo(0)]).values()
    assert (a.round, a.job, a.sub_moe, a.validate) == (1, Job.TRAIN, chosen(1, 3), True)
    assert a.model.experts.keys() == chosen(1, 3) and not a.absent_rows
    [a] = replace(PLAIN, patience=None).assign(state, [ClientInfo(0)]).values()
    assert not a.validate  # nobody would read the score


def test_a_gate_with_its_full_denominator_is_sent_all_rows():
    strategy, model = replace(PLAIN, all_rows=True), split_state(tiny())
    state = state_of({0: chosen(1, 3)}, {0: [0.0, 0.5, 0.0, 0.5]}, model=model)
    [a] = strategy.assign(state, [ClientInfo(0)]).values()
    assert a.model.experts.keys() == chosen(1, 3)
    assert a.absent_rows.keys() == chosen(0, 2)


# The first choice


@pytest.mark.parametrize("count, wanted", [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [1, 2, 3])])
def test_a_client_gets_the_experts_that_its_data_uses_most_as_its_memory_goes(count, wanted):
    client = ClientInfo(0, bytes_for(count))
    state = PLAIN.aggregate(PLAIN.init(MODEL, [client]), [scouted(0, [0, 5, 2, 3])])
    assert state.sub_moes == {0: chosen(*wanted)}
    assert PLAIN.changes(state) == (Change(0, "choose", tuple(sorted(chosen(*wanted)))),)
    assert state.round == 1 and state_hash(state.model) == state_hash(MODEL)


def test_the_first_choice_leaves_the_reserve_free():
    strategy = replace(PLAIN, alpha=0.7)
    clients = [ClientInfo(0, bytes_for(4)), ClientInfo(1, bytes_for(1)), ClientInfo(2)]
    updates = [scouted(k, [4, 3, 2, 1]) for k in range(3)]
    state = strategy.aggregate(strategy.init(MODEL, clients), updates)
    # 0.7 * 20 bytes hold 2 experts; the least is given whatever the reserve; None has no limit.
    assert {k: len(s) for k, s in state.sub_moes.items()} == {0: 2, 1: 1, 2: 4}


def test_a_cap_on_coverage_saves_experts():
    strategy = replace(PLAIN, theta_cap=0.7)
    state = strategy.aggregate(strategy.init(MODEL, [ClientInfo(0)]), [scouted(0, [1, 4, 2, 3])])
    assert state.sub_moes == {0: chosen(1, 3)}


def test_the_gates_belief_may_be_what_counts():
    p = ActivationProfile(
        torch.tensor([[9, 1, 0, 0]]),
        torch.tensor([[9.0, 1.0, 0.0, 0.0]]).double(),
        torch.tensor([[2.0, 5.0, 2.0, 1.0]]).double(),
        torch.tensor([10]),
    )
    assert frequency(p).tolist() == [[0.9, 0.1, 0.0, 0.0]]
    assert mass(p).tolist() == [[0.2, 0.5, 0.2, 0.1]]
    client = ClientInfo(0, bytes_for(1))
    for measure, wanted in ((frequency, 0), (mass, 1)):
        strategy = replace(PLAIN, measure=measure)
        note = ClientUpdate(0, 10, NOTHING, p, {})
        state = strategy.aggregate(strategy.init(MODEL, [client]), [note])
        assert state.sub_moes == {0: chosen(wanted)}


def test_balanced_demand_spreads_clients_who_all_like_the_same_expert():
    clients = [ClientInfo(k, bytes_for(1)) for k in range(4)]
    counts = [[97, 1, 1, 1], [80, 18, 1, 1], [80, 1, 18, 1], [80, 1, 1, 18]]
    updates = [scouted(k, c) for k, c in enumerate(counts)]
    greedy = PLAIN.aggregate(PLAIN.init(MODEL, clients), updates)
    assert set(greedy.sub_moes.values()) == {chosen(0)}
    balanced = replace(PLAIN, sharpness=2.0)
    state = balanced.aggregate(balanced.init(MODEL, clients), updates)
    assert state.sub_moes == {k: chosen(k) for k in range(4)}


def test_a_client_alone_is_given_what_its_own_data_uses():
    strategy, client = FedMoE(), ClientInfo(0, bytes_for(2))
    state = strategy.aggregate(strategy.init(MODEL, [client]), [scouted(0, [1, 1, 9, 9])])
    assert state.sub_moes == {0: chosen(2, 3)}


def explored(client, count):
    return update(client, MODEL, count, num_examples=1, metrics={"loss": 1.0})


ABLE_COUNTS = {0: [1, 0, 0, 0], 1: [0, 1, 0, 0], 2: [0, 0, 1, 0]}


@pytest.mark.parametrize(
    "tasks, scouted_count, predict, wanted",
    [
        # (100 * [1, 0, 0, 0] + 300 * [0, 1, 0, 0]) / 400; client 2's task is another.
        ("AABA", [0, 0, 0, 9], True, 1),
        ("AABA", [0, 0, 0, 9], False, 3),
        # Of its task there is nobody able: cosine times data size is 100 * 0.83 against 300 * 0.55.
        ("AABC", [6, 4, 0, 0], True, 1),
        (None, [6, 4, 0, 0], True, 1),
        (None, [6, 4, 0, 0], False, 0),
        # Similar to nobody who is able: it is left with what it scouted.
        (None, [0, 0, 0, 9], True, 3),
    ],
    ids=str,
)
def test_who_cannot_explore_is_predicted_from_its_task_or_from_who_is_like_it(
    tasks, scouted_count, predict, wanted
):
    strategy = replace(PLAIN, explore_trains=True, predict=predict)
    sizes, memories = (100, 300, 1000, 50, 9000), (None, None, None, bytes_for(1), bytes_for(1))
    clients = [
        ClientInfo(k, memories[k], sizes[k], f"{tasks}Z"[k] if tasks else None) for k in range(5)
    ]
    state = strategy.init(MODEL, clients)
    updates = [explored(k, ABLE_COUNTS[k]) for k in range(3)]
    # The last is just like client 3, but could not explore either: it has nothing to tell.
    updates += [scouted(k, scouted_count) for k in (3, 4)]
    state = strategy.aggregate(state, updates)
    assert state.whole == {0: True, 1: True, 2: True, 3: False, 4: False}
    assert state.sub_moes[3] == chosen(wanted)
    assert state.sub_moes[0] == chosen(0)  # who could explore keeps what it measured


def test_prediction_weighs_by_data_size():
    # 300 * 1 > 100 * 1: without weights the tie would go to expert 0.
    strategy = replace(PLAIN, explore_trains=True, predict=True, theta_cap=0.75)
    clients = [ClientInfo(0, None, 100, "A"), ClientInfo(1, None, 300, "A")]
    clients.append(ClientInfo(2, bytes_for(3), 1, "A"))
    state = strategy.aggregate(
        strategy.init(MODEL, clients),
        [explored(0, [1, 0, 0, 0]), explored(1, [0, 1, 0, 0]), scouted(2, [0, 0, 1, 1])],
    )
    assert state.sub_moes[2] == chosen(1)  # 0.75 covers just what is asked for


# What is observed


def test_the_last_observed_share_is_kept_per_client_and_expert_with_its_round():
    strategy = replace(PLAIN, patience=None)
    clients = [ClientInfo(0, bytes_for(2)), ClientInfo(1)]
    state = strategy.aggregate(strategy.init(MODEL, clients), [scouted(0, [5, 3, 2, 0])])
    assert state.p[0].tolist() == [[0.5, 0.3, 0.2, 0.0]]
    assert state.seen[0].tolist() == [[0, 0, 0, 0]]
    assert 1 not in state.p  # has not been asked yet
    state = strategy.aggregate(state, [])  # a round without it
    state = strategy.aggregate(state, [update(0, NOTHING, [1, 3, 0, 0])])
    assert state.p[0].tolist() == [[0.25, 0.75, 0.2, 0.0]]
    assert state.seen[0].tolist() == [[2, 2, 0, 0]]


def test_a_client_first_seen_after_exploring_scouts_first():
    clients = [ClientInfo(k, bytes_for(1)) for k in range(2)]
    state = PLAIN.init(MODEL, clients)
    state = PLAIN.aggregate(state, [scouted(0, [1, 0, 0, 0])])
    for _ in range(3):
        state = PLAIN.aggregate(state, [scored(0, chosen(0), 0.5)])
    before = state.sub_moes[0]
    assignments = PLAIN.assign(state, clients)
    assert assignments[0].job is Job.TRAIN
    assert (assignments[1].job, assignments[1].sub_moe) == (Job.SCOUT, frozenset())
    state = PLAIN.aggregate(state, [scored(0, chosen(0), 0.6), scouted(1, [0, 0, 7, 1])])
    assert state.sub_moes == {0: before, 1: chosen(2)}
    assert PLAIN.changes(state) == (Change(1, "choose", (ExpertId(0, 2),)),)
    assert PLAIN.assign(state, clients)[1].job is Job.TRAIN


# Advice, by hand. Client 0's cosine is 0.981 to client 1 and 0.171 to client 2, so by Eq. 6
# the advice of both is (0.511, 0.370, 0.119, 0).

P = {0: [0.5, 0.5, 0.0, 0.0], 1: [0.6, 0.4, 0.0, 0.0], 2: [0.0, 0.2, 0.8, 0.0]}
TWO = replace(PLAIN, neighbours=2)


@pytest.mark.parametrize(
    "held, others, wanted",
    [
        ([0], ([0, 1], [1, 2]), [0, 1]),  # n = 2 - 1 = 1: expert 1 before 2
        ([0], ([0, 1, 2], [1, 2]), [0, 1, 2]),  # n = 2.5 - 1, rounded away from zero to 2
        ([3], ([0, 1], [0]), [0, 3]),  # n = 1.5 - 1, rounded away from zero to 1
        ([0, 1, 2, 3], ([0, 1], [1, 2]), [0, 1]),  # n = 2 - 4: the two least
        ([0, 1, 2, 3], ([0, 1, 2], [1, 2]), [0, 1]),  # n = 2.5 - 4, rounded to -2
        ([1, 2, 3], ([0, 1, 2], [1, 2]), [1, 2]),  # n = 2.5 - 3, rounded to -1
        ([2, 3], ([0, 1, 2], [3]), [2, 3]),  # n = 2 - 2: as it is
        ([0], ([0, 1, 2, 3], [0, 1, 2, 3]), [0, 1, 2, 3]),
        ([0, 1, 2, 3], ([0], [0]), [0]),
    ],
    ids=str,
)
def test_advice_to_add_and_to_drop_worked_by_hand(held, others, wanted):
    sub_moes = {0: chosen(*held), 1: chosen(*others[0]), 2: chosen(*others[1])}
    assert TWO.adjusted(state_of(sub_moes, P), 0) == chosen(*wanted)


@pytest.mark.parametrize(
    "adjusts, more, fewer",
    [("both", [0, 1], [0, 1]), ("add", [0, 1], None), ("drop", None, [0, 1])],
)
def test_advice_may_be_to_add_alone_or_to_drop_alone(adjusts, more, fewer):
    strategy = replace(TWO, adjusts=adjusts)
    for held, wanted in (([0], more), ([0, 1, 2, 3], fewer)):
        sub_moes = {0: chosen(*held), 1: chosen(0, 1), 2: chosen(1, 2)}
        adjusted = strategy.adjusted(state_of(sub_moes, P), 0)
        assert adjusted == chosen(*(held if wanted is None else wanted))


def test_only_the_nearest_are_asked():
    sub_moes = {0: chosen(0), 1: chosen(0, 1), 2: chosen(0, 1, 2, 3)}
    one = replace(PLAIN, neighbours=1)
    assert one.adjusted(state_of(sub_moes, P), 0) == chosen(0, 1)


def test_advice_is_taken_as_far_as_the_whole_memory_goes():
    sub_moes = {0: chosen(3), 1: chosen(0, 1, 2, 3), 2: chosen(0, 1, 2, 3)}
    strategy = replace(TWO, alpha=0.5)  # the reserve is for additions
    for count, wanted in ((1, [3]), (2, [0, 3]), (3, [0, 1, 3])):
        clients = {0: ClientInfo(0, bytes_for(count)), 1: ClientInfo(1), 2: ClientInfo(2)}
        state = state_of(sub_moes, P, clients)
        assert strategy.adjusted(state, 0) == chosen(*wanted)


def test_a_layer_never_falls_below_its_minimum():
    sub_moes = {0: chosen(0, 1, 2, 3), 1: chosen(0), 2: chosen(1)}
    for least in (1, 2, 3):
        strategy = replace(TWO, min_experts=least)
        assert len(strategy.adjusted(state_of(sub_moes, P), 0)) == least


def test_experts_are_dropped_over_all_layers_together_but_one_stays_in_each():
    experts = {ExpertId(i, e): {"v": torch.ones(1)} for i in range(2) for e in range(2)}
    model = MoEState({"w": torch.ones(1)}, experts)
    # The neighbour uses layer 0's experts far less than layer 1's.
    p = {k: torch.tensor([[0.1, 0.2], [0.9, 0.8]]).double() for k in range(2)}
    whole, one = frozenset(experts), frozenset({ExpertId(1, 0)})
    state = replace(
        state_of({0: whole, 1: one}, {0: [0.0] * 4, 1: [0.0] * 4}, model=model), p=p
    )
    # n = 1 - 4 = -3, but only one may go from each layer: the least used ones.
    assert PLAIN.adjusted(state, 0) == {ExpertId(0, 1), ExpertId(1, 0)}


def test_without_similar_clients_nothing_changes():
    p = {0: [1.0, 0.0, 0.0, 0.0], 1: [0.0, 1.0, 0.0, 0.0], 2: [0.0, 0.0, 1.0, 0.0]}
    sub_moes = {0: chosen(0), 1: chosen(0, 1, 2), 2: chosen(0, 1, 2)}
    assert TWO.adjusted(state_of(sub_moes, p), 0) == chosen(0)
    alone = state_of({0: chosen(0)}, {0: [1.0, 0.0, 0.0, 0.0]})
    assert TWO.adjusted(alone, 0) == chosen(0)


def test_advice_may_be_limited_to_clients_of_the_same_task():
    clients = {0: ClientInfo(0, task="a"), 1: ClientInfo(1, task="b"), 2: ClientInfo(2, task="a")}
    sub_moes = {0: chosen(0), 1: chosen(0, 1, 2, 3), 2: chosen(1, 2)}
    state = state_of(sub_moes, P, clients)
    assert replace(TWO, same_task_only=True).adjusted(state, 0) == chosen(0, 2)
    assert replace(TWO, same_task_only=False).adjusted(state, 0) == chosen(0, 1, 2)


# Trial, keeping, going back


def play(strategy, scores, state=None):
    """Rounds in which client 0 has these scores; what it held in each, and its changes."""
    state = state or state_of({0: chosen(0), 1: chosen(0, 1), 2: chosen(1, 2)}, P)
    held, actions = [], []
    for score in scores:
        held.append(sorted(e.expert for e in state.sub_moes[0]))
        state = strategy.aggregate(state, [scored(0, state.sub_moes[0], score)])
        actions.append([c.action for c in strategy.changes(state) if c.client == 0])
    return held, actions, state


def test_a_stuck_client_tries_a_change_and_goes_back_for_good_if_it_does_not_help():
    strategy = replace(TWO, patience=2)
    scores = [0.5, 0.5, 0.4, 0.5, 0.3] + [0.2] * 8
    held, actions, state = play(strategy, scores)
    assert held == [[0]] * 3 + [[0, 1]] * 2 + [[0]] * 8
    assert actions == [[], [], ["add"], [], ["revert", "freeze"]] + [[]] * 8
    assert state.progress[0].frozen and state.progress[0].previous is None


def test_a_change_that_helps_is_kept_and_the_next_one_is_on_trial_anew():
    strategy = replace(TWO, patience=1)
    # 0.4: stuck; 0.6: the added expert helps; 0.6: stuck, but now n = 0; nothing more to gain.
    held, actions, state = play(strategy, [0.5, 0.4, 0.6, 0.6, 0.6])
    assert held == [[0], [0], [0, 1], [0, 1], [0, 1]]
    assert actions == [[], ["add"], [], [], []]
    assert not state.progress[0].frozen
    # Somebody gains experts, so there is advice again; what it then loses is the second change.
    more = replace(state, sub_moes=state.sub_moes | {1: chosen(0, 1, 2, 3), 2: chosen(0, 1, 2)})
    held, actions, state = play(strategy, [0.6, 0.6, 0.6, 0.6], more)
    assert held == [[0, 1], [0, 1, 2, 3], [0, 1], [0, 1]]
    assert actions == [["add"], ["revert", "freeze"], [], []]


def test_the_changes_name_the_experts():
    state = state_of({0: chosen(0), 1: chosen(0, 1), 2: chosen(1, 2)}, P)
    state = replace(state, progress={0: Progress(0.9, 2)})
    state = PLAIN.aggregate(state, [scored(0, chosen(0), 0.5)])
    assert PLAIN.changes(state) == (Change(0, "add", (ExpertId(0, 1),)),)
    for _ in range(3):
        state = PLAIN.aggregate(state, [scored(0, chosen(0, 1), 0.5)])
    assert PLAIN.changes(state) == (
        Change(0, "revert", (ExpertId(0, 1),)),
        Change(0, "freeze", ()),
    )


def test_a_client_may_lose_experts_and_get_them_back():
    start = state_of({0: chosen(0, 1, 2, 3), 1: chosen(0), 2: chosen(1, 2)}, P)
    held, actions, _ = play(replace(TWO, patience=1), [0.5, 0.5, 0.5, 0.5], start)
    # n = 1.5 - 4, rounded to -3. Its own shares are 1/4 each by then, its cosines 0.693 and 0.606,
    # and so the advice is (0.32, 0.31, 0.37, 0).
    assert held == [[0, 1, 2, 3], [0, 1, 2, 3], [2], [0, 1, 2, 3]]
    assert actions == [[], ["drop"], ["revert", "freeze"], []]


def test_patience_1_is_the_papers_algorithm_and_none_never_changes():
    assert play(replace(TWO, patience=1), [0.5, 0.5])[1] == [[], ["add"]]
    assert play(replace(TWO, patience=3), [0.5] * 4)[1] == [[], [], [], ["add"]]
    assert play(replace(TWO, patience=None), [0.5] * 9)[1] == [[]] * 9


def test_a_smaller_gain_than_asked_for_is_none():
    scores = [0.5, 0.55, 0.55]
    assert play(replace(TWO, patience=1), scores)[1] == [[], [], ["add"]]
    picky = replace(TWO, patience=1, min_delta=0.1)
    assert play(picky, scores)[1] == [[], ["add"], ["revert", "freeze"]]


def test_a_score_of_0_is_a_score():
    assert play(replace(TWO, patience=1), [0.0, 0.0])[1] == [[], ["add"]]


def test_rounds_without_a_score_do_not_count():
    assert play(replace(TWO, patience=1), [0.5, None, None, 0.6, 0.6])[1] == [[]] * 4 + [["add"]]


def test_the_score_of_the_whole_model_is_not_what_a_part_is_held_to():
    # Whether the server happened to evaluate while exploring must not matter either.
    strategy = replace(PLAIN, explore_trains=True)
    state = strategy.init(MODEL, [ClientInfo(0, bytes_for(4))])
    note = replace(explored(0, [3, 1, 0, 0]), metrics={"loss": 1.0, "trained_validation": 0.9})
    state = strategy.aggregate(state, [note])
    assert state.progress == {}
    state = strategy.aggregate(state, [scored(0, state.sub_moes[0], 0.5)])
    assert state.progress[0] == Progress(0.5, 0)


# The average


def test_experts_and_the_rest_are_averaged_in_every_phase():
    state = state_of({0: chosen(0), 1: chosen(0, 1)}, {k: [0.5, 0.5, 0, 0] for k in range(2)})
    updates = [
        update(0, one_layer(3.0, 3.0), [3, 0, 0, 0], num_examples=1),
        update(1, one_layer(5.0, 7.0, 9.0), [1, 0, 0, 0], num_examples=3),
    ]
    for weigh, wanted in ((PLAIN.weigh, 4.0), (by_examples, 6.0)):
        model = replace(PLAIN, weigh=weigh).aggregate(state, updates).model
        assert model.shared["w"].item() == 4.5  # (1*3 + 3*5) / 4
        assert model.experts[ExpertId(0, 0)]["v"].item() == wanted  # (3*3+1*7)/4, (1*3+3*7)/4
        assert [model.experts[ExpertId(0, e)]["v"].item() for e in (1, 2, 3)] == [2.0, 3.0, 4.0]


def test_the_state_after_a_round_does_not_depend_on_who_answers_first():
    strategy = replace(FedMoE(), patience=1, alpha=0.7)
    clients = [ClientInfo(k, bytes_for(k + 1)) for k in range(4)]
    counts = ([7, 2, 1, 0], [1, 1, 1, 7], [5, 5, 0, 0], [0, 0, 5, 5])
    start = strategy.init(MODEL, clients)
    rounds = [[scouted(k, c) for k, c in enumerate(counts)]]
    for score in (0.5, 0.5, 0.5):
        moved = [one_layer(0.1 * k, *(0.3 * k + e for e in range(4))) for k in range(4)]
        rounds.append(
            [
                update(k, moved[k], [k + 1, 5, 3, 4 - k], 10 + k, {"trained_validation": score})
                for k in range(4)
            ]
        )
    for updates in rounds:
        ends = [strategy.aggregate(start, iter(order)) for order in permutations(updates)]
        assert len({content_hash(end) for end in ends}) == 1
        assert start.round + 1 == ends[0].round
        start = ends[0]


def test_clients_that_change_in_the_same_round_do_so_in_order_of_number():
    held = {0: chosen(0), 1: chosen(0, 1, 2, 3), 2: chosen(1, 2)}
    stuck = replace(state_of(held, P), progress=dict.fromkeys(range(3), Progress(0.9, 9)))
    updates = [scored(k, held[k], 0.5) for k in range(3)]
    ends = [TWO.aggregate(stuck, iter(order)) for order in permutations(updates)]
    assert len({content_hash(end) for end in ends}) == 1
    # n = (4 + 2) / 2 - 1, (1 + 2) / 2 - 4 and (1 + 4) / 2 - 2
    assert [(c.client, c.action) for c in TWO.changes(ends[0])] == [
        (0, "add"), (1, "drop"), (2, "add")
    ]


def test_aggregating_changes_nothing_of_the_state_before():
    state = state_of({0: chosen(0), 1: chosen(0, 1), 2: chosen(1, 2)}, P)
    before = content_hash(state)
    metrics = {"trained_validation": 0.5}
    PLAIN.aggregate(state, [update(0, one_layer(9.0, 9.0), [5, 0, 0, 0], 7, metrics)])
    assert content_hash(state) == before


# What is refused


@pytest.mark.parametrize("least, needed", [(1, bytes_for(1)), (3, bytes_for(3))])
def test_a_client_with_too_little_memory_is_named_before_the_first_round(least, needed):
    strategy = replace(PLAIN, min_experts=least)
    strategy.init(MODEL, [ClientInfo(0), ClientInfo(7, needed)])
    with pytest.raises(ValueError, match=f"client 7: .* at least {needed} .* got {needed - 1}"):
        strategy.init(MODEL, [ClientInfo(0), ClientInfo(7, needed - 1)])


def test_more_experts_than_a_layer_has_are_refused_before_the_first_round():
    with pytest.raises(ValueError, match="min_experts must be at most the 2 experts of layer 1"):
        FedMoE(min_experts=3).init(split_state(ragged()), [ClientInfo(0)])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"explore_rounds": -1}, "explore_rounds must be 0 or more, got -1"),
        ({"adjusts": "never"}, 'adjusts must be "both", "add" or "drop", got \'never\''),
        ({"alpha": 0.0}, "alpha must be above 0 and at most 1, got 0.0"),
        ({"alpha": 1.1}, "alpha must be above 0"),
        ({"patience": 0}, "patience must be at least 1 round or None, got 0"),
        ({"smooth_over": -1}, "smooth_over must be at least 0, got -1"),
        ({"neighbours": 0}, "neighbours must be at least 1, got 0"),
        ({"min_experts": 0}, "min_experts must be at least 1, got 0"),
        ({"sharpness": -1.0}, "sharpness must be 0 or more, got -1.0"),
        ({"min_delta": -0.1}, "min_delta must be 0 or more, got -0.1"),
        ({"kinship": 1.5}, "kinship must be between 0 and 1, got 1.5"),
        ({"alike": -2.0}, "alike must be between -1 and 1, got -2.0"),
        ({"theta_cap": 1.1}, "theta_cap must be between 0 and 1, got 1.1"),
    ],
    ids=str,
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FedMoE(**fields)


def test_the_published_method_is_the_papers():
    strategy = as_published(explore_rounds=4, alpha=0.6, patience=1)
    assert (strategy.explore_rounds, strategy.alpha, strategy.patience) == (4, 0.6, 1)
    assert strategy.explore_trains and strategy.predict and strategy.measure is frequency
    assert (strategy.smooth_over, strategy.sharpness, strategy.centred) == (0, 0.0, False)
    assert strategy.weigh is by_examples
    assert profile([1, 3]).frequency_LE.tolist() == [[0.25, 0.75]]


# A shared part for each group of similar clients

TWO_KINDS = {0: [9, 1, 0, 0], 1: [8, 2, 0, 0], 2: [0, 0, 1, 9], 3: [0, 0, 2, 8]}


def with_shared(client, state, value):
    """An update of 10 examples whose shared part is `value`, and whose experts are as sent."""
    [a] = KIN.assign(state, [state.clients[client]]).values()
    model = MoEState({"w": number(value)}, a.model.experts)
    count = [int(ExpertId(0, e) in a.sub_moe) for e in range(4)]
    return update(client, model, count, num_examples=10)


KIN = replace(PLAIN, centred=True, kinship=0.75, patience=None)


def grouped():
    state = KIN.init(MODEL, [ClientInfo(k, bytes_for(2)) for k in range(5)])
    return KIN.aggregate(state, [scouted(k, count) for k, count in TWO_KINDS.items()])


def test_groups_of_similar_clients_have_shared_parts_of_their_own():
    state = grouped()
    assert state.kin == {0: 0, 1: 0, 2: 1, 3: 1}
    values = [2.0, 4.0, 10.0, 20.0]  # the groups' means are 3 and 15, that of all is 9
    after = KIN.aggregate(state, [with_shared(k, state, v) for k, v in enumerate(values)])
    sent = KIN.assign(after, [after.clients[k] for k in range(4)])
    got = [float(sent[k].model.shared["w"]) for k in range(4)]
    assert got == pytest.approx([4.5, 4.5, 13.5, 13.5])  # three quarters of the way from 9
    assert float(KIN.merged(after).shared["w"]) == pytest.approx(9.0)


def test_clients_that_differ_by_no_more_than_their_error_are_of_one_group():
    counts = {0: [9, 1, 0, 0], 1: [5, 1, 4, 0], 2: [0, 0, 1, 9], 3: [0, 0, 2, 8]}
    found = {}
    for error in (0.0, 0.2):
        told = [
            update(k, NOTHING, count, num_examples=10, metrics={FREQUENCY_ERROR: error * (k < 2)})
            for k, count in counts.items()
        ]
        state = KIN.init(MODEL, [ClientInfo(k, bytes_for(2)) for k in range(4)])
        state = KIN.aggregate(state, told)
        assert state.error == {k: error * (k < 2) for k in range(4)}
        assert not any(state.whole.values())  # to tell an error is not to have trained
        found[error] = dict(state.kin)
    assert found == {0.0: {0: 0, 1: 1, 2: 2, 3: 2}, 0.2: {0: 0, 1: 0, 2: 1, 3: 1}}


def test_a_group_that_sends_nothing_keeps_its_part_of_the_way():
    state = grouped()
    after = KIN.aggregate(state, [with_shared(0, state, 5.0)])
    old = float(MODEL.shared["w"])
    got = [float(after.shared[g]["w"]) for g in (0, 1)]
    assert got == pytest.approx([5.0, 5.0 + 0.75 * (old - 5.0)])


def test_who_comes_later_joins_the_group_of_the_most_similar():
    state = grouped()
    state = KIN.aggregate(state, [scouted(4, [0, 0, 4, 6])])
    assert state.kin == {0: 0, 1: 0, 2: 1, 3: 1, 4: 1}


def test_without_kinship_there_are_no_groups():
    strategy = replace(KIN, kinship=0.0)
    state = strategy.init(MODEL, [ClientInfo(k, bytes_for(2)) for k in range(4)])
    state = strategy.aggregate(state, [scouted(k, count) for k, count in TWO_KINDS.items()])
    assert not state.kin and not state.shared


def test_clients_of_one_group_are_given_the_same_experts():
    counts = [[6, 4, 0, 0], [4, 6, 0, 0], [6, 4, 0, 0]] + 3 * [[0, 0, 4, 6]]
    chosen = {}
    for kinship in (0.0, 0.75):
        strategy = replace(KIN, kinship=kinship, smooth_over=1)
        state = strategy.init(MODEL, [ClientInfo(k, bytes_for(1)) for k in range(6)])
        state = strategy.aggregate(state, [scouted(k, count) for k, count in enumerate(counts)])
        assert dict(state.kin) == ({0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1} if kinship else {})
        chosen[kinship] = [[e.expert for e in state.sub_moes[k]] for k in range(6)]
    assert chosen == {
        0.0: [[0], [1], [0], [3], [3], [3]],
        0.75: [[0], [0], [0], [3], [3], [3]],
    }


def test_group_averages_do_not_depend_on_who_answers_first():
    state = grouped()
    updates = [with_shared(k, state, v) for k, v in enumerate([0.1, 0.7, 1 / 3, 1e-3])]
    hashes = {content_hash(KIN.aggregate(state, order)) for order in permutations(updates)}
    assert len(hashes) == 1


# Many clients


def kinds(count, seed=0):
    """Scouts' counts of clients of two kinds, each a little different."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 3, (count, 4), generator=draw)
    base = torch.tensor([[9, 7, 1, 1], [1, 1, 7, 9]])
    return [(base[k % 2] + noise[k]).tolist() for k in range(count)]


def rounds_of(strategy, clients, counts, per_round=4):
    """The state after everybody came once, in turns, and then everybody once more."""
    state = strategy.init(MODEL, clients)
    for start in range(0, 2 * len(counts), per_round):
        came = [(start + i) % len(counts) for i in range(per_round)]
        asked = strategy.ask(state, [clients[k] for k in came])
        state = strategy.heard(state, [scouted(k, counts[k]) for k in asked]) if asked else state
        given = strategy.assign(state, [clients[k] for k in came])
        notes = [
            scouted(k, counts[k]) if a.job is Job.SCOUT else scored(k, a.sub_moe, 0.5)
            for k, a in given.items()
        ]
        state = strategy.aggregate(state, notes)
    return state


@pytest.mark.parametrize("asks", [False, True])
def test_a_population_is_served_as_a_tuple_is(asks):
    clients = [ClientInfo(k, bytes_for(1 + k % 3), 5 + k) for k in range(16)]
    strategy = FedMoE(kinship=0.5, patience=1, neighbours=2, ask_newcomers=asks)
    ends = [rounds_of(strategy, c, kinds(16)) for c in (clients, Population.of(clients))]
    assert ends[0].sub_moes == ends[1].sub_moes and len(ends[0].sub_moes) == 16
    assert ends[0].progress == ends[1].progress and ends[0].kin == ends[1].kin
    for k in range(16):  # half as precise
        assert torch.allclose(ends[0].p[k], ends[1].p[k].double(), atol=1e-7)


def test_one_poor_client_of_a_population_is_named():
    memory = [bytes_for(3)] * 900 + [bytes_for(1)] * 99 + [1]
    poor = Population.of([ClientInfo(k, m) for k, m in enumerate(memory)])
    with pytest.raises(ValueError, match="client 999: memory_bytes must be at least 8"):
        FedMoE().init(MODEL, poor)


def test_without_exploring_a_population_draws_experts_for_those_who_come():
    clients = [ClientInfo(k, bytes_for(1 + k)) for k in range(4)]
    strategy = replace(PLAIN, explore_rounds=0, seed=7)
    plain, lazy = (strategy.init(MODEL, c) for c in (clients, Population.of(clients)))
    assert lazy.sub_moes == {}
    given = [strategy.assign(s, clients[1:3]) for s in (plain, lazy)]
    drawn = random_choice(MODEL, clients[1:3], 7)
    assert [{k: a.sub_moe for k, a in g.items()} for g in given] == [drawn, drawn]
    notes = [scored(k, plain.sub_moes[k], 0.5) for k in (1, 2)]
    plain, lazy = (strategy.aggregate(s, notes) for s in (plain, lazy))
    assert lazy.sub_moes == {k: plain.sub_moes[k] for k in (1, 2)}
    assert lazy.p[1].tolist() == plain.p[1].tolist() and lazy.progress == plain.progress


def test_newcomers_that_are_asked_scout_and_then_train_in_one_round():
    clients = [ClientInfo(k, bytes_for(2)) for k in range(4)]
    strategy = replace(PLAIN, explore_rounds=1, ask_newcomers=True)
    state = strategy.init(MODEL, clients)
    assert strategy.ask(state, clients) == {}  # all explore
    state = strategy.aggregate(state, [scouted(0, [5, 1, 1, 1])])
    asked = strategy.ask(state, clients[:3])
    assert {k: a.job for k, a in asked.items()} == {1: Job.SCOUT, 2: Job.SCOUT}
    state = strategy.heard(state, [scouted(2, [1, 1, 5, 4]), scouted(1, [1, 5, 4, 1])])
    assert state.sub_moes == {0: chosen(0, 1), 1: chosen(1, 2), 2: chosen(2, 3)}
    assert state.changes == ()  # a round's changes are told at its end
    given = strategy.assign(state, clients[:3])
    assert {k: a.job for k, a in given.items()} == dict.fromkeys(range(3), Job.TRAIN)
    state = strategy.aggregate(state, [scored(k, a.sub_moe, 0.5) for k, a in given.items()])
    assert [(c.client, c.action) for c in state.changes] == [(1, "choose"), (2, "choose")]
    assert {k: state.progress[k] for k in range(3)} == dict.fromkeys(range(3), Progress(0.5, 0))
    state = strategy.aggregate(state, [scored(0, state.sub_moes[0], 0.5)])
    assert state.changes == () and strategy.ask(state, clients[:3]) == {}


def test_by_default_nobody_is_asked():
    state = PLAIN.init(MODEL, [ClientInfo(0)])
    assert PLAIN.ask(replace(state, round=3), [ClientInfo(0)]) == {}
    assert PLAIN.heard(state, []).sub_moes == {}


def test_a_neighbourhood_that_holds_all_changes_nothing():
    clients = [ClientInfo(k, bytes_for(2)) for k in range(16)]
    base = FedMoE(kinship=1.0, patience=1)
    wide, narrow = (
        rounds_of(replace(base, neighbourhood=n), clients, kinds(16)) for n in (16, 500)
    )
    assert content_hash(wide) == content_hash(narrow)


def test_a_small_neighbourhood_still_serves_everybody_and_finds_the_kinds():
    clients = [ClientInfo(k, bytes_for(2)) for k in range(40)]
    strategy = FedMoE(kinship=1.0, patience=1, neighbourhood=8, alike=0.3, seed=3)
    state = rounds_of(strategy, clients, kinds(40))
    assert len(state.sub_moes) == len(state.kin) == 40
    by_kind = [{state.kin[k] for k in range(kind, 40, 2)} for kind in (0, 1)]
    assert not by_kind[0] & by_kind[1]  # clients joined those that are like them
    assert content_hash(state) == content_hash(rounds_of(strategy, clients, kinds(40)))


def test_no_more_than_the_neighbourhood_is_compared(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "fedmoe.federated.fedmoe.similarity",
        lambda p_KLE, **how: sizes.append(len(p_KLE)) or similarity(p_KLE, **how),
    )
    clients = [ClientInfo(k, bytes_for(2)) for k in range(60)]
    rounds_of(FedMoE(kinship=1.0, patience=1, neighbourhood=8), clients, kinds(60))
    assert max(sizes) <= 8 + 4  # and those who take part


def test_more_first_choices_at_once_than_a_neighbourhood_are_made_in_parts():
    clients = [ClientInfo(k, bytes_for(2)) for k in range(50)]
    strategy = FedMoE(kinship=1.0, neighbourhood=8)
    state = strategy.init(MODEL, clients)
    state = strategy.aggregate(state, [scouted(k, row) for k, row in enumerate(kinds(50))])
    assert len(state.sub_moes) == len(state.kin) == len(state.changes) == 50


def test_a_neighbourhood_of_one_is_refused():
    with pytest.raises(ValueError, match="neighbourhood must be at least 2, got 1"):
        FedMoE(neighbourhood=1)
