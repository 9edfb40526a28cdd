"""Look into a checkpoint, whatever strategy wrote it: its experts, who holds them, if it is whole.

A checkpoint is read as the plain file that it is, never written, so neither the experiment's code
nor its data are needed: a model in it is known by its form, shared parameters beside experts.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import load as load_tensors
from torch import Tensor

from fedmoe.checkpoint import DamagedCheckpointError, load_checkpoint, read_value
from fedmoe.cli.standing import AnyState
from fedmoe.cli.trouble import CommandError
from fedmoe.cli.words import console, plain_table, plural, size, write_json
from fedmoe.report.log import Run, read_run
from fedmoe.report.usage import LAST_ROUNDS, activations_by_layer, counting_rounds, held_at_end
from fedmoe.state import state_hash
from fedmoe.types import ExpertId, MoEState, SubMoE

FOLDER_NAME = re.compile(r"round-(\d+)")
SHORT = 12  # hex digits of a hash that are shown
BAR = 10  # characters of the longest bar


@dataclass(frozen=True)
class ExpertView:
    """One expert of one model."""

    layer: int
    expert: int
    parameters: int
    bytes: int
    hash: str
    holders: tuple[int, ...] | None  # clients; None where nothing says so
    activations: int | None  # tokens that ran it in the last rounds; None where nothing says so


@dataclass(frozen=True)
class ModelView:
    """One model of a state."""

    name: str  # where in the state it is: "model", "models.upright"
    parameters: int
    bytes: int
    shared_bytes: int
    experts: tuple[ExpertView, ...]


@dataclass(frozen=True)
class CheckpointView:
    """What a checkpoint holds."""

    path: str
    round: int  # that comes next
    hash: str
    bytes_on_disk: int
    matches_log: bool | None  # whether the log has this hash for this round; None: no such line
    models: tuple[ModelView, ...]


def inspect_command(path: Path, json: bool) -> None:
    """Raises CommandError: there is no checkpoint, or none that is whole."""
    checkpoints, run_folder = _find(path)
    run = read_run(run_folder) if run_folder is not None else None
    damaged: list[str] = []
    view = None
    for place in checkpoints:
        try:
            view = view_checkpoint(place, run)
            break
        except DamagedCheckpointError as why:
            damaged.append(str(why))
    if view is None:
        mend = "copy it again, or take an older one."
        if run_folder is not None:
            mend = f"`fedmoe resume {run_folder}` begins again where nothing is whole."
        raise CommandError(f"damaged: {'; '.join(damaged)}; {mend}")
    if json:
        write_json({"run": _run_facts(run), "damaged": damaged, "checkpoint": asdict(view)})
        return
    out = console()
    for line in damaged:
        text = f"! damaged: {line}; this is the one before it"
        out.print(Text(text, "bold yellow"), soft_wrap=True)
    _show(out, view, run)


def view_checkpoint(path: Path, run: Run | None = None) -> CheckpointView:
    """Read a checkpoint; `run` is the log of its run, which says who held and used what.

    Raises:
        DamagedCheckpointError: it is not whole.
    """
    round, _ = load_checkpoint(path, AnyState)  # checks the hash
    head = json.loads((path / "state.json").read_bytes())
    tensors = load_tensors((path / "state.safetensors").read_bytes())
    before = None
    if run is not None:
        before = replace(run, rounds=[r for r in run.rounds if r.round < round])
    logged = [r for r in before.rounds if r.round == round - 1] if before else []
    holders = _holders(head["state"], before, path, tensors)
    counts = activations_by_layer(before) if before and counting_rounds(before) else None
    models = [
        _view_model(name, value, tensors, holders, counts) for name, value in _models(head["state"])
    ]
    return CheckpointView(
        path=str(path),
        round=round,
        hash=head["digest"],
        bytes_on_disk=sum(f.stat().st_size for f in path.iterdir()),
        matches_log=logged[0].model_hash == head["digest"] if logged else None,
        models=tuple(models),
    )


def _find(path: Path) -> tuple[list[Path], Path | None]:
    """The checkpoints to try, newest first, and the folder of their run if there is one."""
    if not path.is_dir():
        raise CommandError(
            f"{path} is no folder: name a run's folder, or a checkpoint's (round-NNNNNN)"
        )
    if FOLDER_NAME.fullmatch(path.name) or (path / "state.json").exists():
        above = path.absolute().parent.parent
        return [path], above if (above / "run.json").exists() else None
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = [p for p in folder.glob("round-*") if FOLDER_NAME.fullmatch(p.name) and p.is_dir()]
    found.sort(key=lambda p: int(p.name.removeprefix("round-")), reverse=True)
    run_folder = path if (path / "run.json").exists() else None
    if found:
        return found, run_folder
    if run_folder is not None:
        raise CommandError(f"{path} has no checkpoint yet: it has not finished a round")
    inner = sorted(p.parent.name for p in path.glob("*/run.json"))
    raise CommandError(
        f"{path} holds no checkpoint"
        + (f"; it holds runs, name one of them: {', '.join(inner)}" if inner else "")
    )


def _models(value: Any, name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every model in a state, with where it is: an object of shared parameters and experts."""
    if not isinstance(value, dict):
        return
    if set(value) == {"shared", "experts"}:
        yield name or "model", value
        return
    for key, inner in value.items():
        yield from _models(inner, f"{name}.{key}" if name else key)


def _view_model(
    name: str,
    value: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    holders: Mapping[ExpertId, tuple[int, ...]] | None,
    counts: Sequence[Any] | None,
) -> ModelView:
    shared = {n: tensors[t] for n, t in value["shared"].items()}
    experts = []
    for key, names in value["experts"].items():
        own = {n: tensors[t] for n, t in names.items()}
        e = _expert(key)
        experts.append(
            ExpertView(
                layer=e.layer,
                expert=e.expert,
                parameters=_count(own),
                bytes=_bytes(own),
                hash=state_hash(MoEState(own, {})),  # of the values alone, not of their place
                holders=None if holders is None else holders.get(e, ()),
                activations=None if counts is None else int(counts[e.layer][e.expert]),
            )
        )
    experts.sort(key=lambda x: (x.layer, x.expert))
    return ModelView(
        name=name,
        parameters=_count(shared) + sum(x.parameters for x in experts),
        bytes=_bytes(shared) + sum(x.bytes for x in experts),
        shared_bytes=_bytes(shared),
        experts=tuple(experts),
    )


def _holders(
    state: Any, run: Run | None, path: Path, tensors: Mapping[str, Tensor]
) -> dict[ExpertId, tuple[int, ...]] | None:
    """Who holds what: as the state says it for the coming round, or else as the log last did."""
    told = state.get("sub_moes") if isinstance(state, dict) else None
    held: Mapping[int, SubMoE] = {}
    if told:
        held = read_value(Mapping[int, SubMoE], told, path, tensors)
    if not held:
        if run is None or not run.rounds:
            return None
        held = held_at_end(run)
    experts = {e for own in held.values() for e in own}
    return {e: tuple(sorted(c for c, own in held.items() if e in own)) for e in experts}


def _expert(key: str) -> ExpertId:
    layer, number = key.split(".")
    return ExpertId(int(layer), int(number))


def _count(state: Mapping[str, Tensor]) -> int:
    return sum(t.numel() for t in state.values())


def _bytes(state: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in state.values())


def _run_facts(run: Run | None) -> dict[str, Any] | None:
    if run is None:
        return None
    return {
        "experiment": run.info.experiment,
        "method": run.info.method,
        "seed": run.info.seed,
        "rounds": run.info.rounds,
        "rounds_logged": len(run.rounds),
        "finished": bool(run.rounds) and run.rounds[-1].phase == "final",
        "partition_hash": run.info.partition_hash,
        "notes": list(run.notes),
    }


def _show(out: Console, view: CheckpointView, run: Run | None) -> None:
    def fact(name: str, text: str, style: str = "") -> None:
        out.print(Text.assemble((f"{name:<11}", "dim"), (text, style)), soft_wrap=True)

    if run is not None:
        info = run.info
        finished = bool(run.rounds) and run.rounds[-1].phase == "final"
        state = "finished" if finished else "not finished"
        fact("run", f"{info.experiment}, {info.method}, seed {info.seed}, {state}")
    of = f" of {run.info.rounds}" if run is not None else ""
    fact("checkpoint", f"{view.path}, after {view.round}{of} rounds, {size(view.bytes_on_disk)}")
    fact("hash", view.hash)
    checked = {
        True: "content matches its hash and the run's log",
        False: "content matches its hash, but the run's log has another",
        None: "content matches its hash",
    }[view.matches_log]
    fact("whole", checked, "green" if view.matches_log is not False else "bold yellow")
    for model in view.models:
        name = "" if len(view.models) == 1 else f" of {model.name}"
        fact(
            "parameters",
            f"{model.parameters:,}{name}, {size(model.bytes)}: {size(model.shared_bytes)} shared, "
            f"{plural(len(model.experts), 'expert')}",
        )
    if not view.models:
        fact("model", "none that this command knows by its form")
    for model in view.models:
        if model.experts:
            out.print()
            if len(view.models) > 1:
                out.print(Text(model.name, "bold"))
            out.print(_expert_table(model))
    if any(e.activations is not None for m in view.models for e in m.experts):
        out.print()
        text = f"· activations: tokens that ran the expert in the last {LAST_ROUNDS} rounds, "
        out.print(Text(text + "all clients", "dim"))


def _expert_table(model: ModelView) -> Table:
    table = plain_table()
    for head in ("layer", "expert", "size"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("hash", no_wrap=True)
    held = any(e.holders is not None for e in model.experts)
    used = any(e.activations is not None for e in model.experts)
    if used:
        table.add_column("activations", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
    if held:
        table.add_column("held by", justify="right", no_wrap=True)
        table.add_column("clients")  # the one that gives way
    most = max((e.activations or 0 for e in model.experts), default=0)
    for e in model.experts:
        cells: list[str | Text] = [str(e.layer), str(e.expert), size(e.bytes), e.hash[:SHORT]]
        if used:
            number = e.activations or 0
            bar = "━" * max(round(BAR * number / most), 1 if number else 0) if most else ""
            cells += [Text(f"{number:,}", "" if number else "yellow"), Text(bar, "cyan")]
        if held:
            own = e.holders or ()
            names = " ".join(map(str, own))
            cells += [
                Text(str(len(own)), "" if own else "yellow"),
                Text(names, "dim", no_wrap=True, overflow="ellipsis"),
            ]
        table.add_row(*cells)
    return table
