"""What makes a run, setting by setting: a result counts as long as today's settings agree with it.

Settings are told by name and content, such as `plan.lr`: the fields of dataclasses and the
parameters of functions, defaults included. A setting that is new since a result was made does not
speak against it while it is at its default: new settings are added so that their default changes
nothing. A default that has changed since does.

The code behind the names and the versions of packages are not covered: after a change to an
algorithm, run again. Data are told by the hash of their partition.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import cached_property, partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmoe.data.examples import FederatedData
from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.run import Spec

PLAIN = (bool, int, float, complex, str, bytes, Enum, np.generic, torch.dtype, torch.device)
SAYS_NOTHING = {"control"}  # fields of an experiment that change how it is shown, not what it does
# Fields of an experiment that are told only where they are not at their defaults: hashes that were
# taken before there were any stay as they are.
TOLD_IF_SET = {"down", "up"}
LONGEST = 120  # characters; a longer setting is told by its beginning and its hash


@dataclass(frozen=True)
class Definition:
    """A run's settings by name, and the names of those that are at their defaults."""

    settings: Mapping[str, str]
    defaults: frozenset[str] = frozenset()

    @cached_property
    def hash(self) -> str:
        text = "\n".join(f"{name}: {value}" for name, value in sorted(self.settings.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differs_from(self, made: Mapping[str, str]) -> list[str]:
        """The settings in which a result, made under the settings `made`, is of another run.

        A setting that `made` does not know makes no difference while it is at its default.
        """
        changed = {name for name, value in made.items() if self.settings.get(name) != value}
        added = self.settings.keys() - made.keys() - self.defaults
        return sorted(changed | added)


def definition_of(spec: Spec, experiment: Experiment) -> Definition:
    """The settings of one run. Loads no data.

    Its trainer is none of them: trainers give the same result within rounding.
    """
    parts = [("spec", replace(spec, trainer=Spec.trainer), False), *_fields(experiment)]
    told = [t for part in parts if _says_something(part) for t in _tell(*part)]
    return Definition(
        {name: _short(text) for name, text, _ in told},
        frozenset(name for name, _, default in told if default),
    )


def _says_something(part: "Part") -> bool:
    name, _, default = part
    return name not in SAYS_NOTHING and not (default and name in TOLD_IF_SET)


Told = tuple[str, str, bool]  # a setting's name and text, and whether it is at its default


def _tell(name: str, value: object, default: bool) -> Iterator[Told]:
    """A setting and, of what has fields or parameters, those too."""
    if isinstance(value, partial | FunctionType):
        function = value.func if isinstance(value, partial) else value
        yield name, describe(function), default
        parts = _parameters(value)
    elif is_dataclass(value) and not isinstance(value, type | FederatedData):
        yield name, type(value).__qualname__, default
        parts = _fields(value)
    else:
        yield name, describe(value), default
        return
    for part, inner, is_default in parts:
        yield from _tell(f"{name}.{part}", inner, default or is_default)


Part = tuple[str, object, bool]  # name, value, whether it is at its default


def _parameters(function: Callable[..., Any]) -> Iterator[Part]:
    """What a function has been given beforehand, and the defaults of what it has not."""
    given: Mapping[str, object] = {}
    if isinstance(function, partial):
        signature = inspect.signature(function.func)
        given = signature.bind_partial(*function.args, **function.keywords).arguments
    else:
        signature = inspect.signature(function)
    for name, parameter in signature.parameters.items():
        if name in given:
            yield name, given[name], False
        elif parameter.default is not parameter.empty:
            yield name, parameter.default, True


def _fields(value: Any, around: frozenset[int] = frozenset()) -> Iterator[Part]:
    """The fields of a dataclass."""
    for f in fields(value):
        inner, default = getattr(value, f.name), f.default
        if f.default_factory is not MISSING:
            default = f.default_factory()
        same = default is not MISSING and _text(inner, around) == _text(default, frozenset())
        yield f.name, inner, same


def _short(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text[: LONGEST - 30]}... sha256 {digest}"


def describe(value: object) -> str:
    """The same text for equal values, in every process: no addresses, no order of sets.

    A dataclass is told by the fields that are not at their defaults; a function by its name and
    what it closes over, a lambda also by the names and constants in it; tensors and modules by
    their content.

    Raises:
        TypeError: an object of which nothing but its address can be told.
    """
    return _text(value, frozenset())


def _text(value: object, around: frozenset[int]) -> str:
    """As `describe`; `around` are the objects that this one is within: they may hold each other."""
    if value is None or isinstance(value, PLAIN):
        return repr(value)
    if id(value) in around:
        return "..."
    around = around | {id(value)}
    match value:
        case FederatedData():
            return f"{value.name}, partition {value.partition_hash}"
        case Tensor():
            raw = value.detach().cpu().reshape(-1).view(torch.uint8).numpy()
            return _array(raw, value)
        case np.ndarray():
            return _array(np.ascontiguousarray(value), value)
        case nn.Module():
            return f"{_name(type(value))}({_text(value.state_dict(), around)})"
        case type() | BuiltinFunctionType():
            return _name(value)
        case partial():
            given = [_text(v, around) for v in (value.func, *value.args)]
            return f"partial({', '.join([*given, *_named(value.keywords, around)])})"
        case MethodType():
            return f"{_text(value.__self__, around)}.{value.__name__}"
        case FunctionType():
            carried = ", ".join(_named(_carried(value), around))
            return _name(value) + (f"({carried})" if carried else "")
        case Mapping():
            pairs = (f"{_text(k, around)}: {_text(v, around)}" for k, v in value.items())
            return f"{{{', '.join(sorted(pairs))}}}"
        case Set():
            return f"{{{', '.join(sorted(_text(v, around) for v in value))}}}"
        case Sequence():
            return f"({', '.join(_text(v, around) for v in value)})"
    return f"{type(value).__qualname__}({', '.join(_named(_inside(value, around), around))})"


def _inside(value: object, around: frozenset[int]) -> Mapping[str, object]:
    if is_dataclass(value):
        return {name: inner for name, inner, default in _fields(value, around) if not default}
    if hasattr(value, "__dict__"):
        return vars(value)
    raise TypeError(
        f"a setting must be told by its content, and of {type(value).__qualname__} only the "
        f"address is known: make it a dataclass"
    )


def _named(values: Mapping[str, object], around: frozenset[int]) -> list[str]:
    return [f"{name}={_text(v, around)}" for name, v in sorted(values.items())]


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _carried(function: FunctionType) -> Mapping[str, object]:
    """What a function brings along that its name does not say."""
    code = function.__code__
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    carried: dict[str, object] = {name: cell.cell_contents for name, cell in cells}
    if "<" in function.__qualname__:  # made within another: its name is not its own
        carried["uses"] = (*code.co_names, *(c for c in code.co_consts if _tells(c)))
    return carried


def _tells(constant: object) -> bool:
    return constant is not None and not isinstance(constant, CodeType)


def _array(raw: "np.ndarray[Any, Any]", value: Any) -> str:
    digest = hashlib.sha256(raw.tobytes()).hexdigest()[:16]
    return f"{value.dtype} {tuple(value.shape)} {digest}"
