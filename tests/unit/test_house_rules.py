"""The rules of the house that a program can check."""

import ast
import inspect
import pathlib
import types

import pytest

import lazy_orbax

PACKAGE = pathlib.Path(lazy_orbax.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
MOST_LINES = 300

# A module imports modules of lower rank only. A new module gets its rank here.
RANKS = {
    "errors": 0,
    "_machine": 0,
    "_paths": 0,
    "threads": 1,
    "pace": 1,
    "events": 1,
    "jax_context": 1,
    "options": 2,
    "publication": 2,
    "host_budget": 2,
    "boxes": 1,
    "layout": 2,
    "in_flight": 2,
    "interrupted": 2,
    "operations": 2,
    "tree": 2,
    "tree_identity": 2,
    "given": 2,
    "split": 2,
    "_orbax": 3,
    "stock": 3,
    "sync": 3,
    "file_checks": 1,
    "zarr_checks": 3,
    "json_checks": 2,
    "metadata_checks": 3,
    "tree_checks": 3,
    "ocdbt_checks": 4,
    "size_checks": 4,
    "leftovers": 1,
    "save_error": 2,
    "attempt": 2,
    "cleaning": 6,
    "agreement": 4,
    "failures": 7,
    "forgotten": 5,
    "node_local": 4,
    "pack": 4,
    "host_copies": 3,
    "plan": 3,
    "fingerprint": 0,
    "fingerprint_traced": 1,
    "proof_programs": 3,
    "proof": 4,
    "proof_restored": 5,
    "digest": 3,
    "stale": 3,
    "digest_file": 4,
    "format": 5,
    "refuse": 4,
    "object_store": 4,
    "deadline": 5,
    "snapshot": 5,
    "chunk_files": 4,
    "large_pieces": 5,
    "small_files": 5,
    "sidecar_files": 5,
    "prepare": 6,
    "write": 6,
    "step_place": 6,
    "stored": 7,
    "durable": 7,
    "step_metadata": 7,
    "room": 6,
    "drain": 7,
    "in_step": 6,
    "restored": 8,
    "preemption": 9,
    "untrusted": 6,
    "verification": 8,
    "save": 8,
    "restore": 9,
    "latest_good": 10,
    "commit": 9,
    "handler": 10,
    "args": 11,
    "faces": 11,
    "prewarm": 12,
    "replaced": 12,
    "__init__": 13,
    "__main__": 13,
}
LEAST_IMPORTS = {
    # Pure planning: neither Orbax nor storage.
    "layout": {"jax", "numpy"},
    "plan": {"jax", "numpy"},
    "_paths": set(),
    "errors": set(),
    "host_budget": set(),
    "sync": set(),
    "options": set(),
    "events": set(),
    "publication": {"jax"},
    "snapshot": {"jax", "numpy"},
    "host_copies": {"jax", "numpy"},
    "pack": {"jax", "numpy"},
    "room": {"jax"},
    "given": {"jax"},
    "jax_context": {"jax"},
    "split": {"jax"},
    "in_step": {"jax"},
}


def tree_of(module):
    return ast.parse((PACKAGE / f"{module}.py").read_text())


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
    parts = [name.split(".") for name in imports_of(module)]
    return {name[1] for name in parts if name[0] == "lazy_orbax"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    assert module in RANKS, f"give {module} a rank: which modules may it import?"
    higher = {name for name in own_imports_of(module) if RANKS[name] >= RANKS[module]}
    assert not higher


def test_the_ranks_are_of_modules_that_exist():
    assert set(RANKS) == set(MODULES)
    # The test above reads imports as they are written: it must see them.
    assert {"save", "prepare", "options", "_orbax"} <= own_imports_of("handler")


@pytest.mark.parametrize("module", LEAST_IMPORTS)
def test_pure_modules_stay_pure(module):
    foreign = {"jax", "numpy", "tensorstore", "orbax", "etils", "flax", "optax"}
    assert {name.split(".")[0] for name in imports_of(module)} & foreign <= LEAST_IMPORTS[module]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_short(module):
    assert len((PACKAGE / f"{module}.py").read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("module", MODULES)
def test_a_name_says_what_a_module_does(module):
    vague = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}
    assert not vague & set(module.strip("_").split("_"))


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
                if private(part) and part not in RANKS:
                    used.setdefault(part, node.lineno)
        elif isinstance(node, ast.Constant) and "._src" in str(node.value):
            used.setdefault("_src", node.lineno)
    return {name: line for name, line in used.items() if name not in defined}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "_orbax"])
def test_only_one_module_touches_what_is_not_public(module):
    assert foreign_privates((PACKAGE / f"{module}.py").read_text()) == {}


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


def test_the_rule_is_broken_by_the_one_module_that_may():
    found = foreign_privates((PACKAGE / "_orbax.py").read_text())
    assert {"_src", "_use_ocdbt"} <= set(found)


def test_our_attributes_do_not_hide_those_of_the_stock_handler():
    """An attribute of the base class that we set by accident breaks stock behaviour silently."""
    base = lazy_orbax.LazyCheckpointHandler.__mro__[1]
    theirs = set(vars(base())) | {name for name in dir(base) if not name.startswith("__")}
    (cls,) = [
        node
        for node in tree_of("handler").body
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
        for name, value in vars(lazy_orbax).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    modules = {"args", "errors"}
    assert public | modules == set(lazy_orbax.__all__)
    assert sorted(lazy_orbax.__all__) == lazy_orbax.__all__
    for name in lazy_orbax.__all__:
        assert hasattr(lazy_orbax, name)


def public_objects():
    for name in lazy_orbax.__all__:
        value = getattr(lazy_orbax, name)
        if isinstance(value, types.ModuleType):
            yield from (
                (f"{name}.{inner}", cls)
                for inner, cls in vars(value).items()
                if isinstance(cls, type) and cls.__module__ == value.__name__
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
        "log_failed_saves",
        "node_local_options",
        "pytree_handler",
        "restore_latest_good",
        "restore_replacing",
        "split_step",
        "standard_handler",
        "verify",
        "wait_until_staged",
    ],
)
def test_every_parameter_and_error_of_a_public_function_is_documented(name):
    function = getattr(lazy_orbax, name)
    doc = inspect.getdoc(function)
    assert "Raises:" in doc
    for parameter in inspect.signature(function).parameters:
        assert f"{parameter}:" in doc


def test_every_module_says_what_it_is_for():
    for module in MODULES:
        assert ast.get_docstring(tree_of(module)), module


@pytest.mark.parametrize("module", MODULES)
def test_nothing_prints_exits_or_relies_on_the_garbage_collector(module):
    names = {
        getattr(node.func, "id", getattr(node.func, "attr", ""))
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Call)
    }
    assert not names & {"print", "exit", "_exit"}
    methods = {n.name for n in ast.walk(tree_of(module)) if isinstance(n, ast.FunctionDef)}
    assert "__del__" not in methods
