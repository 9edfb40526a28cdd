"""Running a ServerApp with a ClientApp, as Flower's `run_simulation` does."""

from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.app.user_config import UserConfigValue
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedmoe.exchange.actors import Actors
from fedmoe.exchange.grid.draws import seed_draws
from fedmoe.exchange.grid.fast import Engine, FastGrid, random_run
from fedmoe.exchange.grid.home import Census, NodeConfig
from fedmoe.exchange.grid.inline import Inline


def run_apps(
    server_app: ServerApp,
    client_app: ClientApp,
    num_nodes: int,
    *,
    run_config: Mapping[str, UserConfigValue] | None = None,
    node_config: NodeConfig | None = None,
    actors: int | Actors = 0,
    seed: int | None = None,
    states: Path | None = None,
) -> Context:
    """Run a server and its clients to the server's end; whatever it raises is raised here.

    Args:
        num_nodes: there are nodes 2 to num_nodes + 1, with `partition-id` 0 to num_nodes - 1.
        run_config: what both apps find as their context's run_config.
        node_config: more for each node's configuration, for all or as a function of the partition.
        actors: processes that nodes live in, or `Actors` to say where and what each takes. With 0
            they live in this process, and need no Ray.
        seed: of Python's, NumPy's and torch's global generators: once for the server, and for a
            client anew with each of its messages. Then draws of apps that do not seed themselves
            are the same in every run, whatever the number of actors. Without it none is seeded.
        states: where what nodes keep outlives an actor that dies, in a folder that goes with the
            run; on several machines, in storage that they share.

    Returns:
        The server's context, with what it left in its state.
    """
    with open_grid(
        client_app,
        num_nodes,
        run_config=run_config,
        node_config=node_config,
        actors=actors,
        seed=seed,
        states=states,
    ) as grid:
        run = grid.run
        if seed is not None:
            seed_draws(seed)
        context = Context(run.run_id, 0, {}, RecordDict(), dict(run.override_config))
        server_app(grid, context)
        return context


def open_grid(
    client_app: ClientApp,
    num_nodes: int,
    *,
    run_config: Mapping[str, UserConfigValue] | None = None,
    node_config: NodeConfig | None = None,
    actors: int | Actors = 0,
    seed: int | None = None,
    states: Path | None = None,
) -> FastGrid:
    """The grid of `run_apps`, for who calls it without a ServerApp; to be used as a context."""
    if num_nodes < 1:
        raise ValueError(f"num_nodes must be 1 or more, got {num_nodes}")
    census = Census(num_nodes, random_run(), dict(run_config or {}), node_config or {}, seed)
    return FastGrid(_engine(client_app, census, actors, states), census)


def _engine(
    client_app: ClientApp, census: Census, actors: int | Actors, states: Path | None
) -> Engine:
    if actors == 0:
        return Inline(client_app, census)
    # Who stays in one process waits for no Ray.
    from fedmoe.exchange.grid.actors import OnRay

    if isinstance(actors, int):
        actors = Actors(actors)
    return OnRay(client_app, census, actors, states)
