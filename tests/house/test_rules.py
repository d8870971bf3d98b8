"""The rules of the house that a program can check."""

import ast
import functools
import importlib
import inspect
import pathlib
import re
import types
import typing

import pytest

import lazy_orbax

PACKAGE = pathlib.Path(lazy_orbax.__file__).parent
PATHS = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES = [name for name in PATHS if not name.endswith(".__init__")]
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists())
MOST_LINES, MOST_FUNCTION_LINES, MOST_ATTRIBUTES = 300, 60, 9

# A room imports only rooms of lower floors; anyone may stand on the ground.
GROUND = {"errors", "_paths", "_machine", "_jax_context", "_lazily", "_members", "view"}
FLOORS = [
    {"plan", "timeline"},
    {"options", "snapshot", "_orbax", "timeline_lines"},
    {"storage", "pods"},
    {"trust", "recovery"},
    {"integrity"},
    {"save", "restore", "inspection"},
    {"tiers"},
    {"handlers", "combine"},
    {"args", "inspect", "reports", "transforms", "cli", "__init__", "__main__"},
]
# What a room may import beside the standard library; the others take what they need.
LEAST_IMPORTS = {
    "errors": set(),
    "_lazily": set(),
    "_members": set(),
    "_paths": set(),
    "view": set(),
    "_machine": set(),
    "_jax_context": {"jax"},
    "plan": {"jax", "numpy"},
    "timeline": set(),
    "timeline_lines": set(),
    "options": set(),
    "snapshot": {"jax", "numpy"},
    "recovery": {"jax"},
}


@functools.cache
def tree_of(module):
    return ast.parse(PATHS[module].read_text())


def room_of(module):
    return module.split(".")[0]


def floor_of(room):
    (floor,) = [n for n, rooms in enumerate(FLOORS) if room in rooms]
    return floor


@functools.cache
def imports_of(module):
    """Dotted names of everything that a module imports, at the top or anywhere inside."""
    names = []
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def own_imports_of(module):
    """The modules of lazy_orbax that a module imports."""
    found = set()
    for name in imports_of(module):
        inner = name.removeprefix("lazy_orbax.")
        if inner != name:
            known = [m for m in PATHS if inner == m or inner.startswith(f"{m}.")]
            assert known, f"{module} imports {name}, which is no module"
            found.add(max(known, key=len))
    return found


def test_every_room_has_its_floor():
    flat = {module for module in PATHS if "." not in module}
    placed = GROUND.union(*FLOORS)
    assert set(ROOMS) | flat <= placed, "give it a floor: which rooms may it import?"
    assert {room for rooms in FLOORS[1:-1] for room in rooms} <= set(ROOMS) | flat


@pytest.mark.parametrize("module", PATHS)
def test_imports_point_down(module):
    rooms = {room_of(name) for name in own_imports_of(module)} - GROUND - {room_of(module)}
    if room_of(module) in GROUND:
        assert not rooms
        return
    higher = {room for room in rooms if floor_of(room) >= floor_of(room_of(module))}
    if floor_of(room_of(module)) == len(FLOORS) - 1:  # The faces may know each other.
        higher -= FLOORS[-1]
    assert not higher


@pytest.mark.parametrize("room", [*ROOMS, ""])
def test_there_is_no_circle_in_a_room(room):
    arrows = {
        module: {name for name in own_imports_of(module) if room_of(name) == room or not room}
        for module in PATHS
        if room_of(module) == room or not room
    }
    while arrows:
        free = {module for module, targets in arrows.items() if not targets & set(arrows)}
        assert free, f"each of these imports another of them: {sorted(arrows)}"
        arrows = {module: targets for module, targets in arrows.items() if module not in free}


def test_imports_are_seen():
    # The tests above read imports as they are written: they must see them.
    assert {"save.begin", "save.finish", "options", "_orbax.symbols"} <= own_imports_of(
        "handlers.lazy"
    )


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_which_question_it_answers_and_imports_nothing(room):
    tree = tree_of(f"{room}.__init__")
    assert len(tree.body) == 1
    assert "?" in ast.get_docstring(tree) or "story" in ast.get_docstring(tree)


@pytest.mark.parametrize("module", [m for m in PATHS if room_of(m) in LEAST_IMPORTS])
def test_pure_rooms_stay_pure(module):
    foreign = {"jax", "numpy", "tensorstore", "orbax", "etils", "flax", "optax"}
    found = {name.split(".")[0] for name in imports_of(module)} & foreign
    assert found <= LEAST_IMPORTS[room_of(module)]


@pytest.mark.parametrize("module", PATHS)
def test_a_module_is_short(module):
    assert len(PATHS[module].read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("module", PATHS)
def test_functions_are_short(module):
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MOST_FUNCTION_LINES
    }
    assert not long


def attributes_of(cls):
    """What instances of a class have; of a record, nothing is counted."""
    if any("dataclass" in ast.dump(decorator) for decorator in cls.decorator_list):
        return set()
    return {
        node.attr
        for node in ast.walk(cls)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and getattr(node.value, "id", "") == "self"
    }


@pytest.mark.parametrize("module", PATHS)
def test_a_class_has_few_attributes(module):
    many = {
        node.name: sorted(attributes_of(node))
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.ClassDef) and len(attributes_of(node)) > MOST_ATTRIBUTES
    }
    # What an error says is a record.
    assert {name for name in many if not name.endswith("Error")} <= set(), many


@pytest.mark.parametrize("module", PATHS)
def test_a_name_says_what_a_module_does(module):
    vague = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}
    assert not vague & set(module.replace(".", "_").strip("_").split("_"))


def test_only_a_place_knows_which_kind_of_storage_it_is():
    """What differs between a directory and a bucket is a method of both, in `storage/places.py`."""
    asking = ("scheme_of", "isabs(", '"://"')
    found = {
        module: word for module in PATHS for word in asking if word in PATHS[module].read_text()
    }
    # It stands on the ground: it says what Orbax's names of directories mean.
    assert set(found) == {"storage.places", "_paths"}, found


INSIDE_OF_ORBAX = ("currentframe", "threading.enumerate", "/jax/orbax/", "awaitable_signals")


@pytest.mark.parametrize("module", [m for m in PATHS if room_of(m) != "_orbax"])
def test_the_inside_of_orbax_stays_in_one_room(module):
    text = PATHS[module].read_text()
    assert not [word for word in (*INSIDE_OF_ORBAX, "._src") if word in text]


def test_that_room_has_the_inside_of_orbax():
    text = "".join(PATHS[m].read_text() for m in PATHS if room_of(m) == "_orbax")
    assert all(word in text for word in (*INSIDE_OF_ORBAX, "._src"))


OWN = {"_orbax", *GROUND}


def private(name):
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def foreign_privates(source):
    """Private names that `source` uses and does not define: they are somebody else's."""
    tree = ast.parse(source)
    defined, used = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Attribute) and private(node.attr):
            if isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            else:
                used.setdefault(node.attr, node.lineno)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and private(str(name.value)):
                used.setdefault(name.value, node.lineno)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            whole = [getattr(node, "module", None) or "", *[alias.name for alias in node.names]]
            for part in ".".join(whole).split("."):
                if private(part) and part not in OWN:
                    used.setdefault(part, node.lineno)
        elif isinstance(node, ast.Constant) and "._src" in str(node.value):
            used.setdefault("_src", node.lineno)
    return {name: line for name, line in used.items() if name not in defined}


@pytest.mark.parametrize("module", [name for name in PATHS if room_of(name) != "_orbax"])
def test_only_one_room_touches_what_is_not_public(module):
    assert foreign_privates(PATHS[module].read_text()) == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from orbax.checkpoint._src.tree import utils", {"_src"}),
        ("import orbax.checkpoint._src.tree.utils", {"_src"}),
        ("importlib.import_module('orbax.checkpoint._src.tree')", {"_src"}),
        ("handler._use_ocdbt", {"_use_ocdbt"}),
        ("getattr(handler, '_impl', None)", {"_impl"}),
        ("self._mine = 1; other._mine", set()),
        ("x.__class__", set()),
    ],
)
def test_the_rule_sees_what_it_forbids(source, found):
    assert set(foreign_privates(source)) == found


def test_the_rule_is_broken_by_the_one_room_that_may():
    texts = [PATHS[name].read_text() for name in PATHS if room_of(name) == "_orbax"]
    assert {"_src", "_use_ocdbt"} <= set().union(*map(foreign_privates, texts))


def test_our_attributes_do_not_hide_those_of_the_stock_handler():
    """An attribute of the base class that we set by accident breaks stock behaviour silently."""
    base = lazy_orbax.LazyCheckpointHandler.__mro__[1]
    theirs = set(vars(base())) | {name for name in dir(base) if not name.startswith("__")}
    (cls,) = [
        node
        for node in tree_of("handlers.lazy").body
        if isinstance(node, ast.ClassDef) and node.name == "LazyCheckpointHandler"
    ]
    methods = {n.name for n in cls.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    attributes = {
        node.attr
        for node in ast.walk(cls)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and getattr(node.value, "id", "") == "self"
    }
    meant = {"__init__", "async_save", "restore", "metadata", "finalize", "close", "typestr"}
    assert {"async_save", "restore", "close"} <= methods
    assert (methods | attributes) & theirs <= meant


# The public surface.


def test_public_names_are_those_of_all():
    public = {
        name
        for name in dir(lazy_orbax)
        if not name.startswith("_") and not isinstance(getattr(lazy_orbax, name), types.ModuleType)
    }
    modules = {"args", "errors", "inspect", "reports", "transforms"}
    assert public - {"TYPE_CHECKING"} | modules == set(lazy_orbax.__all__)
    assert sorted(lazy_orbax.__all__) == lazy_orbax.__all__


@pytest.mark.parametrize("module", ["__init__", "inspect", "reports"])
def test_type_checkers_and_python_find_the_same_under_each_public_name(module):
    found = importlib.import_module(f"lazy_orbax.{module}".removesuffix(".__init__"))
    (block,) = [node for node in tree_of(module).body if isinstance(node, ast.If)]
    assert block.test.id == "TYPE_CHECKING"
    names = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(names) == found.__all__
    for name, home in names.items():
        value = getattr(importlib.import_module(home), name)
        assert getattr(found, name) is value, name


def public_names_of(module):
    """The names that a public module has for others: those of `__all__`, or its own classes."""
    own = [name for name, cls in vars(module).items() if is_class_of(cls, module)]
    return getattr(module, "__all__", own)


def is_class_of(value, module):
    return isinstance(value, type) and value.__module__ == module.__name__


def test_a_record_that_a_function_returns_is_a_report():
    reports = {getattr(lazy_orbax.reports, name) for name in lazy_orbax.reports.__all__}
    assert sorted(lazy_orbax.reports.__all__) == lazy_orbax.reports.__all__
    for name, value in PUBLIC.items():
        assert name.startswith("reports.") or value not in reports
        if inspect.isfunction(value) and not name.startswith("transforms."):
            returned = typing.get_type_hints(value).get("return")
            module = getattr(returned, "__module__", "")
            assert not module.startswith("lazy_orbax.") or returned in reports, name


def public_objects():
    for name in lazy_orbax.__all__:
        value = getattr(lazy_orbax, name)
        if isinstance(value, types.ModuleType):
            yield from (
                (f"{name}.{inner}", getattr(value, inner)) for inner in public_names_of(value)
            )
        yield name, value


PUBLIC = dict(public_objects())


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_is_documented(name):
    value = PUBLIC[name]
    doc = inspect.getdoc(value) or ""
    assert len(doc) > 20
    assert not doc.startswith(f"{name}("), "the docstring that dataclasses make up"
    if isinstance(value, type):
        for method, function in vars(value).items():
            if inspect.isfunction(function) and not method.startswith("_"):
                assert function.__doc__, f"{name}.{method}"


@pytest.mark.parametrize(
    "name",
    [
        "advise",
        "export",
        "log_failed_saves",
        "merge",
        "merge_coefficients",
        "node_local_options",
        "params_of",
        "parity_survives",
        "pytree_handler",
        "restore_latest_good",
        "restore_newest",
        "restore_replacing",
        "search",
        "split_step",
        "standard_handler",
        "verify",
        "timeline_file",
        "wait_until_staged",
        *(f"inspect.{verb}" for verb in lazy_orbax.inspect.__all__),
    ],
)
def test_every_parameter_and_error_of_a_public_function_is_documented(name):
    function = PUBLIC[name]
    doc = inspect.getdoc(function)
    assert "Raises:" in doc
    for parameter in inspect.signature(function).parameters:
        assert f"{parameter}:" in doc


def test_every_module_says_what_it_is_for():
    for module in PATHS:
        assert ast.get_docstring(tree_of(module)), module


@pytest.mark.parametrize("module", PATHS)
def test_nothing_prints_exits_or_relies_on_the_garbage_collector(module):
    names = {
        getattr(node.func, "id", getattr(node.func, "attr", ""))
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Call)
    }
    # A terminal that rich draws on has a method `print`, in the one module that writes there.
    assert not names & {"print", "exit", "_exit"} - ({"print"} if module == "cli.output" else set())
    methods = {n.name for n in ast.walk(tree_of(module)) if isinstance(n, ast.FunctionDef)}
    assert "__del__" not in methods


# The page that explains the house.

ARCHITECTURE = PACKAGE.parent / "examples" / "guides" / "architecture.md"


@pytest.mark.parametrize("room", ROOMS)
def test_the_page_names_every_room(room):
    assert f"| `{room}/` |" in ARCHITECTURE.read_text()


def test_the_page_names_every_module_beside_the_rooms():
    floors = ARCHITECTURE.read_text().partition("```text")[2].partition("```")[0].split()
    assert {module for module in PATHS if "." not in module} <= set(floors)


def test_what_the_page_opens_is_there():
    files = re.findall(r"`([\w/]+/\w+\.py)`", ARCHITECTURE.read_text())
    assert files
    assert not [file for file in files if not (PACKAGE / file).is_file()]


HELD = {"Lock", "RLock", "local", "ContextVar", "WeakSet", "WeakKeyDictionary"} | {
    "WeakValueDictionary"
}


def held_by_the_process(module):
    """Whether a module keeps, outside functions and records, something that changes."""
    made = [
        node.value for node in tree_of(module).body if isinstance(node, ast.Assign | ast.AnnAssign)
    ]
    names = {
        getattr(call.func, "attr", getattr(call.func, "id", ""))
        for call in made
        if isinstance(call, ast.Call)
    }
    own = {node.name for node in tree_of(module).body if isinstance(node, ast.ClassDef)}
    return bool(names & (HELD | own)) or any(
        isinstance(value, ast.Dict) and not value.keys for value in made
    )


@pytest.mark.parametrize("module", PATHS)
def test_the_page_names_what_the_process_keeps(module):
    states = ARCHITECTURE.read_text().partition("## State of")[2].partition("\n## ")[0]
    path = f"`{PATHS[module].relative_to(PACKAGE)}`"
    assert not held_by_the_process(module) or path in states


def test_what_the_process_keeps_is_seen():
    assert held_by_the_process("recovery.attempt")
    assert held_by_the_process("snapshot.host_budget")
    assert held_by_the_process("snapshot.step_copies")
    assert not held_by_the_process("plan.slabs")
