"""What the documents name exists: paths, tests, options, commands, classes, methods, links.

A name that was changed in the code, and not in the documents, fails here with its document.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from bridge.cli.main import nbd_bridge

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    each.relative_to(ROOT)
    for each in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docker/*.md"),
        *ROOT.glob("nbd_plugin/*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / ".github").rglob("*.md"),
        *(ROOT / ".github").rglob("*.yml"),
    )
)
WITH_OTHER_OPTIONS = {Path("CHANGELOG.md"), Path("docker/README.md"), Path("nbd_plugin/README.md")}
"""Options of older versions; of Docker, iptables, nbdkit."""
PACKAGES = ("bridge", "nbd_plugin", "tests")
TOP_LEVEL = (*PACKAGES, "deb", "docs", "docker", ".ci", ".github")

OTHERS_OPTIONS = {
    *("--fast", "--rest", "--durations", "--follow", "--export", "--unix-socket", "--create"),
    "--now",
    *(
        "--profile",
        "--volumes",
        "--params",
        "--image-opts",
        "--verbose",
        "--live",
        "--size",
        "--unsafe",
    ),
    *("--memory", "--disk", "--kernel", "--cmdline", "--vhost-user", "--filter", "--unsafe"),
}
"""Of pytest, git, qemu-storage-daemon, curl, systemd; Docker, rbd; machine monitors, nbdkit."""
OTHERS_NAMES = {"MockClock", "Keep", "Semantic"}
"""Classes of libraries, and words that look like one."""

TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
PATH = re.compile(rf"(?<![\w/.@:-])((?:{'|'.join(map(re.escape, TOP_LEVEL))})/[\w./*-]*\w)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+\w")
MODULE = re.compile(r"python3? -m ((?:bridge|nbd_plugin|tests)[\w.]*)")
MEMBER = re.compile(r"`([A-Z]\w*[a-z]\w*)\.(\w+)(?:\(\))?`")
CLASS = re.compile(r"`([A-Z][a-z]+[A-Z]\w*)`")
ADDERS = ("add_argument", "addoption")
LINK = re.compile(r"\]\(([^)\s]+)\)")
RUN = re.compile(r"`?\./run ([a-z][\w-]*)")
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
COMMAND = re.compile(r"(?:`|^)nbd-bridge ((?:(?:cache|config) )?[a-z][a-z-]*)\b", re.MULTILINE)


def text_of(document: Path) -> str:
    return (ROOT / document).read_text()


@cache
def sources() -> dict[Path, ast.Module]:
    files = (each for package in PACKAGES for each in (ROOT / package).rglob("*.py"))
    return {each.relative_to(ROOT): ast.parse(each.read_text()) for each in files}


@pytest.fixture(autouse=True, scope="module")
def _no_trees_afterwards() -> Iterator[None]:
    """They are millions of objects, which each collection of garbage would go through."""
    yield
    sources.cache_clear()


@cache
def functions(path: Path) -> frozenset[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(each.name for each in ast.walk(sources()[path]) if isinstance(each, kinds))


@cache
def members() -> dict[str, set[str]]:
    """Class → what it defines; classes of one name together."""
    found: dict[str, set[str]] = {}
    for tree in sources().values():
        for each in ast.walk(tree):
            if isinstance(each, ast.ClassDef):
                found.setdefault(each.name, set()).update(_members(each))
    return found


def _members(of: ast.ClassDef) -> Iterator[str]:
    for each in ast.walk(of):
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
            yield each.name
        elif isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            yield each.target.id
        elif isinstance(each, ast.Attribute):
            yield each.attr


@cache
def options() -> frozenset[str]:
    """Of `nbd-bridge`, of `./run`, and of what is run with `python -m tests…`."""
    found = set(re.findall(r"--[a-z][a-z-]+\w", (ROOT / "run").read_text()))
    for path, tree in sources().items():
        if path.name.startswith("test_"):
            continue
        for each in ast.walk(tree):
            if isinstance(each, ast.Call) and getattr(each.func, "attr", "") in ADDERS:
                texts = (one.value for one in each.args if isinstance(one, ast.Constant))
                found.update(text for text in texts if isinstance(text, str))
    _add_options(nbd_bridge, found)
    return frozenset(found)


def _add_options(command: click.Command, found: set[str]) -> None:
    found.add("--help")
    for parameter in command.params:
        found.update((*parameter.opts, *parameter.secondary_opts))
    for each in subcommands(command).values():
        _add_options(each, found)


def subcommands(command: click.Command) -> dict[str, click.Command]:
    """Asked for as click does it: a group may make them when they are wanted."""
    if not isinstance(command, click.Group):
        return {}
    context = click.Context(command)
    found = {name: command.get_command(context, name) for name in command.list_commands(context)}
    return {name: each for name, each in found.items() if each is not None}


@cache
def commands() -> frozenset[str]:
    found = set()
    for name, command in subcommands(nbd_bridge).items():
        found.update((name, *(f"{name} {each}" for each in subcommands(command))))
    return frozenset(found)


def anchors(document: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(document), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_paths_and_tests_that_a_document_names_exist(document: Path) -> None:
    text = text_of(document)

    missing = {each for each in PATH.findall(text) if not any(ROOT.glob(each))}
    for path, name in TEST.findall(text):
        if path in missing:
            continue
        if name not in functions(Path(path)):
            missing.add(f"{path}::{name}")

    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_options_and_commands_that_a_document_names_exist(document: Path) -> None:
    text = text_of(document)
    in_run = set(re.findall(r"^([a-z][\w-]*)(?: \|.*)?\)$", (ROOT / "run").read_text(), re.M))

    missing = {each for each in MODULE.findall(text) if importlib.util.find_spec(each) is None}
    missing |= set(RUN.findall(text)) - in_run
    typed = "\n".join(CODE.findall(text))
    missing |= {f"nbd-bridge {each}" for each in COMMAND.findall(typed) if each not in commands()}
    if document not in WITH_OTHER_OPTIONS:
        missing |= set(OPTION.findall(text)) - options() - OTHERS_OPTIONS

    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_classes_and_members_that_a_document_names_exist(document: Path) -> None:
    text = text_of(document)

    missing = set(CLASS.findall(text)) - members().keys() - OTHERS_NAMES
    for owner, name in MEMBER.findall(text):
        if owner not in OTHERS_NAMES and name not in members().get(owner, ()):
            missing.add(f"{owner}.{name}")

    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_of_a_document_lead_somewhere(document: Path) -> None:
    missing = set()
    for link in LINK.findall(text_of(document)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path) if path else document
        if not (ROOT / target).exists() or (anchor and anchor not in anchors(target)):
            missing.add(link)

    assert not missing


def test_every_document_is_found_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in LINK.findall(text_of(Path("README.md")))}

    assert {str(each) for each in DOCUMENTS if each.parent == Path("docs")} <= linked


def test_every_room_has_its_row_in_the_architecture() -> None:
    rooms = {each.parent.name for each in (ROOT / "bridge").glob("*/__init__.py")}
    named = set(re.findall(r"^\| `bridge/(\w+)`", text_of(Path("docs/architecture.md")), re.M))

    assert named == rooms


def test_rooms_import_only_what_the_architecture_says() -> None:
    """The three sides meet in `bridge/app` only."""
    allowed = {
        "spec": set(),
        "datapath": set(),
        "guest": {"datapath"},
        "server": {"datapath"},
        "cache": {"datapath"},
        "probe": {"peers", "guest", "datapath"},
        "peers": {"guest", "server", "datapath"},
        "app": {"guest", "cache", "server", "datapath", "api"},
        "api": {"app", "guest", "cache", "server", "datapath"},
    }
    exceptions = {(Path("bridge/cache/file/location.py"), "bridge.server.uri")}
    wrong = set()
    for path, tree in sources().items():
        room = path.parts[1] if path.parts[0] == "bridge" and len(path.parts) > 2 else ""
        for each in ast.walk(tree):
            if room in allowed and isinstance(each, ast.ImportFrom) and each.module:
                parts = each.module.split(".")
                if (
                    parts[0] != "bridge"
                    or len(parts) < 2
                    or parts[1] in ("errors", "host", "spec", "units", room)
                ):
                    continue
                if parts[1] not in allowed[room] and (path, each.module) not in exceptions:
                    wrong.add((str(path), each.module))

    assert not wrong


def test_cores_know_neither_trio_nor_sockets() -> None:
    """As the architecture says."""
    cores = ("bridge/guest/virtio/", "bridge/cache/", "bridge/guest/vhost_user/session.py")
    cores += tuple(f"bridge/server/{each}.py" for each in ("handshake", "transmission", "link"))
    edges = {Path("bridge/cache/file/location.py")}
    wrong = set()
    for path, tree in sources().items():
        if not str(path).startswith(cores) or path in edges:
            continue
        for each in ast.walk(tree):
            names = [one.name for one in each.names] if isinstance(each, ast.Import) else []
            names += [each.module or ""] if isinstance(each, ast.ImportFrom) else []
            wrong |= {(str(path), name) for name in names if name in ("trio", "socket")}

    assert not wrong


def test_durability_has_a_reason_and_tests_for_every_fault() -> None:
    text = text_of(Path("docs/durability.md"))
    rows = re.findall(r"^\| (\d+) \|", text, re.M)
    sections = re.split(r"^### (\d+)\. ", text, flags=re.M)[1:]
    bodies = dict(zip(sections[::2], sections[1::2], strict=True))

    assert rows == list(bodies)
    assert all(TEST.search(body) for body in bodies.values())


@pytest.mark.parametrize(
    "init",
    sorted(each.relative_to(ROOT) for each in (ROOT / "bridge").rglob("__init__.py")),
    ids=str,
)
def test_every_module_has_its_line_in_the_map_of_its_folder(init: Path) -> None:
    text = ast.get_docstring(sources()[init]) or ""

    names = {each.stem for each in sources() if each.parent == init.parent} - {
        "__init__",
        "__main__",
    }
    missing = {name for name in names if not re.search(rf"\b{name}\b", text)}

    assert not missing


def test_every_module_of_the_plugin_has_its_line_in_its_map() -> None:
    text = ast.get_docstring(sources()[Path("nbd_plugin/__init__.py")]) or ""

    missing = {each.name for each in (ROOT / "nbd_plugin").glob("[a-z]*.py")} - set(text.split())

    assert not missing
