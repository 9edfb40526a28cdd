"""flower-server: a SuperLink, a run on it, and eyes on both until the run has ended.

All that it has lies in one folder: `server.json` (what was asked for), `METHOD-seedS/` (the run, as
`fedmoe run` leaves it), `bundle/` (the app that Flower carries) and `flower/` (the SuperLink's
home: its state and its log). Whatever is killed in between, `--resume` goes on from that folder.
"""

import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from fedmoe.cli.compare import show
from fedmoe.cli.live import Display
from fedmoe.cli.making import check_place, methods_of, rounds_of
from fedmoe.cli.standing import standing_of
from fedmoe.cli.trouble import FAILED, INTERRUPTED, CommandError
from fedmoe.cli.words import console, plural, size, write_json
from fedmoe.deploy.address import Address
from fedmoe.deploy.bundle import write_bundle
from fedmoe.deploy.control import Control, RunState
from fedmoe.deploy.deployment import Deployment
from fedmoe.deploy.follow import Follower, Tail, mean_accuracy
from fedmoe.deploy.keys import LOCAL, check_server, load_public_key
from fedmoe.deploy.metrics import serve_metrics
from fedmoe.deploy.processes import (
    GIVES_MEMORY_BACK,
    Child,
    alone,
    check_free,
    daemon,
    end_all,
    environment,
    stop,
)
from fedmoe.deploy.stopping import TerminatedError, terminated_is_stopped
from fedmoe.deploy.voice import Fact, Voice
from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.run import Spec
from fedmoe.experiments.study import RunProgress
from fedmoe.experiments.table import pick_method
from fedmoe.report.log import RoundRecord, read_run
from fedmoe.report.measures import final_evaluation, result_row

START_S = 120.0  # for a SuperLink, on a busy machine
LOOK_S = 0.5  # between two looks at the run's log
ASK_S = 5.0  # between two questions to the SuperLink
SETTLE_S = 60.0  # for the app to end once the run is logged as finished
EXPIRY_DAYS = 14
QUIET = ("hello", "sent", "replied", "missed")  # kinds of events that are as it should be
BAD = ("failed", "refused", "retried")


@dataclass(frozen=True)
class Manner:
    """How a server tells how it goes."""

    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    log_json: bool = False
    json: bool = False
    quiet: bool = False

    def voice(self) -> Voice:
        return Voice(console(stderr=True), self.log_json, self.quiet)


@dataclass(frozen=True)
class Wish:
    """A deployment as it was typed: what is None, the experiment decides."""

    target: str
    method: str | None
    seed: int
    rounds: int | None
    clients: int | None


def settle(wish: Wish) -> tuple[Spec, Experiment]:
    """The one run that is wished for.

    Raises:
        CommandError: there is no such experiment, method, or number of clients.
    """
    rounds = rounds_of(wish.target, wish.rounds)
    methods = methods_of(wish.target, wish.seed, rounds)
    method = wish.method or next(iter(methods))
    experiment = pick_method(methods, method, wish.target)
    count = len(experiment.clients) if wish.clients is None else wish.clients
    return Spec(wish.target, method, wish.seed, rounds), experiment.of_first(count)


def serve_command(
    deployment: Deployment, experiment: Experiment, root: Path, manner: Manner
) -> None:
    """Begin, or go on with what the folder holds of the same run.

    Raises:
        CommandError: it could not begin, did not finish, or was stopped.
    """
    check_place(root)
    check_keys(deployment, manner.voice())
    spec = Spec(deployment.target, deployment.method, deployment.seed, deployment.rounds)
    with alone(root, "flower-server"):
        _carry_out(deployment, spec, experiment, root.resolve(), manner)


def resume_command(root: Path, manner: Manner) -> None:
    """Go on with the run of a folder; see `serve_command`."""
    d = Deployment.read(root)
    _, experiment = settle(Wish(d.target, d.method, d.seed, d.rounds, d.clients))
    serve_command(d, experiment, root, manner)


def check_keys(deployment: Deployment, voice: Voice) -> None:
    """Raises ValueError or FileNotFoundError: see `check_server`; warns of what is unwise."""
    keys = deployment.key_files
    if keys is None:
        voice.say("insecure", "no TLS, and clients do not prove who they are", level="warning")
        return
    own = () if deployment.address.is_anywhere else (deployment.host,)
    ends = check_server(keys, (*own, *LOCAL))
    for path in keys.public_keys().values():
        load_public_key(path)
    if (ends.timestamp() - time.time()) / 86_400 < EXPIRY_DAYS:
        voice.say("expiry", f"{keys.server} runs out on {ends:%Y-%m-%d}", level="warning")


def _carry_out(
    deployment: Deployment, spec: Spec, experiment: Experiment, root: Path, manner: Manner
) -> None:
    voice = manner.voice()
    folder = deployment.run_folder(root)
    standing = standing_of((spec, folder), experiment)
    for line in standing.damaged:
        voice.say("damaged", line, level="warning")
    if standing.finished:
        voice.say("finished", f"{folder} is finished already")
        _show(folder, manner)
        return
    if not (folder / "experiment.json").exists():
        spec.write(folder)
    deployment.write(root)
    head = f"{deployment.target}, {deployment.method}, seed {deployment.seed}: "
    head += f"{plural(deployment.rounds, 'round')}, {plural(deployment.clients, 'client')}; "
    head += f"into {root}"
    voice.say("start", head, {"folder": str(folder), "goes_on_from_round": standing.round})
    if standing.begun:
        voice.say("resume", f"goes on after {plural(standing.round, 'round')}")
    try:
        with terminated_is_stopped(), ExitStack() as stack:
            Server(deployment, root, manner, voice, stack).run()
    except (KeyboardInterrupt, TerminatedError) as why:
        code = INTERRUPTED if isinstance(why, KeyboardInterrupt) else 128 + signal.SIGTERM
        raise CommandError(
            f"stopped; rounds that are done are kept. Go on with: flower-server --resume {root}",
            code,
        ) from why
    _show(folder, manner)


class Server:
    """The SuperLink of a deployment and the run on it, from start to end."""

    def __init__(
        self,
        deployment: Deployment,
        root: Path,
        manner: Manner,
        voice: Voice,
        stack: ExitStack,
    ) -> None:
        """`stack` ends what the server has started."""
        self.deployment, self.root, self.manner, self.voice = deployment, root, manner, voice
        self.stack = stack
        self.home = root / "flower"
        self.keys = deployment.key_files
        self.follower = Follower(deployment.run_folder(root))
        self.events = Tail(self.follower.folder / "flower" / "events.jsonl")
        self.known: dict[int, Path] = {}  # the keys that the SuperLink knows
        self.online = 0

    def run(self) -> None:
        """Raises CommandError: the run did not come to its end."""
        if left := end_all(self.home):
            self.voice.say("cleared", f"ended what a killed server left: {left} of its processes")
        check_free(self.deployment.address)
        link = self._start()
        self.stack.callback(stop, link, self.home)
        near = self.deployment.address.near
        control = self.stack.enter_context(Control(near, self.keys.ca if self.keys else None))
        self._wait(link, control)
        self._register(control)
        control.stop_all()
        bundle = self.root / "bundle"
        write_bundle(bundle, self.deployment.run_config(self.root))
        if self.manner.metrics_port is not None:
            port, host = self.manner.metrics_port, self.manner.metrics_host
            end = serve_metrics(self.follower.folder, lambda: self.online, port, host)
            self.stack.callback(end)
            self.voice.say("metrics", f"metrics at http://{Address(host, port)}/metrics")
        self.follower.look()  # what is logged already is no news
        number = control.submit(bundle)
        self.voice.say("ready", self._ready(), {"address": str(self.deployment.address)})
        self._watch(link, control, number)

    def _start(self) -> Child:
        address = self.deployment.address
        arguments = ["--host", address.host, "--port", str(address.port)]
        arguments += ["--database", str(self.home / "state.db")]
        arguments += ["--disable-runtime-dependency-installation"]
        if self.keys is None:
            arguments += ["--insecure"]
        else:
            arguments += ["--ssl-ca-certfile", str(self.keys.ca.resolve())]
            arguments += ["--ssl-certfile", str(self.keys.server.resolve())]
            arguments += ["--ssl-keyfile", str(self.keys.server_key.resolve())]
            arguments += ["--enable-supernode-auth"]
        self.home.mkdir(parents=True, exist_ok=True)
        write_connection(self.home, address.near, self.keys.ca if self.keys else None)
        env = environment(self.home, GIVES_MEMORY_BACK)
        return daemon("superlink", arguments, env, self.home / "superlink.log")

    def _wait(self, link: Child, control: Control) -> None:
        end = time.monotonic() + START_S
        while not control.is_up():
            if link.ended is not None:
                raise CommandError(
                    f"the SuperLink ended at once (exit code {link.ended}); the end of {link.log}:"
                    f"\n{link.tail()}",
                    FAILED,
                )
            if time.monotonic() > end:
                raise CommandError(
                    f"the SuperLink did not answer at {control.address} within {START_S:.0f} s; "
                    f"the end of {link.log}:\n{link.tail()}",
                    FAILED,
                )
            time.sleep(LOOK_S / 5)

    def _register(self, control: Control) -> None:
        """Tell the SuperLink of keys that have come or gone."""
        if self.keys is None:
            return
        found = self.keys.public_keys()
        if found == self.known:
            return
        control.register(found)
        new = ", ".join(str(c) for c in found if c not in self.known)
        gone = ", ".join(str(c) for c in self.known if c not in found)
        self.known = found
        text = f"keys of {plural(len(found), 'client')} are known"
        text += f"; new: {new}" if new else ""
        text += f"; no longer let in: {gone}" if gone else ""
        self.voice.say("keys", text, {"known": len(found)})

    def _register_again(self, control: Control) -> None:
        """As `_register`, of which a running server only complains."""
        try:
            self._register(control)
        except (ValueError, OSError) as why:  # a file that is no key, or went while it was read
            self.voice.say("keys", str(why), level="warning")

    def _ready(self) -> str:
        address, count = self.deployment.address, self.deployment.clients
        where = f"on port {address.port}" if address.is_anywhere else f"at {address}"
        return f"listens {where}; the first round waits for {plural(count, 'client')}"

    def _watch(self, link: Child, control: Control, number: int) -> None:
        """Tell how the run goes until it ends; raises CommandError unless it ends well."""
        shown = Console(quiet=True) if self.voice.quiet or self.voice.json else self.voice.console
        asked, logged_s = 0.0, None
        with Display(shown, workers=1) as display:
            while True:
                self._look(display)
                if link.ended is not None:
                    raise CommandError(
                        f"the SuperLink ended in the middle of the run (exit code {link.ended}); "
                        f"the end of {link.log}:\n{link.tail()}\nGo on with: flower-server "
                        f"--resume {self.root}",
                        FAILED,
                    )
                now = time.monotonic()
                if self.follower.is_finished:
                    logged_s = logged_s or now
                if now - asked >= (LOOK_S if logged_s else ASK_S):
                    asked = now
                    state = self._ask(control, number)
                    if state is not None and state.status == "finished":
                        self._look(display)
                        self._check_end(state, link)
                        return
                if logged_s is not None and now - logged_s > SETTLE_S:
                    return  # the run is whole, whatever keeps its process
                time.sleep(LOOK_S)

    def _look(self, display: Display) -> None:
        """Tell what is new in the app's log and in the run's."""
        for event in self.events.look():
            self._tell_event(event)
        for record in self.follower.look():
            self._tell(record)
        display.watch([self._progress()])

    def _ask(self, control: Control, number: int) -> RunState | None:
        """How the run stands; None where the SuperLink was too busy to answer."""
        try:
            self._register_again(control)
            online = control.online()
            if online != self.online:
                text = f"{plural(online, 'client')} there"
                self.voice.say("clients", text, {"online": online})
                self.online = online
            return control.state(number)
        except httpx.HTTPError as why:
            self.voice.say("no-answer", f"the SuperLink does not answer: {why}", level="warning")
            return None

    def _check_end(self, state: RunState, link: Child) -> None:
        folder = self.follower.folder
        if state.end == "completed" and self.follower.is_finished:
            return
        why = state.details or f"Flower calls the run {state.end or 'ended'}"
        if state.end == "completed":
            why = f"its app ended, but {folder / 'rounds.jsonl'} has no closing evaluation"
        raise CommandError(
            f"the run failed: {why}. More is in {link.log}. Once that is mended, go on with: "
            f"flower-server --resume {self.root}",
            FAILED,
        )

    def _progress(self) -> RunProgress:
        d = self.deployment
        spec = Spec(d.target, d.method, d.seed, d.rounds)
        return RunProgress(
            spec,
            self.follower.folder,
            len(self.follower.records),
            self.follower.bytes_moved,
            self.follower.accuracy,
            self.follower.is_finished,
        )

    def _tell(self, record: RoundRecord) -> None:
        lost = {f.client for f in (*record.failed, *record.refused)}
        answered = len(set(record.clients) - lost)
        facts: dict[str, Fact] = {
            "round": record.round,
            "phase": record.phase,
            "seconds": round(record.seconds, 3),
            "answered": answered,
            "failed": len(record.failed),
            "refused": len(record.refused),
            "bytes_down": record.bytes_down,
            "bytes_up": record.bytes_up,
            "accuracy": mean_accuracy(record),
            "model_hash": record.model_hash,
        }
        moved = size(record.bytes_down + record.bytes_up)
        text = f"round {record.round} ({record.phase}): {answered} of "
        text += f"{plural(len(record.clients), 'client')}, {moved}, {record.seconds:.1f} s"
        if self.voice.json:
            self.voice.say("round", text, facts)

    def _tell_event(self, event: Mapping[str, Any]) -> None:
        """What the app says of its clients: all of it to a program, trouble to a reader."""
        kind = str(event.get("kind"))
        if kind in QUIET and not self.voice.json:
            return
        known = ("round", "client", "node", "nbytes")
        facts = {k: event[k] for k in known if event.get(k) is not None}
        who = f"client {event['client']}" if event.get("client") is not None else "a node"
        text = f"{who} {kind}"
        text += f" in round {event['round']}" if event.get("round") is not None else ""
        text += f": {event['text']}" if event.get("text") else ""
        self.voice.say(f"client-{kind}", text, facts, level="warning" if kind in BAD else "info")


def write_connection(home: Path, address: Address, ca: Path | None) -> None:
    """Let Flower's own commands find the SuperLink: `FLWR_HOME=DIR/flower flwr list`."""
    lines = ["[superlink]", 'default = "fedmoe"', "", "[superlink.fedmoe]"]
    lines += [f'address = "{address}"']
    lines += ["insecure = true"] if ca is None else [f'root-certificates = "{ca.resolve()}"']
    (home / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _show(folder: Path, manner: Manner) -> None:
    """What came out; raises CommandError where no client could be measured."""
    run = read_run(folder)
    if manner.json:
        row = result_row(run, run.info.experiment)
        write_json({"folder": str(folder), "model_hash": run.rounds[-1].model_hash, **row})
    elif not manner.quiet:
        show([run])
        out = console()
        out.print()
        out.print(f"model      {run.rounds[-1].model_hash}", soft_wrap=True, markup=False)
        out.print(f"run        {folder}", soft_wrap=True, markup=False)
    if final_evaluation(run) is None:
        reasons = _reasons(run.rounds)
        why = f"; the first of {len(reasons)} failures: {reasons[0]}" if reasons else ""
        raise CommandError(f"the run ended, but no client could be measured{why}", FAILED)


def _reasons(rounds: Sequence[RoundRecord]) -> list[str]:
    return [f.reason for r in rounds for f in (*r.failed, *r.refused)]
