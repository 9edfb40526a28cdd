"""What can be typed behind flower-server and flower-client. The work is in serve.py and join.py,
which are imported when it begins, because torch and Flower take seconds to load."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fedmoe import __version__
from fedmoe.cli.app import Command, settle_environment
from fedmoe.cli.trouble import CommandError, explained
from fedmoe.cli.words import console
from fedmoe.deploy.voice import Voice

PORT = 8000
ANYWHERE, HERE = "0.0.0.0", "127.0.0.1"

SERVER_EXAMPLES = """\b
Examples:
  fedmoe keys --out keys --host 10.0.0.1 --clients 3
  flower-server --experiment demo --clients 3 --keys keys --out served
  flower-server --resume served            go on after a kill, same bits
  flower-server --experiment demo --insecure --port 8001

\b
Exit codes: 0 the run is finished, 1 it failed, 2 bad usage or input,
130 stopped by Ctrl-C, 143 by SIGTERM. FEDMOE_TRACEBACK=1 shows where an error comes from."""

CLIENT_EXAMPLES = """\b
Examples:
  flower-client --server 10.0.0.1:8000 --client-id 0 --keys keys
  flower-client --server moe.example:8000 --client-id 7 \\
      --ca ca.crt --key client-7 --data /srv/data --state /var/lib/fedmoe
  flower-client --server 127.0.0.1:8001 --client-id 0 --insecure

\b
Exit codes: 1 refused, or gave up, 2 bad usage or input, 130 stopped by Ctrl-C,
143 by SIGTERM. FEDMOE_TRACEBACK=1 shows where an error comes from."""


def _app(name: str) -> typer.Typer:
    return typer.Typer(
        name=name,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


server_app, client_app = _app("flower-server"), _app("flower-client")

LogJson = Annotated[bool, typer.Option("--log-json", help="Tell what happens as JSON lines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Tell only what is wrong.")]
Anywhere = Annotated[
    bool,
    typer.Option("--insecure-anywhere", help="Let --insecure be on a network, too."),
]


def say_version(wanted: bool) -> None:
    if wanted:
        print(f"fedmoe {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version", callback=say_version, is_eager=True, help="Show the version and exit."
    ),
]


@server_app.command(cls=Command, epilog=SERVER_EXAMPLES)
def serve(
    experiment: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="As for fedmoe run: a name, or module:function."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Which of its methods (default: the first).")
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Take the experiment's first N clients (default: all)."
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Rounds (default: the experiment's own)."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Of data, model and draws.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the server (default: served/NAME).")
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on (default: all; with --insecure: 127.0.0.1)."),
    ] = None,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port to listen on.")
    ] = PORT,
    keys: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What fedmoe keys made (default: keys).")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS, and clients do not prove who they are.")
    ] = False,
    insecure_anywhere: Anywhere = False,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Go on with the run of this folder, as it was begun."),
    ] = None,
    deadline_s: Annotated[
        float,
        typer.Option(min=0, metavar="S", help="Seconds of a round at most; 0: no limit."),
    ] = 0.0,
    quorum: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Of a round's clients, that must answer."),
    ] = 0.5,
    wait_s: Annotated[
        float,
        typer.Option(min=0, metavar="S", help="Seconds to wait for clients; 0: no limit."),
    ] = 0.0,
    codec_down: Annotated[
        str, typer.Option(metavar="CODEC", help="To clients: raw, bf16, int8; or SHARED/EXPERTS.")
    ] = "raw",
    codec_up: Annotated[
        str,
        typer.Option(metavar="CODEC", help="From clients: as above, or topk:SHARE."),
    ] = "raw",
    metrics_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, metavar="PORT", help="Answer Prometheus (default: do not)."),
    ] = None,
    metrics_host: Annotated[
        str, typer.Option(metavar="HOST", help="Address of the metrics.")
    ] = HERE,
    log_json: LogJson = False,
    json: Annotated[bool, typer.Option("--json", help="The result as one JSON object.")] = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Serve an experiment to clients on other machines.

    Starts a Flower SuperLink, lets in the clients whose public keys lie in the folder of keys,
    runs the experiment, shows how it goes and, at the end, what came out. The folder --out can
    be read by fedmoe report, compare and inspect.
    """
    settle_environment()
    with _explained("flower-server", log_json):
        from fedmoe.cli.words import nothing_on_stdout
        from fedmoe.deploy.deployment import Deployment, check_security
        from fedmoe.deploy.serve import Manner, Wish, resume_command, serve_command, settle

        manner = Manner(metrics_port, metrics_host, log_json, json, quiet)
        if resume is not None:
            _only_resume(experiment, method, clients, rounds, out, host, keys, insecure)
            resume_command(resume, manner)
            return
        if experiment is None:
            raise CommandError("name what to serve with --experiment, or go on with --resume DIR")
        if insecure and keys is not None:
            raise CommandError("--insecure uses no keys: give either --keys or --insecure")
        where = host or (HERE if insecure else ANYWHERE)
        with nothing_on_stdout(json):
            spec, chosen = settle(Wish(experiment, method, seed, rounds, clients))
        deployment = Deployment(
            target=spec.target,
            method=spec.method,
            seed=spec.seed,
            rounds=spec.rounds,
            clients=len(chosen.clients),
            host=where,
            port=port,
            keys=None if insecure else str((keys or Path("keys")).absolute()),
            deadline_s=deadline_s,
            quorum=quorum,
            codec_down=codec_down,
            codec_up=codec_up,
            wait_s=wait_s,
        )
        check_security(deployment.address, insecure, insecure_anywhere)
        root = out or Path("served") / experiment.replace(":", ".")
        serve_command(deployment, chosen, root, manner)


def _only_resume(*others: object) -> None:
    if any(others):
        raise CommandError(
            "--resume goes on with a run as it was begun: only --metrics-port, --metrics-host, "
            "--log-json, --json and --quiet may stand beside it"
        )


@client_app.command(cls=Command, epilog=CLIENT_EXAMPLES)
def join(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the server listens.")],
    client_id: Annotated[
        int, typer.Option(min=0, metavar="N", help="Which client of the experiment this is.")
    ],
    keys: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Has ca.crt and client-N (default: keys)."),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="This client's key, if not in --keys.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The authority's ca.crt, if not in --keys.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where this client's data lie.")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What the client keeps (default: joined/client-N)."),
    ] = None,
    cache_mb: Annotated[
        int, typer.Option(min=0, metavar="MIB", help="Experts kept on disk.")
    ] = 1024,
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda", help="Where to train (default: cpu).")
    ] = None,
    experiment: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The only one to take part in (default: the server's)."),
    ] = None,
    give_up_s: Annotated[
        float | None,
        typer.Option(min=0, metavar="S", help="Seconds to try to get in (default: for ever)."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS, and neither side proves who it is.")
    ] = False,
    insecure_anywhere: Anywhere = False,
    log_json: LogJson = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Take part in a server's experiment, with this machine's data.

    Starts a Flower SuperNode and a worker that keeps torch and the data in memory, and starts
    them again if they end or the server is away, until it is stopped. A server can have any code
    run here that Flower carries: join only those whom you trust.
    """
    settle_environment()
    with _explained("flower-client", log_json):
        from fedmoe.deploy.address import Address
        from fedmoe.deploy.deployment import check_security
        from fedmoe.deploy.join import Membership, find_key, join_command

        address = Address.parse(server)
        if insecure and (keys or key or ca):
            raise CommandError("--insecure uses no keys: give either keys or --insecure")
        check_security(address, insecure, insecure_anywhere)
        folder = keys or Path("keys")
        membership = Membership(
            server=address,
            client=client_id,
            state=state or Path("joined") / f"client-{client_id}",
            ca=None if insecure else ca or folder / "ca.crt",
            key=None if insecure else key or find_key(folder, client_id),
            data=data,
            cache_mb=cache_mb,
            device=device,
            only=experiment,
            give_up_s=give_up_s,
        )
        join_command(membership, Voice(console(stderr=True), log_json, quiet))


@contextmanager
def _explained(program: str, log_json: bool) -> Iterator[None]:
    voice = Voice(console(stderr=True), json=True)
    tell = (lambda text: voice.say("ended", text, level="error")) if log_json else None
    with explained("", program, tell):
        yield


def server_main() -> None:
    """The entry point of flower-server."""
    _run(server_app, "flower-server")


def client_main() -> None:
    """The entry point of flower-client."""
    _run(client_app, "flower-client")


def _run(app: typer.Typer, name: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows ASCII alone
    app(prog_name=name)
