"""What holds for the complete project: the layers, the rules of its modules, its errors, and documents that match the code.

`docs/` is a contract: whatever users can set, request or read is named there, and whatever is named there exists.
"""

import ast
import dataclasses
import importlib
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, get_args

import google_crc32c
import numpy as np
import pytest
import torch
import typer
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

import gcs_dataset
from gcs_prefetchd import __version__, testing
from gcs_prefetchd.cache.directory import MARKER, CacheDirectory
from gcs_prefetchd.cli import app
from gcs_prefetchd.fetch.adaptive_concurrency import CHANGE_REASONS
from gcs_prefetchd.planning.wait_reasons import WAIT_REASONS
from gcs_prefetchd.planning.window import MAX_SPARE_ITEMS, MAX_SPARE_SHARE, MAX_WINDOW_ITEMS
from gcs_prefetchd.server.control_api import Control, control_app
from gcs_prefetchd.server.prometheus_metrics import METRICS, render_metrics
from gcs_prefetchd.server.runtime_settings import CHANGEABLE
from gcs_prefetchd.server.statistics_api import statistics_app
from gcs_prefetchd.server.statistics_json import to_json
from gcs_prefetchd.server.statistics_summary import summarize
from gcs_prefetchd.service.daemon import Daemon
from gcs_prefetchd.settings import ENVIRONMENT_PREFIX, Settings, load_settings
from gcs_prefetchd.shared import errors, messages
from gcs_prefetchd.shared.checked_read import ATTRIBUTE, NAME_ATTRIBUTE, Stamp, read_stamp, write_stamp
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import Manifest, build_manifest
from gcs_prefetchd.shared.objects import DataRoot, ObjectVersion, parse_object_uri
from gcs_prefetchd.shared.paths import cache_path
from gcs_prefetchd.testing.control import CONTROL_PATHS
from support.daemons import DATA_ROOT, make_settings

ROOT = Path(__file__).parents[2]
DAEMON, DATASET, TESTS, DOCS = ROOT / "daemon", ROOT / "dataset", ROOT / "tests", ROOT / "docs"
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(DOCS.rglob("*.md"))]
SOURCES = [*sorted(DAEMON.rglob("*.py")), *sorted(DATASET.rglob("*.py"))]

# What each package of the daemon imports beside itself. `docs/architecture.md` shows the same table.
PACKAGES: Mapping[str, set[str]] = {
    "shared": set(),
    "gcs": {"shared"},
    "cache": {"shared"},
    "planning": {"shared"},
    "fetch": {"shared", "gcs", "cache", "planning"},
    "settings": {"shared"},
    "server": {"shared", "gcs", "cache", "planning", "fetch", "settings"},
    "service": {"shared", "gcs", "cache", "planning", "fetch", "settings", "server"},
    "cli": {"shared", "settings", "server", "service"},
    "__main__": {"cli"},
    "testing": {"shared"},
}
ASYNC_READER = "gcs_dataset.async_download"  # loads aiohttp, so nothing may import it before it is needed
FOR_THE_ASYNC_READER = {"gcs_prefetchd.gcs.client", "gcs_prefetchd.gcs.credentials"}

MODULE_LINES, FUNCTION_LINES, CLASS_METHODS = 400, 40, 25


# --- Layers


def module_of(path: Path) -> str:
    """The name of the module in a source file."""
    parts = path.relative_to(DAEMON if path.is_relative_to(DAEMON) else DATASET).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path, package: str, *, at_the_top: bool = False) -> set[str]:
    """The modules of `package` that a file imports, anywhere in it or in its own body alone."""
    tree = tree_of(path)
    found: set[str] = set()
    for node in tree.body if at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            within = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= within or {str(node.module)}
    return {name for name in found if name == package or name.startswith(f"{package}.")}


MODULES = {module_of(path): path for path in SOURCES}


def package_of(module: str) -> str:
    """The package of the daemon that holds a module, or the module beside the packages."""
    return module.split(".")[1] if "." in module else ""


def is_testing(module: str) -> bool:
    return package_of(module) == "testing"


DAEMON_MODULES = [module for module in MODULES if module.startswith("gcs_prefetchd.")]


def test_every_package_is_in_the_table() -> None:
    assert set(PACKAGES) == {package_of(module) for module in DAEMON_MODULES}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_the_table_allows(package: str) -> None:
    allowed = PACKAGES[package] | {package, ""}
    ours = [module for module in DAEMON_MODULES if package_of(module) == package]
    imported = {module: imports(MODULES[module], "gcs_prefetchd") for module in ours}
    assert {m: wrong for m, names in imported.items() if (wrong := {n for n in names if package_of(n) not in allowed})} == {}


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: imports(path, module.partition(".")[0]) & set(MODULES) - {module} for module, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_importing_a_package_alone_loads_nothing() -> None:
    """So that a training worker, which imports `gcs_prefetchd.shared`, loads no aiohttp."""
    inits = [DAEMON / "gcs_prefetchd" / package / "__init__.py" for package in PACKAGES if package != "testing"]
    assert [str(path) for path in inits if path.exists() and path.read_text()] == []


def test_the_testing_server_imports_few_packages() -> None:
    for module in filter(is_testing, DAEMON_MODULES):
        others = {name for name in imports(MODULES[module], "gcs_prefetchd") if not is_testing(name)}
        assert others <= {"gcs_prefetchd.shared.errors", "gcs_prefetchd.shared.malloc"}, module


def test_the_daemon_does_not_import_the_dataset_package() -> None:
    assert [m for m, path in MODULES.items() if m.startswith("gcs_prefetchd") and imports(path, "gcs_dataset")] == []


def test_the_dataset_package_imports_only_what_is_shared() -> None:
    for module, path in MODULES.items():
        if module.startswith("gcs_dataset"):
            others = {name for name in imports(path, "gcs_prefetchd") if package_of(name) != "shared"}
            assert others <= (FOR_THE_ASYNC_READER if module == ASYNC_READER else set()), module
            assert ASYNC_READER not in imports(path, "gcs_dataset", at_the_top=True), module


def test_importing_the_dataset_package_loads_nothing_of_the_daemon() -> None:
    foreign = ["aiohttp", "diskcache", "watchdog", "pydantic"]
    code = f"import sys, gcs_dataset; print([name for name in {foreign} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


# --- Modules, functions, errors


def test_every_module_has_a_docstring_and_lists_its_public_names() -> None:
    def exports(tree: ast.Module) -> bool:
        targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
        targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
        return any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)

    trees = {module: tree for module, path in MODULES.items() if (tree := tree_of(path)).body}
    assert [module for module, tree in trees.items() if not ast.get_docstring(tree)] == []
    assert [module for module, tree in trees.items() if not exports(tree)] == []


def test_every_listed_public_name_exists() -> None:
    for module in MODULES:
        if not module.endswith("__main__") and MODULES[module].read_text():
            loaded = importlib.import_module(module)
            assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == [], module


def test_modules_are_short() -> None:
    assert {m: n for m, path in MODULES.items() if (n := len(path.read_text().splitlines())) > MODULE_LINES} == {}


def test_functions_are_short() -> None:
    """Measured from the first statement to the last: a signature in which a command declares its flags does not count."""
    long = {}
    for module, path in MODULES.items():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.body[-1].end_lineno or 0) - node.body[0].lineno + 1
                if lines > FUNCTION_LINES:
                    long[f"{module}.{node.name}"] = lines
    assert long == {}


def test_no_constructor_changes_another_object() -> None:
    """Hooks are parameters of constructors, so that one place sees how the parts are connected."""
    found = []
    for module, path in MODULES.items():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                for target in assigned_attributes(node):
                    if not (isinstance(target.value, ast.Name) and target.value.id == "self"):
                        found.append(f"{module}:{target.lineno}: {ast.unparse(target)}")
    assert found == []


def assigned_attributes(function: ast.FunctionDef) -> Iterator[ast.Attribute]:
    """The attributes that a function assigns, deletes or changes in place."""
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node


# Classes with more methods than that, and why they are one.
MANY_METHODS = {
    "LRUTable": "hash table, LRU ring and columns share their hot loops: a call between them would cost as much as a lookup",
    "GCSServer": "its methods are what users of the fake server call",
}


def test_classes_are_small() -> None:
    large = {}
    for path in MODULES.values():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) for child in node.body)
                if methods > CLASS_METHODS:
                    large[node.name] = methods
    assert set(large) == set(MANY_METHODS), large


# Modules without a test file of their name, and the file that tests them.
TESTED_ELSEWHERE = {
    "gcs_prefetchd.__main__": "test_cli.py",  # every command that a test runs goes through it
    "gcs_prefetchd.shared.errors": "system/test_project.py",  # their rules hold for all of them
    "gcs_prefetchd.planning.item_refs": "planning/test_catalog.py",  # two NamedTuples
    "gcs_prefetchd.fetch.cache_download": "fetch/test_fetcher.py",  # which downloads for real
    # They need a daemon, real processes and real signals.
    "gcs_prefetchd.fetch.process_download": "fetch/test_process_pool.py",
    "gcs_prefetchd.fetch.process_launcher": "fetch/test_process_pool.py",
    "gcs_prefetchd.fetch.process_main": "fetch/test_process_pool.py",
    # Each has one user, whose promises are all that it is for.
    "gcs_dataset.async_download": "dataset/test_stream_dataset.py",
    "gcs_dataset.gcs_client": "dataset/test_gcs_loader.py",
    "gcs_dataset.image_label_pairs": "dataset/test_image_dataset.py",
    "gcs_dataset.manifest_source": "dataset/test_dataloaders.py",
}


def test_every_module_has_a_test_file_of_its_name_or_one_that_tests_it() -> None:
    """The fake server is the exception: it is tested over HTTP in one piece, as its clients see it."""
    missing = set()
    for module in MODULES:
        package, _, name = module.removeprefix("gcs_prefetchd.").replace("gcs_dataset", "dataset").rpartition(".")
        is_init = MODULES[module].name == "__init__.py"
        if not is_init and not is_testing(module) and not (TESTS / package / f"test_{name}.py").exists():
            missing.add(module)
    assert missing == set(TESTED_ELSEWHERE)
    assert [file for file in TESTED_ELSEWHERE.values() if not (TESTS / file).exists()] == []


def test_no_file_has_a_mark_of_unfinished_work() -> None:
    mark = re.compile(r"\b(TO{}|FIX{}|X{})\b".format("DO", "ME", "XX"))  # in pieces, because this file is checked, too
    files = [*SOURCES, *TESTS.rglob("*.py"), *(ROOT / "examples").glob("*.py"), *DOCUMENTS, *(ROOT / "systemd").iterdir()]
    files += [ROOT / "Makefile", ROOT / "pyproject.toml"]
    assert [str(path) for path in files if mark.search(path.read_text())] == []


ERRORS = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, Exception)]


def test_every_error_is_public_and_of_one_tree() -> None:
    assert sorted(error.__name__ for error in ERRORS) == sorted(errors.__all__)
    assert all(issubclass(error, errors.PrefetchdError) for error in ERRORS)


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_survives_being_raised_again_and_pickled(error: type[errors.PrefetchdError]) -> None:
    text = "gs://b/images/7.jpg: 404"
    raised = error(text)
    for again in (type(raised)(str(raised)), pickle.loads(pickle.dumps(raised))):
        assert (type(again), str(again), again.args) == (error, text, (text,))
    assert not hasattr(raised, "message")  # torch would call such a class with another argument


# --- Documents: reading them


def text_of(document: str) -> str:
    return (DOCS / document).read_text()


def section(document: str, heading: str) -> str:
    """The text below a heading, up to the next one of any level."""
    _, found, rest = text_of(document).partition(f"\n{heading}\n")
    assert found, f"{document}: no heading {heading!r}"
    return re.split(r"^#+ ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def table(text: str) -> list[list[str]]:
    """The first table's rows without its heading, as lists of cells."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert lines, "no table"
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[0].splitlines()[2:]]


def code(cell: str) -> str:
    """The text between the cell's first two backticks."""
    return cell.split("`")[1]


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def code_of(document: Path) -> str:
    """Every block and span of code, each on lines of its own."""
    text = document.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return "\n".join([*blocks, *spans]).replace("\\\n", " ")


# --- docs/configuration.md


def settings_rows() -> list[list[str]]:
    """The rows of all tables below "Settings", one table for each topic."""
    _, found, rest = text_of("configuration.md").partition("\n## Settings\n")
    topics = rest.partition("\n## ")[0].split("\n### ")[1:]
    assert found
    assert len(topics) > 3
    return [row for topic in topics for row in table(topic)]


def test_every_setting_is_documented_and_no_other() -> None:
    assert [code(row[0]) for row in settings_rows()] == list(Settings.model_fields)


def test_a_documented_setting_starts_with_its_own_description() -> None:
    """So the document and `Settings` cannot contradict each other; the document may add more."""
    for row in settings_rows():
        described = Settings.model_fields[code(row[0])].description
        assert described
        assert plain(row[4]).startswith(plain(described).rstrip(".")), row[0]


def plain(text: str) -> str:
    """The text without links and marks of code."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "")


def test_documented_defaults_are_those_in_force() -> None:
    required = {"data_roots": ["gs://bucket"], "cache_dir": "/c", "cache_size": "1GB"}
    defaults = load_settings(required, None, {})
    for row in settings_rows():
        name, default = code(row[0]), row[2]
        field = Settings.model_fields[name]
        if default == "required":
            assert field.is_required(), name
        elif default == "none":
            assert field.default is None, name
        else:
            assert getattr(load_settings(required | {name: code(default)}, None, {}), name) == getattr(defaults, name), name


def test_documented_flags_exist_and_no_flag_is_undocumented() -> None:
    documented = {code(row[3]) for row in settings_rows()}
    others = table(section("configuration.md", "## Flags of `start` that are not settings"))
    documented |= {code(row[0]).split(" ")[0] for row in others}
    assert documented == flags_of("start") - {"--help"}


def test_the_example_file_is_a_configuration(tmp_path: Path) -> None:
    example = re.search(r"```toml\n(.*?)```", section("configuration.md", "## How to give a setting"), re.DOTALL)
    assert example
    (tmp_path / "config.toml").write_text(example[1])
    assert load_settings({}, tmp_path / "config.toml", {}).data_roots == ["gs://my-bucket/my-dataset"]


def test_environment_variables_in_documents_are_settings() -> None:
    names = {f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in Settings.model_fields} | {f"{ENVIRONMENT_PREFIX}CONFIG"}
    for document in DOCUMENTS:
        assert set(re.findall(rf"\b{ENVIRONMENT_PREFIX}[A-Z_]+\b", document.read_text())) <= names, document


# --- docs/http-api.md


@pytest.fixture
def manifest() -> Manifest:
    """A manifest of one item."""
    root = DataRoot.parse(DATA_ROOT)
    names = [parse_object_uri(f"{root.uri}/{name}") for name in ("images/7.jpg", "labels/7.png")]
    return build_manifest(root, ItemPatterns(), [ObjectVersion(name, 1, 1, 1) for name in names])


@pytest.fixture
def daemon(tmp_path: Path, manifest: Manifest) -> Daemon:
    """A daemon that was not started, with one stream, one failure in its counts and every limit."""
    built = Daemon(make_settings(tmp_path / "cache", "http://127.0.0.1:1", max_bytes_per_s="1GB"), lambda: None)
    built.registry.set_manifest(built.registry.catalog.assign_numbers(manifest))
    for data_root, number in built.registry.seeded.pop_due():
        built.registry.start_seeded(built.registry.seeded.prepare(data_root, number))
    built.gcs_client.counters.errors["503"] += 1
    return built


def control_of(daemon: Daemon) -> Control:
    parts = (daemon.cache, daemon.registry, daemon.prefetcher, daemon.statistics, daemon.runtime_settings)
    return Control(1, daemon.instance_id, daemon.settings.roots, *parts, daemon.bucket_sync.load_earlier_listing, lambda: None)


def endpoints(application: web.Application) -> set[str]:
    routes = application.router.routes()
    return {f"{route.method} {route.resource.canonical}" for route in routes if route.resource and route.method != "HEAD"}


def test_every_endpoint_is_documented_and_no_other(daemon: Daemon) -> None:
    over_tcp = {code(row[0]) for row in table(section("http-api.md", "## Over TCP"))}
    assert over_tcp == endpoints(statistics_app(daemon.statistics.collect, lambda: True))
    on_the_socket = {code(row[0]) for row in table(section("http-api.md", "## On the Unix socket"))}
    assert on_the_socket == endpoints(control_app(control_of(daemon)))


def fields(value: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The names of every number and list in a snapshot, as the document writes them; counts by kind or by reason are one."""
    for name, inner in value.items():
        if isinstance(inner, Mapping) and name not in ("errors", "waits"):
            yield from fields(inner, f"{prefix}{name}.")
        else:
            yield prefix + name
        if isinstance(inner, list):
            yield from fields(inner[0], f"{prefix}{name}[].")


async def test_every_field_of_the_statistics_is_documented_and_no_other(daemon: Daemon) -> None:
    documented = [code(row[0]) for row in table(section("http-api.md", "### /stats"))]
    assert documented == list(fields(to_json(daemon.statistics.collect())))


async def test_statistics_that_documents_name_exist(daemon: Daemon) -> None:
    existing = set(fields(to_json(daemon.statistics.collect())))
    for document in DOCUMENTS:
        named = re.findall(r"`((?:cache|reads|origin|limits|prefetch|process|streams\[\])\.[a-z_]+)", document.read_text())
        assert set(named) - existing == set(), document


def test_every_field_of_the_statistics_has_a_unit() -> None:
    assert [row for row in table(section("http-api.md", "### /stats")) if not row[1] or not row[2]] == []


async def test_every_metric_is_documented_and_no_other(daemon: Daemon) -> None:
    served = {}
    for family in text_string_to_metric_families(render_metrics(daemon.statistics.collect()).decode()):
        for sample in family.samples:
            served[sample.name] = (family.type, set(sample.labels))
    documented = {}
    for name, kind, labels, _ in table(section("http-api.md", "### /metrics")):
        documented[code(name)] = (kind.split(",")[0], set(re.findall(r"`(\w+)`", labels)))
    assert documented == served


def test_documented_metrics_name_their_field() -> None:
    documented = {code(name): code(field) for name, _, _, field in table(section("http-api.md", "### /metrics"))}
    assert documented == {metric.sample_name: metric.field.path for metric in METRICS}


def test_every_reason_of_a_limit_is_documented_and_no_other() -> None:
    assert [code(row[0]) for row in table(section("http-api.md", "### Why the limit changed"))] == list(CHANGE_REASONS)


def test_every_setting_that_can_be_changed_is_documented_and_no_other() -> None:
    rows = table(section("http-api.md", "### Settings that can be changed"))
    assert [code(row[0]) for row in rows] == list(CHANGEABLE)


def test_every_reason_to_wait_is_documented_and_no_other() -> None:
    assert [code(row[0]) for row in table(section("http-api.md", "### Why readers wait"))] == list(WAIT_REASONS)


def test_every_kind_of_error_is_documented() -> None:
    source = "".join(path.read_text() for path in (DAEMON / "gcs_prefetchd").rglob("*.py"))
    kinds = set(re.findall(r"UnusableResponseError\(\s*\"(\w+)\"", source)) | {"connection", "timeout", "deadline"}
    documented = [code(row[0]) for row in table(section("http-api.md", "### Kinds of errors"))]
    assert {kind for kind in documented if not kind.isdigit()} == kinds


def test_every_message_is_documented_with_its_fields_and_no_other() -> None:
    text = section("http-api.md", "### Messages")
    documented = {}
    for name, rest in re.findall(r"^`(\w+)`\n\n((?:\|.*\n)+)", text, re.MULTILINE):
        documented[name] = [code(row[0]) for row in table(rest)]
    classes = {name: getattr(messages, name) for name in messages.__all__ if name[0].isupper() and name != "PLAN_KINDS"}
    assert documented == {name: [field.name for field in dataclasses.fields(one)] for name, one in classes.items()}


# --- docs/architecture.md


def test_the_documented_packages_and_their_imports_are_those_of_the_code() -> None:
    rows = table(section("architecture.md", "## The packages"))
    assert {code(row[0]): set(re.findall(r"`(\w+)`", row[2])) for row in rows} == PACKAGES
    assert [code(row[0]) for row in rows] == list(PACKAGES)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documented_source_files_exist(document: Path) -> None:
    text = re.sub(r"<!--.*?-->", "", document.read_text(), flags=re.DOTALL)
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert any((folder / name).exists() for folder in (ROOT, DAEMON / "gcs_prefetchd", TESTS)), name


# --- docs/cache-layout.md


def test_documented_paths_are_those_of_the_mapping() -> None:
    rows = table(section("cache-layout.md", "## Names and paths"))
    for shown, path in rows:
        repeated = re.fullmatch(r"`(gs://\w+/)` and (\d+) times `(\w)`", shown)
        uri = repeated[1] + int(repeated[2]) * repeated[3] if repeated else code(shown)
        name = parse_object_uri(uri)
        assert cache_path(name.bucket, name.name) == code(path)
    assert len(rows) > 10


def test_everything_in_the_cache_directory_is_documented(directory: CacheDirectory, daemon: Daemon) -> None:
    tree = section("cache-layout.md", "## The tree")
    present = {path.name for path in directory.path.iterdir()} | {directory.daemon_file.name, directory.socket.name}
    assert [name for name in sorted(present | {"daemon.log"}) if f" {name}" not in tree] == []
    assert MARKER.splitlines()[0] in tree
    assert [code(row[0]) for row in table(tree[tree.index("| key") :])] == list(daemon._daemon_file(""))


def test_documented_arrays_are_those_of_a_saved_manifest(tmp_path: Path, manifest: Manifest) -> None:
    text = section("cache-layout.md", "## Manifests")
    folder = manifest.save(tmp_path)
    saved = {path.name: str(np.load(path).dtype) for path in folder.glob("*.npy")}
    assert {code(row[0]): row[1] for row in table(text)} == saved
    about = json.loads((folder / "manifest.json").read_text())
    assert {path.name for path in folder.iterdir()} == {*saved, "manifest.json"}
    assert [name for name in about if f"`{name}`" not in text] == []


def test_the_documented_stamp_is_valid(tmp_path: Path) -> None:
    text = section("cache-layout.md", "## The stamp")
    example = re.search(r"For example `([^`]+)` for `([^`]+)`", text)
    assert example
    value, path = example[1], example[2]
    with (tmp_path / "file").open("wb") as file:
        os.setxattr(file.fileno(), ATTRIBUTE, value.encode())
        stamp = read_stamp(file.fileno(), path)
        assert stamp is not None
        assert read_stamp(file.fileno(), f"{path}x") is None
        write_stamp(file.fileno(), stamp, path)
        assert os.getxattr(file.fileno(), ATTRIBUTE).decode() == value
    assert [row[0] for row in table(text)] == [str(word) for word in range(1, len(value.split(" ")) + 1)]
    assert f"`{ATTRIBUTE}`" in text
    assert f"`{NAME_ATTRIBUTE}`" in text_of("cache-layout.md")


@pytest.mark.parametrize("document", ["cache-layout.md", "how-to/read-from-other-programs.md"])
def test_documented_programs_that_read_the_cache_read_it(document: str, tmp_path: Path) -> None:
    name, data = "my-bucket/cats/images/7.jpg", b"the bytes of an image"
    (file := tmp_path / "objects" / name).parent.mkdir(parents=True)
    file.write_bytes(data)
    with file.open("rb") as opened:
        write_stamp(opened.fileno(), Stamp(1, len(data), google_crc32c.value(data)), name)
    programs = [program for program in python_blocks(text_of(document)) if name.rpartition("/")[2] in program]
    assert programs
    for program in programs:
        namespace: dict[str, Any] = {}
        exec(re.sub(r"/(mnt|local)/ssd/[\w-]+", str(tmp_path), program), namespace)  # what users are instructed to run
        assert namespace["data"] == data


# --- docs/semantics.md


def named_tests(text: str) -> list[str]:
    """The tests named in comments such as `<!-- tests: cache/test_cache.py::test_... -->`, as `file::name`."""
    comments = re.findall(r"<!-- tests:(.*?)-->", text, re.DOTALL)
    names = [name for comment in comments for name in comment.split()]
    assert [name for name in names if not re.fullmatch(r"[\w/]*test_\w+\.py::test_\w+", name)] == []
    return names


def existing_tests() -> set[str]:
    return {
        f"{path.relative_to(TESTS)}::{node.name}"
        for path in TESTS.rglob("test_*.py")
        for node in tree_of(path).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_every_promise_names_its_tests_and_they_exist() -> None:
    promised, unpromised, _ = text_of("semantics.md").partition("\n## What is not promised\n")
    assert unpromised
    promises = re.findall(r"^- .*(?:\n  .*)*", promised, re.MULTILINE)
    assert len(promises) > 40
    assert [promise for promise in promises if not named_tests(promise)] == []
    named = named_tests(promised)
    assert set(named) - existing_tests() == set()
    assert sorted(named) == sorted(test for promise in promises for test in named_tests(promise))  # none is named elsewhere


def test_every_symptom_has_a_cause_something_to_do_and_tests_that_exist() -> None:
    entries = re.split(r"^### ", text_of("troubleshooting.md"), flags=re.MULTILINE)[1:]
    assert len(entries) > 30
    labels = {entry.partition("\n")[0]: re.findall(r"^- \*\*(.+?):\*\*", entry, re.MULTILINE) for entry in entries}
    expected = ["Cause", "Effect", "What to do"]
    assert {symptom: found for symptom, found in labels.items() if found not in (expected, ["Log", *expected])} == {}
    assert [entry for entry in entries if not named_tests(entry)] == []
    assert set(named_tests(text_of("troubleshooting.md"))) - existing_tests() == set()


def test_documented_log_lines_are_logged() -> None:
    strings = {
        node.value
        for path in SOURCES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    documented = re.findall(r"^- \*\*Log:\*\* `(.+)`$", text_of("troubleshooting.md"), re.MULTILINE)
    assert documented
    assert [line for line in documented if not any(line in string for string in strings)] == []


def test_no_sentence_of_the_documents_names_a_test() -> None:
    for document in DOCUMENTS:
        assert re.findall(r"::test_\w+", re.sub(r"<!--.*?-->", "", document.read_text(), flags=re.DOTALL)) == [], document


# --- docs/planner.md


def test_the_documented_bounds_of_a_window_are_those_in_force() -> None:
    text = section("planner.md", "## How long the window is")
    assert f"| spare | items | {MAX_SPARE_ITEMS}, " in text
    assert f"no more than {MAX_SPARE_SHARE:.0%} of what the cache holds".replace("%", " %") in text
    assert f"{MAX_WINDOW_ITEMS:,} items at most" in text


# --- docs/how-to/tune-a-starving-gpu.md


def test_the_guide_to_tuning_has_every_reason_to_wait_and_no_other() -> None:
    rows = table(section("how-to/tune-a-starving-gpu.md", "## 4. Find out why readers waited"))
    assert [code(row[0]) for row in rows] == list(WAIT_REASONS)


# --- docs/python-api.md


def python_stub(name: str) -> Any:
    """The class or function that the document declares for a public name."""
    block = re.search(r"```python\n(.*?)```", section("python-api.md", f"### {name}"), re.DOTALL)
    assert block, f"python-api.md: {name} has no signature"
    namespace = {**vars(torch.utils.data), **vars(gcs_dataset)}
    exec(block[1], namespace)
    return namespace[name]


def parameters(of: Callable[..., Any]) -> list[tuple[str, object, object]]:
    return [(parameter.name, parameter.kind, parameter.default) for parameter in inspect.signature(of).parameters.values()]


def test_every_public_name_of_the_dataset_package_is_documented_and_no_other() -> None:
    headings = re.findall(r"^### (\w+)$", text_of("python-api.md"), re.MULTILINE)
    assert sorted(headings) == sorted(gcs_dataset.__all__)


@pytest.mark.parametrize("name", gcs_dataset.__all__)
def test_documented_signatures_are_those_of_the_code(name: str) -> None:
    stub, public = python_stub(name), getattr(gcs_dataset, name)
    assert isinstance(stub, type) == isinstance(public, type)
    assert parameters(stub) == parameters(public)
    methods = [method for method in vars(stub) if inspect.isfunction(vars(stub)[method])] if isinstance(stub, type) else []
    for method in methods:
        assert parameters(getattr(stub, method)) == parameters(getattr(public, method)), method


@pytest.mark.parametrize("name", gcs_dataset.__all__)
def test_every_parameter_of_a_public_name_is_explained_and_no_other(name: str) -> None:
    rows = table(section("python-api.md", f"### {name}"))
    explained = [parameter for row in rows for parameter in re.findall(r"`(\w+)`", row[0])]
    assert sorted(explained) == sorted(parameter for parameter, _, _ in parameters(getattr(gcs_dataset, name)))


@pytest.mark.parametrize("name", [name for name in gcs_dataset.__all__ if not isinstance(getattr(gcs_dataset, name), type)])
def test_what_a_public_function_returns_is_documented(name: str) -> None:
    assert "**Returns**" in section("python-api.md", f"### {name}")


def test_errors_in_the_python_api_exist() -> None:
    named = set(re.findall(r"`(\w+Error)`", text_of("python-api.md")))
    assert named <= {*errors.__all__, "IndexError", "TypeError"}


# --- docs/testing-server.md


def test_everything_public_of_the_testing_server_is_documented() -> None:
    text = text_of("testing-server.md")
    assert [name for name in testing.__all__ if not re.search(rf"\b{name}\b", text)] == []
    members = {name for one in (testing.GCSServer, testing.ServingGCS) for name in vars(one) if not name.startswith("_")}
    assert [name for name in members - {"start", "stop"} if not re.search(rf"`{name}\b", text)] == []
    faults = [code(row[0]).partition("(")[0] for row in table(section("testing-server.md", "## Faults"))]
    assert sorted(faults) == sorted(fault.__name__ for fault in get_args(testing.Fault))
    paths = [code(row[0]).split(" ")[1] for row in table(section("testing-server.md", "## Control from another process"))]
    assert set(paths) == CONTROL_PATHS


def test_the_testing_servers_options_are_documented() -> None:
    command = [sys.executable, "-m", "gcs_prefetchd.testing", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    documented = {code(row[0]) for row in table(section("testing-server.md", "## As a process"))}
    assert documented == set(re.findall(r"--[a-z-]+", shown)) - {"--help"}


# --- All documents


def commands() -> Mapping[str, Any]:
    return typer.main.get_command(app).commands  # type: ignore[attr-defined,no-any-return]  # a group


def flags_of(command: str) -> set[str]:
    return {flag for parameter in commands()[command].params for flag in parameter.opts}


def test_every_command_is_documented_and_documented_ones_exist_with_their_flags() -> None:
    named: set[str] = set()
    for document in DOCUMENTS:
        lines = re.findall(
            r"(?:^|\$ |sudo |/)gcs-prefetchd ([a-z]+)((?: +(?:--|#|\$|\[).*)?)$", code_of(document), re.MULTILINE
        )
        for command, rest in lines:
            assert command in commands(), (document, command)
            options = set(re.findall(r"(?<=\s)--[a-z-]+", rest.partition(" #")[0]))
            assert options <= flags_of(command) | {"--help"}, (document, command)
            named.add(command)
    assert named >= {"start", "stop"}


def test_make_targets_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        named = re.findall(r"(?:^|&& |\$ |sudo )make((?: [a-z][a-z-]*)+)", code_of(document), re.MULTILINE)
        assert {target for targets_ in named for target in targets_.split()} <= targets, document


def anchors(text: str) -> set[str]:
    """The fragments that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_has_a_target(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            path, _, fragment = target.partition("#")
            linked = document.parent / path if path else document
            assert linked.exists(), target
            assert not fragment or fragment in anchors(linked.read_text()), target


async def test_the_statistics_that_the_readme_shows_are_those_of_the_command(daemon: Daemon) -> None:
    shown = re.search(r"^\$ gcs-prefetchd stats .*\n((?:\w.*\n)+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert shown
    headings = [re.split(r" {2,}", line)[0] for line in shown[1].splitlines()]
    assert set(headings) <= set(summarize(daemon.statistics.collect()))


def test_the_readme_links_to_every_document() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for path in DOCUMENTS[1:] if f"]({(name := str(path.relative_to(ROOT)))})" not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_in_documents_parses_and_imports_existing_names(document: Path) -> None:
    for block in python_blocks(document.read_text()):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("gcs_prefetchd", "gcs_dataset"):
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_changelog_starts_with_this_version() -> None:
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == __version__


def test_the_changelog_of_a_first_release_has_nothing_but_what_was_added() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    if len(re.findall(r"^## ", text, re.MULTILINE)) == 1:
        assert re.findall(r"^### (.*)$", text, re.MULTILINE) == ["Added"]
