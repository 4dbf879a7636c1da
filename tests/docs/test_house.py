"""docs/house.svg is the house as it stands, and what docs/architecture.md says of it holds of the imports."""

import ast
import importlib.util
import sys
import xml.etree.ElementTree

import pytest

from tests.docs import pages


@pytest.fixture(scope="module")
def house():
    spec = importlib.util.spec_from_file_location("house", pages.DOCS / "site" / "house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_up_to_date(house):
    """`python docs/site/house.py` would write what is there."""
    assert pages.text("house.svg") == house.picture()
    xml.etree.ElementTree.fromstring(house.picture())


def test_nothing_calls_upwards(house):
    level = house.floors(uses := house.arrows())
    assert {room: level[room] for room in house.GROUND} == dict.fromkeys(house.GROUND, 0)
    assert [(room, under) for room in uses for under in uses[room] if level[under] >= level[room] > 0] == []
    # The ground stands on nothing but itself.
    assert all(uses[room] <= {*house.GROUND} for room in house.GROUND)


def test_a_circle_is_told(house):
    with pytest.raises(ValueError, match="in a circle, or stand on such: a, b, c"):
        house.floors({"a": {"b"}, "b": {"a"}, "c": {"a"}, "d": set()})


def test_every_room_is_in_the_table(house):
    rooms = [house._title(room) for room in house.arrows()]
    page = pages.text("architecture.md")
    assert [room for room in rooms if f"`{room}`" not in page] == []


def outside(house, room: str) -> set[str]:
    """The top-level modules, other than cib_jax, that a room's files import."""
    found = set()
    for path in house.PACKAGE.rglob("*.py"):
        if house.room_of(path) == room:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    found.add(node.module.split(".")[0])
    return found - {"cib_jax"}


def test_the_core_is_pure(house):
    """Numbers, NumPy's and SciPy's threads, and nothing that reaches a file, a log or a screen."""
    allowed = {"jax", "flax", "numpy", "scipy", "optax", "jaxtyping", "threadpoolctl", "sklearn"}
    pure = house.KINDS["pure: no file, no state"]
    assert set(pure) <= house.arrows().keys()
    reaches = {"io", "logging", "pathlib", "shutil", "subprocess", "socket", "tempfile", "json", "pickle", "urllib"}
    for room in pure:
        found = outside(house, room)
        assert found <= allowed | (sys.stdlib_module_names - reaches), room


def test_data_retrieval_and_training_know_their_own(house):
    uses = house.arrows()
    networks = {"backbones", "encoder", "objective", "training", "hashing"}
    assert not uses["data"] & networks and not outside(house, "data") & {"flax", "jax", "optax"}
    assert not uses["retrieval"] & {"training", "objective", "encoder", "backbones", "data"}
    of_data = {
        module
        for path in (house.PACKAGE / "training").glob("*.py")
        for module in house.imported(path)
        if "data" in module
    }
    assert of_data == {"data.loader", "data.images.Images"}


def test_codes_are_packed_in_one_place(house):
    """Labels and pictures are packed elsewhere; codes are unpacked in binary.py alone."""
    where = [path.name for path in house.PACKAGE.rglob("*.py") if "np.unpackbits(" in path.read_text(encoding="utf-8")]
    assert where == ["binary.py"]
