"""Tensors, assignments and updates drawn at random, and whether two of them are the same."""

import math

import torch
from hypothesis import strategies as st

from fedmoe.state import state_hash
from fedmoe.types import (
    ActivationProfile,
    Assignment,
    ClientUpdate,
    ExpertId,
    Job,
    MoEState,
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)

names = st.text(min_size=1, max_size=8) | st.sampled_from(
    ["gate:proj.weight", "a/b", "expert/0.0/v", "metric/loss", "head", "é", '"', "\\", "\x00", "😀"]
)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
tensors = st.builds(
    lambda shape, dtype, seed: torch.randn(
        shape, generator=torch.Generator().manual_seed(seed)
    ).to(dtype),
    shapes,
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
parts = st.dictionaries(names, tensors, max_size=3)
full_parts = st.dictionaries(names, tensors, min_size=1, max_size=3)
expert_ids = st.builds(ExpertId, st.integers(0, 12), st.integers(0, 300))
by_expert = st.dictionaries(expert_ids, full_parts, max_size=3)
models = st.builds(MoEState, parts, by_expert)
assignments = st.builds(
    Assignment,
    st.integers(0, 10**6),
    models,
    st.frozensets(expert_ids, max_size=4),
    st.sampled_from(Job),
    st.booleans(),
    st.booleans(),
    by_expert,
    parts,
    parts,
    st.none() | st.integers(1, 9),
)


@st.composite
def profiles(draw):
    num_layers, num_experts = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    count_LE = torch.randint(0, 50, (num_layers, num_experts), generator=generator)
    share_LE = torch.rand(num_layers, num_experts, generator=generator, dtype=torch.float64)
    return ActivationProfile(count_LE, share_LE, share_LE / 3, count_LE.sum(-1))


updates = st.builds(
    ClientUpdate,
    st.integers(0, 2**62),
    st.integers(0, 2**40),
    models,
    profiles(),
    st.dictionaries(names, st.floats(), max_size=3),
    parts,
)


def same_profile(a, b):
    return all(
        torch.equal(getattr(a, n), getattr(b, n)) and getattr(a, n).dtype == getattr(b, n).dtype
        for n in ("count_LE", "weight_LE", "score_LE", "token_L")
    )


def same_assignment(a, b):
    return (
        (a.round, a.sub_moe, a.job, a.validate, a.evaluate, a.choose)
        == (b.round, b.sub_moe, b.job, b.validate, b.evaluate, b.choose)
        and state_hash(MoEState(a.once, {})) == state_hash(MoEState(b.once, {}))
        and state_hash(MoEState(a.extra, {})) == state_hash(MoEState(b.extra, {}))
        and state_hash(a.model) == state_hash(b.model)
        and state_hash(MoEState({}, a.absent_rows)) == state_hash(MoEState({}, b.absent_rows))
    )


def same_update(a, b):
    return (
        (a.client, a.num_examples) == (b.client, b.num_examples)
        and state_hash(a.model) == state_hash(b.model)
        and state_hash(MoEState(a.extra, {})) == state_hash(MoEState(b.extra, {}))
        and same_profile(a.profile, b.profile)
        and a.metrics.keys() == b.metrics.keys()
        and all(v == b.metrics[n] or math.isnan(v) for n, v in a.metrics.items())
    )
