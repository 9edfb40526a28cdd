"""Is everything here that fedmoe needs? Each missing thing comes with how to mend it."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from rich.table import Table
from rich.text import Text

from fedmoe import __version__
from fedmoe.cli.trouble import FAILED, CommandError
from fedmoe.cli.words import console, listed, nothing_on_stdout, plural, size, write_json

NEEDED_FREE_BYTES = 200 * 2**20
WANTED_FREE_BYTES = 2 * 2**30
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class State(Enum):
    """How a check ended."""

    GOOD = "good"
    LACKING = "lacking"  # something that some use of fedmoe wants
    MISSING = "missing"  # something that fedmoe needs


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    found: str
    mend: str | None = None


def doctor_command(json: bool) -> None:
    """Raises CommandError if something needed is missing."""
    with nothing_on_stdout(json):
        checks = list(all_checks())
    missing = [c.name for c in checks if c.state is State.MISSING]
    if json:
        rows = [asdict(c) | {"state": c.state.value} for c in checks]
        write_json({"fedmoe": __version__, "healthy": not missing, "checks": rows})
    else:
        _show(checks)
    if missing:
        raise CommandError(f"missing: {listed(missing)}; see above how to mend it", FAILED)


def all_checks() -> Iterator[Check]:
    """Every check, in the order in which they are shown."""
    python, requirements = requirements_of_fedmoe()
    yield python_check(python)
    yield from package_checks(requirements)
    yield from torch_checks()
    yield data_check()
    yield from more_data_checks()
    yield ray_check()
    yield browser_check()
    yield from place_checks(Path.cwd())


def requirements_of_fedmoe() -> tuple[str, list[str]]:
    """The Python that fedmoe asks for, and its packages, as pip reads them.

    From what is installed, or else from the pyproject.toml beside the source; empty without both.
    """
    try:
        metadata = importlib.metadata.metadata("fedmoe")
        packages = importlib.metadata.requires("fedmoe") or []
        return metadata["Requires-Python"] or "", [p for p in packages if "extra ==" not in p]
    except importlib.metadata.PackageNotFoundError:
        path = Path(__file__).parents[2] / "pyproject.toml"
        if not path.exists():
            return "", []
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        return project["requires-python"], project["dependencies"]


def python_check(wanted: str) -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    if within(platform.python_version(), wanted):
        return Check("Python", State.GOOD, found)
    return Check("Python", State.MISSING, found, f"install a Python {wanted} and fedmoe into it")


def package_checks(requirements: list[str]) -> Iterator[Check]:
    """One check for all packages that are as they must be, and one for each that is not."""
    if not requirements:
        yield Check(
            "packages",
            State.LACKING,
            "fedmoe is not installed, so nobody knows what it needs",
            "pip install fedmoe, or pip install -e . where its source is",
        )
    good = []
    for requirement in requirements:
        name, bounds = parts_of(requirement)
        mend = f"pip install '{requirement}'"
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, State.MISSING, "not installed", mend)
            continue
        if not within(found, bounds):
            yield Check(name, State.MISSING, f"{found}, must be {bounds}", mend)
        else:
            good.append(f"{name} {found}")
    if good:
        yield Check("packages", State.GOOD, ", ".join(good))


def torch_checks() -> Iterator[Check]:
    if importlib.util.find_spec("torch") is None:
        return  # said among the packages
    import torch

    threads = torch.get_num_threads()
    found = f"{plural(threads, 'thread')} a process, {plural(os.cpu_count() or 1, 'core')}"
    if threads == 1:
        yield Check("threads", State.GOOD, found)
    else:
        mend = "unset OMP_NUM_THREADS: runs side by side with several threads each are slower"
        yield Check("threads", State.LACKING, found, mend)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Check("GPU", State.GOOD, f"{', '.join(names)}; CUDA {torch.version.cuda}")
    else:
        yield Check("GPU", State.GOOD, "none, so models train on the CPU")


def data_check() -> Check:
    name = "Fashion-MNIST"
    if importlib.util.find_spec("torch") is None:
        return Check(name, State.LACKING, "not looked for without torch")
    from fedmoe.data.fashion import HOW_TO_GET_IT, HUB_NAME, find_folder

    try:
        folder = find_folder()
    except FileNotFoundError as why:
        return Check(name, State.MISSING, str(why).split("\n")[0], HOW_TO_GET_IT)
    if folder is not None:
        return Check(name, State.GOOD, str(folder.absolute()))
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return Check(name, State.MISSING, "not on this machine", HOW_TO_GET_IT)
    found = f"not on this machine; the Hugging Face hub will be asked for {HUB_NAME}"
    return Check(name, State.LACKING, found, HOW_TO_GET_IT)


def more_data_checks() -> Iterator[Check]:
    """The data that a few protocols want, each of them alone; read, to see that it is the right."""
    if importlib.util.find_spec("torch") is None:
        return
    from fedmoe.data import hapt, mnist, shakespeare, vowels
    from fedmoe.data.files import DATA_FOLDER, DATA_VARIABLE, find_file

    def place_of(name: str, variable: str, usual: Path) -> Callable[[], Path]:
        return lambda: find_file(name, None, variable, usual, "")

    of_hapt = place_of(hapt.FILE_NAME, hapt.FOLDER_VARIABLE, hapt.LOCAL_FOLDER)
    of_vowels = place_of(vowels.FILE_NAME, DATA_VARIABLE, DATA_FOLDER)
    of_roles = place_of(shakespeare.FILE_NAME, DATA_VARIABLE, DATA_FOLDER)
    put_it = f"put it into a folder that {DATA_VARIABLE} names. "
    yield _file_check("MNIST", "two-domains", mnist.SOURCE.find, None, mnist.HOW_TO_GET_IT)
    yield _file_check("HAPT", "motion", of_hapt, hapt.load_hapt, hapt.HOW_TO_GET_IT)
    how = put_it + vowels.HOW_TO_GET_IT
    yield _file_check("vowels", "vowels", of_vowels, vowels.load_vowels, how)
    how = put_it + shakespeare.HOW_TO_GET_IT
    yield _file_check("Shakespeare", "shakespeare", of_roles, shakespeare.load_roles, how)


def _file_check(
    name: str,
    protocol: str,
    find: Callable[[], Path | None],
    read: Callable[[], object] | None,
    how_to_get_it: str,
) -> Check:
    """Whether a data set is here and, where there is something to `read` it by, is not another."""
    try:
        path = find()
        if path is not None and read is not None:
            read()
    except FileNotFoundError:
        path = None
    except ValueError as why:
        return Check(name, State.LACKING, str(why), how_to_get_it)
    if path is None:
        found = f"not on this machine; only the protocol {protocol} wants it"
        return Check(name, State.LACKING, found, how_to_get_it)
    return Check(name, State.GOOD, str(path.absolute()))


def ray_check() -> Check:
    if importlib.util.find_spec("ray") is not None:
        return Check("Ray", State.GOOD, "can be imported")
    mend = "pip install 'flwr[simulation]', for simulations on Ray; `fedmoe run` does without"
    return Check("Ray", State.LACKING, "not installed", mend)


def browser_check() -> Check:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is not None:
        return Check("Chromium", State.GOOD, found)
    mend = (
        "install the package chromium, for the tests of the report; reading one needs any browser"
    )
    return Check("Chromium", State.LACKING, "not found", mend)


def place_checks(folder: Path) -> Iterator[Check]:
    """Whether runs can be written here."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        yield Check("write access", State.GOOD, str(folder))
    except OSError as why:
        mend = "go to a folder of your own, or name one with --out"
        yield Check("write access", State.MISSING, f"{folder}: {why.strerror}", mend)
    free = shutil.disk_usage(folder).free
    found = f"{size(free)} free"
    if free >= WANTED_FREE_BYTES:
        yield Check("disk", State.GOOD, found)
    else:
        state = State.LACKING if free >= NEEDED_FREE_BYTES else State.MISSING
        mend = f"make room: less than {size(WANTED_FREE_BYTES)} may not do for many runs"
        yield Check("disk", state, found, mend)


def parts_of(requirement: str) -> tuple[str, str]:
    """A requirement's package and bounds: "flwr", ">=1.41,<1.43" of "flwr[simulation]<...>"."""
    found = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)", requirement)
    if found is None:
        raise ValueError(f"a requirement must begin with a package's name, got {requirement!r}")
    return found[1], found[2].strip()


def within(version: str, bounds: str) -> bool:
    """Whether a version fulfils bounds such as ">=2,<3"; local parts (+cpu) do not count."""
    for bound in filter(None, (b.strip() for b in bounds.split(","))):
        found = re.fullmatch(r"(>=|<=|==|!=|>|<)\s*([0-9][0-9A-Za-z.+-]*)", bound)
        if found is None:
            continue  # a form that fedmoe does not use; pip has checked it
        have, limit = _numbers(version), _numbers(found[2])
        length = max(len(have), len(limit))
        have += (0,) * (length - len(have))
        limit += (0,) * (length - len(limit))
        fulfilled = {
            ">=": have >= limit,
            "<=": have <= limit,
            "==": have == limit,
            "!=": have != limit,
            ">": have > limit,
            "<": have < limit,
        }[found[1]]
        if not fulfilled:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return tuple(int(n) for n in release[0].split(".")) if release else ()


def _show(checks: list[Check]) -> None:
    out = console()
    marks = {
        State.GOOD: ("✓", "green"),
        State.LACKING: ("·", "yellow"),
        State.MISSING: ("✗", "red"),
    }
    out.print(Text(f"fedmoe {__version__}", "bold"))
    table = Table.grid(padding=(0, 2, 0, 0))
    for check in checks:
        mark, style = marks[check.state]
        found = Text(check.found)
        if check.mend is not None:
            found.append(f"\n{check.mend}", style)
        name = Text(check.name, "bold" if check.state is State.GOOD else f"bold {style}")
        table.add_row(Text(mark, style), name, found)
    out.print(table)
    missing = sum(c.state is State.MISSING for c in checks)
    if not missing:
        out.print(Text("fedmoe has all that it needs here.", "green"))
