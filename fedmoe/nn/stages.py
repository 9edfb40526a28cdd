"""What a model computes, told as data, so that it may be trained by other means than torch's.

A model is told as a sequence of stages: an embedding of codes, convolutions with their norms and
pools, linear maps with their activations, and MoE layers. Whoever trains by stages must give what
`model(x)` and its gradient do, so a model is told only if every part of it is known exactly.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from fedmoe.nn.classifier import StemAndHead
from fedmoe.nn.experts.ffn import FFN, Activation
from fedmoe.nn.gates.topk import TopKGate
from fedmoe.nn.grouped import is_hooked
from fedmoe.nn.members import ChosenGate, Member, Members
from fedmoe.nn.moe import MoE
from fedmoe.nn.sensors import SignalStem
from fedmoe.nn.text import CharacterStem
from fedmoe.nn.vision import ConvStem, Residual


class Dense(NamedTuple):
    """A linear map and what follows it."""

    linear: nn.Linear
    activation: Activation | None


class Mixture(NamedTuple):
    """A MoE layer whose gate is a `TopKGate` and whose experts are plain `FFN`."""

    moe: MoE
    gate: TopKGate
    experts: Mapping[int, FFN]  # those held
    residual: bool  # its input is added to its output


class Convolution(NamedTuple):
    """A convolution without padding, a normalisation or none, the largest of each pool, a ReLU."""

    conv: nn.Conv2d | nn.Conv1d
    pool: tuple[int, int]  # rows and columns; signals in time have one row
    norm: nn.BatchNorm2d | None = None


class Embedding(NamedTuple):
    """A row of numbers for each of an example's codes, side by side.

    Codes of any type are cut to whole numbers.
    """

    table: nn.Embedding
    length: int  # codes of an example


Stage = Dense | Mixture | Convolution | Embedding


class Only(NamedTuple):
    """The one of several members that all examples go to."""

    member: int
    num_members: int
    model: nn.Module
    shape: tuple[int, ...]  # of an example, as the model takes it

    def inputs(self, x_N: Tensor) -> Tensor | None:
        """Examples, or rows of them, as the model takes them; None: they are neither."""
        if x_N.dim() == 2 and x_N.shape[1] == math.prod(self.shape):
            return x_N.reshape(-1, *self.shape)
        return x_N if x_N.shape[1:] == self.shape else None


class UnknownPartError(ValueError):
    """A part of a model that cannot be told as a stage."""


def stages_of(model: nn.Module) -> tuple[Stage, ...]:
    """The model's stages, in the order in which they run; between the last convolution and the
    next stage, what an example has is laid out flat.

    Raises:
        UnknownPartError: a part is not known.
    """
    stages: list[Stage] = []
    for part in _parts(model):
        if isinstance(part, nn.Flatten):
            if (part.start_dim, part.end_dim) != (1, -1):
                raise UnknownPartError(f"a Flatten must keep the examples apart, got {part}")
            if any(not isinstance(s, Convolution) for s in stages):
                raise UnknownPartError("a Flatten must stand before all linear maps")
        elif isinstance(part, nn.ReLU | nn.GELU):
            last = stages[-1] if stages else None
            if not isinstance(last, Dense) or last.activation is not None:
                raise UnknownPartError(f"{type(part).__name__} must follow a linear map")
            if isinstance(part, nn.GELU) and part.approximate != "none":
                raise UnknownPartError("GELU must be exact")
            stages[-1] = last._replace(activation="relu" if isinstance(part, nn.ReLU) else "gelu")
        else:
            stages.append(part)
    if not stages:
        raise UnknownPartError("a model must have a stage, got none")
    if any(isinstance(s, Embedding) for s in stages[1:]):
        raise UnknownPartError("codes must be what the model is given")
    owned = {id(p) for p in model.parameters()}
    told = [id(p) for s in stages for p in parameters_of(s)]
    if len(told) != len(owned) or owned != set(told):
        raise UnknownPartError("every parameter must belong to one stage, and to one alone")
    norms = [s.norm for s in stages if isinstance(s, Convolution) and s.norm is not None]
    known = {id(b) for norm in norms for b in norm.buffers()}
    if any(
        name.split(".")[-1] not in OURS and id(b) not in known
        for name, b in model.named_buffers()
    ):
        raise UnknownPartError("a model must have no buffers but those of MoE layers and norms")
    return tuple(stages)


def only_member(model: nn.Module) -> Only | None:
    """Of plain `Members` the one that a `ChosenGate` has chosen; None where it is not so.

    What the whole gives is then the logarithm of this one's softmax, or its logits. Below a
    probability of about 1e-6 that logarithm is not exact: what rounding takes from the sum of 1
    goes to all classes.
    """
    if not isinstance(model, Members) or type(model) is not Members:
        return None
    moe, gate = model.mixture, model.mixture.gate
    if type(moe) is not MoE or type(gate) is not ChosenGate or model.encoder is not None:
        return None
    chosen = gate.member
    if chosen is None or chosen not in moe.held or not moe.present_E[chosen]:
        return None
    member = moe.experts[str(chosen)]
    if type(member) is not Member or any(is_hooked(m) for m in (model, moe, gate, member)):
        return None
    return Only(chosen, moe.num_experts, member.model, model.input_shape)


OURS = {"present_E", "known_E"}  # buffers that a MoE layer and its gate have
NO_PADDING = ((0,), (0, 0))


def parameters_of(stage: Stage) -> list[Tensor]:
    """All of a stage's parameters."""
    # By hand: to walk a model's modules takes as long as several steps of a small one.
    found: list[Tensor | None]
    match stage:
        case Dense(linear, _):
            found = [linear.weight, linear.bias]
        case Convolution(conv, _, norm):
            found = [conv.weight, conv.bias]
            if norm is not None:
                found += [norm.weight, norm.bias]
        case Embedding(table, _):
            found = [table.weight]
        case Mixture():
            found = [stage.gate.proj.weight]
            for e in stage.experts.values():
                found += [e.up.weight, e.up.bias, e.down.weight, e.down.bias]
    return [p for p in found if p is not None]


def _parts(m: nn.Module) -> Iterator[Stage | nn.Flatten | nn.ReLU | nn.GELU]:
    """Subclasses and modules with hooks are not known: they may do anything."""
    if is_hooked(m):
        raise UnknownPartError(f"{type(m).__name__} has a hook")
    kind = type(m)
    if isinstance(m, nn.Sequential) and kind is nn.Sequential:
        for part in m:  # not `children`, which leaves out what comes again
            yield from _parts(part)
    elif isinstance(m, StemAndHead) and kind is StemAndHead:
        yield from _parts(m.stem)
        yield from _parts(m.head)
    elif isinstance(m, nn.Linear) and kind is nn.Linear:
        yield Dense(m, None)
    elif isinstance(m, FFN) and kind is FFN:
        yield Dense(_linear(m.up), m.activation)
        yield Dense(_linear(m.down), None)
    elif isinstance(m, MoE) and kind is MoE:
        yield _mixture(m, residual=False)
    elif isinstance(m, Residual) and kind is Residual and isinstance(m.inner, MoE):
        yield _mixture(m.inner, residual=True)
    elif isinstance(m, ConvStem | SignalStem) and kind in (ConvStem, SignalStem):
        yield from _convolutions(m)
    elif isinstance(m, CharacterStem) and kind is CharacterStem:
        mix = _linear(m.mix)
        yield _embedding(m.embed, mix.in_features)
        yield Dense(mix, "relu")
    elif isinstance(m, nn.Flatten | nn.ReLU | nn.GELU) and kind in (nn.Flatten, nn.ReLU, nn.GELU):
        yield m
    else:
        raise UnknownPartError(f"{kind.__name__} is not known")


def _convolutions(m: ConvStem | SignalStem) -> Iterator[Convolution]:
    pool = (2, 2) if isinstance(m, ConvStem) else (1, 4)
    norms = [m.norm1, m.norm2] if isinstance(m, ConvStem) else [nn.Identity(), nn.Identity()]
    convs: list[nn.Conv2d | nn.Conv1d] = [m.conv1, m.conv2]
    for conv, norm in zip(convs, norms, strict=True):
        plain = type(conv) in (nn.Conv1d, nn.Conv2d) and not is_hooked(conv)
        if not plain or conv.bias is None or conv.groups != 1 or conv.padding_mode != "zeros":
            raise UnknownPartError("a convolution must be plain, with a bias")
        if any(s != 1 for s in (*conv.stride, *conv.dilation)) or conv.padding not in NO_PADDING:
            raise UnknownPartError("a convolution must have stride 1 and no padding")
        yield Convolution(conv, pool, _norm(norm, conv.out_channels))


def _norm(m: nn.Module, channels: int) -> nn.BatchNorm2d | None:
    """None where the module passes on what it is given."""
    if is_hooked(m):
        raise UnknownPartError(f"{type(m).__name__} has a hook")
    if type(m) is nn.Identity:
        return None
    if not isinstance(m, nn.BatchNorm2d) or type(m) is not nn.BatchNorm2d:
        raise UnknownPartError(f"the normalisation {type(m).__name__} is not known")
    if not m.affine or not m.track_running_stats or m.momentum is None:
        raise UnknownPartError(
            "a normalisation must have a weight, and running statistics with a momentum"
        )
    if m.num_features != channels:
        raise UnknownPartError(f"a normalisation must be of {channels} channels")
    return m


def _embedding(table: nn.Embedding, width: int) -> Embedding:
    if type(table) is not nn.Embedding or is_hooked(table):
        raise UnknownPartError("an embedding must be plain")
    if table.max_norm is not None or table.padding_idx is not None:
        raise UnknownPartError("an embedding's rows must have any norm, and all must learn")
    if table.sparse or table.scale_grad_by_freq:
        raise UnknownPartError("an embedding's gradient must be dense, and as it is")
    length, rest = divmod(width, table.embedding_dim)
    if rest:
        raise UnknownPartError("a linear map must take whole rows of an embedding")
    return Embedding(table, length)


def _mixture(moe: MoE, residual: bool) -> Mixture:
    gate = moe.gate
    if type(moe) is not MoE or is_hooked(moe):
        raise UnknownPartError("a MoE layer must be plain")
    if type(gate) is not TopKGate or type(gate.proj) is not nn.Linear:
        raise UnknownPartError(f"the gate {type(gate).__name__} is not known")
    if is_hooked(gate) or is_hooked(gate.proj):
        raise UnknownPartError("a gate has a hook")
    experts = {}
    for number, expert in moe.experts.items():
        if type(expert) is not FFN or is_hooked(expert):
            raise UnknownPartError(f"the expert {type(expert).__name__} is not known")
        _linear(expert.up)
        _linear(expert.down)
        experts[int(number)] = expert
    return Mixture(moe, gate, experts, residual)


def _linear(m: nn.Module) -> nn.Linear:
    if type(m) is not nn.Linear or is_hooked(m):
        raise UnknownPartError(f"{type(m).__name__} in place of a plain linear map")
    return m
