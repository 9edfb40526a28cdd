from fedmoe.federated.methods.pruning import FrequencyPruning
from fedmoe.federated.select import memory_for
from fedmoe.state import split_state
from fedmoe.types import ClientInfo, ClientUpdate, ExpertId, Job, MoEState
from tests.tiny import profile, tiny

MODEL = split_state(tiny())
SHARES = (0.25, 0.5, 0.75)
CLIENTS = [ClientInfo(k, memory_for(MODEL, share)) for k, share in enumerate(SHARES)]
NOTHING = MoEState({}, {})


def scouted(client, *counts):
    return ClientUpdate(client, 10, NOTHING, profile(list(counts)), {})


def chosen(state):
    return {k: sorted(e.expert for e in held) for k, held in sorted(state.sub_moes.items())}


def test_everybody_holds_the_first_of_one_ranking_for_good():
    strategy = FrequencyPruning()
    state = strategy.init(MODEL, CLIENTS)
    assert {a.job for a in strategy.assign(state, CLIENTS).values()} == {Job.SCOUT}
    # Mean shares: (0.9 + 0 + 0.1) / 3, (0 + 0.6 + 0.5) / 3, (0.1 + 0 + 0.4) / 3, (0 + 0.4 + 0) / 3
    answers = [scouted(0, 9, 0, 1, 0), scouted(1, 0, 6, 0, 4), scouted(2, 1, 5, 4, 0)]
    state = strategy.aggregate(state, answers)
    assert chosen(state) == {0: [1], 1: [0, 1], 2: [0, 1, 2]}
    for _ in range(5):  # whatever clients do from now on
        jobs = strategy.assign(state, CLIENTS)
        assert {a.job for a in jobs.values()} == {Job.TRAIN}
        assert not any(a.validate for a in jobs.values())
        trained = [
            ClientUpdate(k, 10, a.model, used(a.sub_moe), {"loss": 1.0}) for k, a in jobs.items()
        ]
        state = strategy.aggregate(state, trained)
        assert not state.changes
    assert chosen(state) == {0: [1], 1: [0, 1], 2: [0, 1, 2]}


def used(sub_moe):
    return profile([int(ExpertId(0, e) in sub_moe) for e in range(4)])


def test_who_comes_later_is_given_the_ranking_of_all_so_far():
    strategy = FrequencyPruning()
    state = strategy.init(MODEL, CLIENTS)
    state = strategy.aggregate(state, [scouted(0, 0, 0, 9, 1)])
    assert chosen(state) == {0: [2]}
    state = strategy.aggregate(state, [scouted(1, 4, 3, 3, 0)])
    assert chosen(state) == {0: [2], 1: [0, 2]}  # of its own, expert 1 is as good as 2
