"""Make certificates and keys, and tell what goes where."""

from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from fedmoe.cli.words import console, plain_table, plural, write_json
from fedmoe.deploy.keys import Keys, make_keys


def keys_command(
    folder: Path,
    hosts: Sequence[str],
    num_clients: int,
    clients: Sequence[int],
    days: int,
    force: bool,
    json: bool,
) -> None:
    """Raises ValueError: see `make_keys`."""
    numbers = sorted({*range(num_clients), *clients})
    made = make_keys(folder, hosts, numbers, days=days, force=force)
    if json:
        write_json(
            {
                "folder": str(folder),
                "written": [str(p) for p in made.written],
                "kept": [str(p) for p in made.kept],
            }
        )
        return
    out = console()
    text = f"{plural(len(made.written), 'file')} written into {folder}"
    text += f", {plural(len(made.kept), 'file')} kept as found" if made.kept else ""
    out.print(Text(text, "bold"), soft_wrap=True)
    out.print()
    table = plain_table()
    table.add_column("what", no_wrap=True)
    table.add_column("goes to", overflow="fold")
    for files, place in _places(Keys(folder), bool(hosts), numbers):
        table.add_row(files, place)
    out.print(table)


def _places(keys: Keys, with_server: bool, numbers: Sequence[int]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if with_server:
        rows += [
            ("ca.crt", "the server, and every client: by it they know the server"),
            ("server.crt server.key", "the server, and nobody else"),
            ("ca.key", "nowhere: keep it; whoever has it can pose as the server"),
        ]
    if numbers:
        first = keys.client(numbers[0])
        more = f" (and so on, {len(numbers)} in all)" if len(numbers) > 1 else ""
        rows += [
            (
                f"clients/{first.name}.pub{more}",
                "the server, into clients/ of its folder of keys: whom it lets in",
            ),
            (
                f"clients/{first.name}{more}",
                f"client {numbers[0]}'s machine, and nobody else; beside ca.crt there",
            ),
        ]
    return rows
