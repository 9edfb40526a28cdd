"""The Flower ServerApp: a run configuration, an experiment, and its rounds with whoever comes."""

from collections.abc import Callable
from logging import INFO, WARNING

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from fedmoe.exchange.flower.client import key_of
from fedmoe.exchange.flower.events import Event, OnEvent, Traffic, ignore, to_all, to_file
from fedmoe.exchange.flower.identity import identity_of
from fedmoe.exchange.flower.roster import Roster
from fedmoe.exchange.flower.server import flower_exchange
from fedmoe.exchange.flower.settings import Settings
from fedmoe.exchange.flower.terms import Terms
from fedmoe.experiments.run import Spec, run_experiment
from fedmoe.experiments.table import make_experiment
from fedmoe.report.log import RoundRecord
from fedmoe.types import Exchange
from fedmoe.wire.packing import RAW

LOUD = {"hello", "refused", "failed", "retried", "left", "waiting"}


def lead(grid: Grid, flower_run: int, settings: Settings, on_event: OnEvent = ignore) -> str:
    """Run an experiment with the clients of a grid, or go on with one that was broken off.

    Returns:
        The content hash of the server's last state.

    Raises:
        GatherError: too few clients came.
        QuorumError: too few answered in a round.
        ValueError, FileExistsError: see `run_experiment`.
    """
    spec, folder = settings.spec, settings.folder
    experiment = make_experiment(spec)
    folder.mkdir(parents=True, exist_ok=True)
    key = key_of(folder / "flower")
    identity = identity_of(spec, experiment)
    if settings.only_first:
        experiment = experiment.of_first(settings.only_first)
    terms = Terms(
        key,
        f"{key}.{flower_run}",
        spec.target,
        spec.method,
        spec.seed,
        spec.rounds,
        spec.arguments,
        identity.definition,
        identity.partition,
    )
    traffic = Traffic()
    tell = to_all(traffic, to_file(folder / "flower" / "events.jsonl"), _say, on_event)
    training = [c.id for c in experiment.clients]
    roster = Roster(grid, terms, {*training, *(c.id for c in experiment.unseen)}, tell)
    log(INFO, "fedmoe: %s, method %s, seed %s; waiting for clients", *_named(spec))
    roster.gather(training, settings.clients or len(training), settings.wait_s)

    def exchange(on_client: Callable[[int], None]) -> Exchange:
        return flower_exchange(
            grid,
            roster,
            guests=[c.id for c in experiment.unseen],
            policy=settings.policy,
            down=settings.down if settings.down != RAW else experiment.down,
            up=settings.up if settings.up != RAW else experiment.up,
            on_event=tell,
            on_client=on_client,
        )

    begun = (folder / "run.json").exists()
    if not begun:
        spec.write(folder)
    digest = run_experiment(
        experiment,
        folder,
        resume=begun,
        device=settings.device,
        on_round=_round_done,
        complain=lambda line: log(WARNING, "fedmoe: %s", line),
        exchange=exchange,
        traffic=traffic.take,
    )
    log(INFO, "fedmoe: done, state %s", digest)
    return digest


def _named(spec: Spec) -> tuple[str, str, int]:
    return spec.target, spec.method, spec.seed


def _say(event: Event) -> None:
    if event.kind not in LOUD:
        return
    about = (("round", event.round), ("client", event.client), ("node", event.node))
    words = [f"{name} {number}" for name, number in about if number is not None]
    level = WARNING if event.kind in ("refused", "failed") else INFO
    log(level, "fedmoe: %s", " ".join([event.kind, *words, event.text]).rstrip())


def _round_done(record: RoundRecord) -> None:
    lost = len(record.failed) + len(record.refused)
    log(
        INFO,
        "fedmoe: round %s (%s) done in %.1f s, %s clients, %s failed; %s bytes down, %s up; %s",
        record.round,
        record.phase,
        record.seconds,
        len(record.clients),
        lost,
        record.bytes_down,
        record.bytes_up,
        record.model_hash,
    )


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower calls this once for a run."""
    lead(grid, context.run_id, Settings.of(context.run_config))
