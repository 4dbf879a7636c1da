"""The layers of docs/architecture.md hold for the imports of the package."""

import ast
import importlib.util
import sys

import pytest

from tests.docs import pages


@pytest.fixture(scope="module")
def layers():
    spec = importlib.util.spec_from_file_location("layers", pages.DOCS / "site" / "layers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def level(layers):
    """The layer of each part, from 0 for the lowest."""
    return {part: number for number, (_, parts) in enumerate(reversed(layers.LAYERS)) for part in parts}


def test_every_part_has_one_layer_and_is_in_the_table(layers, level):
    parts = [part for _, parts in layers.LAYERS for part in parts]
    assert sorted(parts) == sorted(layers.uses())
    page = pages.text("architecture.md")
    assert [part for part in parts if f"`{part}" not in page] == []


def test_no_part_imports_upwards(layers, level):
    """Parts of one layer do not import each other, except for files, errors and hint in the lowest layer."""
    upwards = [(part, used) for part, found in layers.uses().items() for used in found if level[used] >= level[part]]
    assert [(part, used) for part, used in upwards if level[part] > 0] == []
    assert {used for part, used in upwards} <= {"files", "errors", "hint"}


def test_files_of_a_part_do_not_import_in_a_circle(layers):
    graph = {}
    for path in layers.PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(layers.PACKAGE).with_suffix("").parts)
        graph[name] = {tuple(module.split(".")) for module in layers.imported(path)}
    edges = {
        name: {other for other in graph if other != name and any(m[: len(k)] == k for m in found for k in [key(other)])}
        for name, found in graph.items()
    }
    done, order = set(), list(edges)
    while order:
        ready = [name for name in order if edges[name] <= done]
        assert ready, f"a circle among {order}"
        done |= {*ready}
        order = [name for name in order if name not in done]


def key(name: str) -> tuple[str, ...]:
    return tuple(name.split("."))


def outside(layers, part: str) -> set[str]:
    """The top-level modules, other than cib_jax, that a part's files import."""
    found = set()
    for path in layers.PACKAGE.rglob("*.py"):
        if layers.part_of(path) == part:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    found.add(node.module.split(".")[0])
    return found - {"cib_jax"}


def test_the_core_is_pure(layers):
    """The pure parts import numerical libraries, and none for files, logs or output."""
    allowed = {"jax", "flax", "numpy", "scipy", "optax", "jaxtyping", "threadpoolctl", "sklearn"}
    reaches = {"io", "logging", "pathlib", "shutil", "subprocess", "socket", "tempfile", "json", "pickle", "urllib"}
    for part in layers.PURE:
        assert outside(layers, part) <= allowed | (sys.stdlib_module_names - reaches), part


def test_data_does_not_import_networks_and_retrieval_does_not_import_training(layers):
    uses = layers.uses()
    assert not outside(layers, "data") & {"flax", "jax", "optax"}
    assert not uses["data"] & {"models", "losses", "training", "inference"}
    assert not uses["retrieval"] & {"training", "losses", "models", "data"}


def test_codes_are_unpacked_in_one_file(layers):
    where = [path.name for path in layers.PACKAGE.rglob("*.py") if "np.unpackbits(" in path.read_text(encoding="utf-8")]
    assert where == ["codes.py"]
