"""Where the tests of a module are, so that its name leads there."""

import ast
import pathlib

import pytest

import lazy_orbax

PACKAGE = pathlib.Path(lazy_orbax.__file__).parent
TESTS = pathlib.Path(__file__).parents[1]
UNIT = TESTS / "unit"

# Modules without a test of their own: which one covers them. A line goes when such a test comes.
COVERED_BY = {
    "__main__": "faults/test_integrity.py",
    "_jax_context": "interop/test_contexts.py",
    "_lazily": "house/test_import.py",
    "_machine": "unit/snapshot/test_choose_mode.py",
    "_orbax.describe": "interop/test_leaves.py",
    "_orbax.entry_points": "unit/handlers/test_installed.py",
    "_orbax.handed_in": "interop/test_places.py",
    "_orbax.multihost": "unit/pods/test_agreement.py",
    "_orbax.process_end": "faults/test_beside.py",
    "_orbax.records": "unit/save/test_plan_cache.py",
    "_orbax.restored_kinds": "unit/restore/test_wanted.py",
    "_orbax.standard_handler": "unit/_orbax/test_symbols.py",
    "_orbax.stored_kinds": "unit/restore/test_wanted.py",
    "_orbax.v1_checkpointer": "faults/test_v1.py",
    "_orbax.waiting": "unit/_orbax/test_lifecycle.py",
    "args": "interop/test_args.py",
    "combine.search_log": "unit/combine/test_search.py",
    "combine.search_population": "unit/combine/test_search.py",
    "combine.search_states": "unit/combine/test_search.py",
    "cli.bench": "unit/cli/test_main.py",
    "cli.clean": "unit/cli/test_main.py",
    "cli.diff": "unit/cli/test_main.py",
    "cli.du": "unit/cli/test_main.py",
    "cli.html": "unit/cli/test_main.py",
    "cli.keeper": "unit/tiers/test_kept_listing.py",
    "cli.ls": "unit/cli/test_main.py",
    "cli.output": "unit/cli/test_main.py",
    "cli.show": "unit/cli/test_main.py",
    "cli.timeline": "unit/cli/test_main.py",
    "cli.verify": "unit/cli/test_main.py",
    "cli.merge": "unit/cli/test_main.py",
    "combine.merge_output": "unit/combine/test_merge.py",
    "combine.merge_sources": "unit/combine/test_merge.py",
    "combine.merge_team": "pods/test_merge.py",
    "combine.merge_work": "unit/combine/test_merge.py",
    "combine.merge_writer": "unit/combine/test_merge.py",
    "cli.export": "unit/combine/test_export.py",
    "combine.exported": "unit/combine/test_export.py",
    "combine.tensor_files": "unit/combine/test_export.py",
    "handlers.stock_fallback": "unit/_orbax/test_symbols.py",
    "handlers.stock_saves": "unit/handlers/test_installed.py",
    "handlers.stock_shaped": "interop/test_places.py",
    "integrity.chunk_location": "faults/test_flips.py",
    "integrity.digest": "faults/test_integrity.py",
    "integrity.digest_file": "faults/test_integrity.py",
    "integrity.digest_in_parts": "faults/test_integrity.py",
    "integrity.fingerprint_traced": "unit/integrity/test_fingerprint.py",
    "integrity.proof_programs": "unit/integrity/test_fingerprint.py",
    "integrity.proof_restored": "unit/integrity/test_proof.py",
    "integrity.proof_subjects": "unit/integrity/test_fingerprint.py",
    "integrity.sidecar_files": "faults/test_flips.py",
    "integrity.step_metadata": "faults/test_integrity.py",
    "integrity.step_place": "faults/test_rolled_back.py",
    "integrity.stored_arrays": "faults/test_integrity.py",
    "integrity.stored_item": "faults/test_integrity.py",
    "integrity.verify": "faults/test_integrity.py",
    "integrity.verify_report": "faults/test_integrity.py",
    "inspect": "unit/cli/test_main.py",
    "inspection.leaves": "unit/inspection/test_show.py",
    "inspection.values": "unit/inspection/test_diff.py",
    "inspection.looking": "unit/inspection/test_ls.py",
    "save.linked_files": "unit/save/test_linked_chunks.py",
    "save.beside": "unit/tiers/test_keeping.py",
    "save.job": "unit/save/test_plan_cache.py",
    "plan.runs": "unit/plan/test_slabs.py",
    "plan.transforms.apply": "unit/plan/transforms/test_rules.py",
    "plan.transforms.cuts": "property/test_transform_properties.py",
    "plan.transforms.entries": "unit/plan/transforms/test_moments.py",
    "plan.transforms.leaves": "unit/plan/transforms/test_moments.py",
    "plan.transforms.part": "property/test_transform_properties.py",
    "plan.transforms.put_together": "unit/plan/transforms/test_rules.py",
    "plan.transforms.rule": "unit/plan/transforms/test_rules.py",
    "plan.transforms.rules_as_json": "unit/combine/test_export.py",
    "plan.transforms.scalars": "unit/plan/transforms/test_rules.py",
    "plan.transforms.takes": "unit/plan/transforms/test_transform_plan.py",
    "plan.transforms.virtual_array": "unit/plan/transforms/test_rules.py",
    "pods.node_local": "pods/test_saves.py",
    "recovery.cleaning": "faults/test_leftovers.py",
    "recovery.failed_saves": "faults/test_full_disk.py",
    "recovery.leftovers": "faults/test_leftovers.py",
    "recovery.unfinished_exports": "unit/combine/test_export.py",
    "recovery.preemption": "faults/test_preemption.py",
    "recovery.retired_steps": "faults/test_retired_steps.py",
    "reports": "faults/test_integrity.py",
    "restore.compare_arrays": "faults/test_integrity.py",
    "restore.either_way": "unit/restore/test_planned.py",
    "restore.groups": "unit/restore/test_planned.py",
    "restore.like": "unit/restore/test_load.py",
    "restore.latest_good": "faults/test_integrity.py",
    "restore.opened": "unit/restore/test_load.py",
    "restore.replacements": "unit/restore/test_neighbours.py",
    "restore.replacing": "faults/test_integrity.py",
    "restore.transformed": "unit/restore/test_load.py",
    "restore.verified": "faults/test_integrity.py",
    "save.begin": "interop/test_leaves.py",
    "save.commit": "faults/test_background.py",
    "save.disk_format": "interop/test_formats.py",
    "save.durable_path": "unit/save/test_step_sync.py",
    "save.finish": "faults/test_background.py",
    "save.holding": "faults/test_abandoned.py",
    "save.in_flight": "faults/test_background.py",
    "save.item_stores": "unit/storage/test_deadline.py",
    "save.merge": "pods/test_kills.py",
    "save.pipeline": "faults/test_background.py",
    "save.process_end": "faults/test_beside.py",
    "save.publication": "unit/test_timeline.py",
    "save.refused_trees": "faults/test_bad_input.py",
    "save.tree_identity": "unit/save/test_plan_cache.py",
    "save.unchanged_state": "faults/test_abandoned.py",
    "save.write_loop": "unit/storage/test_pace.py",
    "save.writer": "unit/storage/test_deadline.py",
    "snapshot.snapshot_step": "faults/test_snapshot_step.py",
    "snapshot.split_step": "faults/test_split_step.py",
    "snapshot.step_copies": "faults/test_snapshot_step.py",
    "storage.place": "unit/storage/test_deadline.py",
    "storage.places": "unit/storage/test_deadline.py",
    "storage.save_error": "unit/test_errors.py",
    "tiers.parity.errand": "unit/tiers/parity/test_node.py",
    "tiers.parity.exchange": "unit/tiers/parity/test_node.py",
    "tiers.parity.files": "unit/tiers/parity/test_node.py",
    "tiers.parity.guarded_votes": "unit/tiers/parity/test_guard.py",
    "tiers.parity.mend": "unit/tiers/parity/test_node.py",
    "tiers.parity.node_process": "unit/tiers/parity/test_guard.py",
    "tiers.parity.peer": "unit/tiers/parity/test_transport.py",
    "tiers.parity.restoring": "unit/tiers/parity/test_guard.py",
    "tiers.parity.serving": "unit/tiers/parity/test_node.py",
    "timeline_lines": "unit/inspection/test_timeline.py",
    "trust.bounded_json": "trust/test_refused.py",
    "trust.contents": "trust/test_refused.py",
    "trust.declared_sizes": "trust/test_refused.py",
    "trust.malformed": "trust/test_refused.py",
    "trust.ocdbt_decode": "trust/test_refused.py",
    "trust.sidecar_json": "trust/test_refused.py",
    "trust.tree_file": "trust/test_refused.py",
    "trust.zarr_arrays": "trust/test_refused.py",
    "transforms": "unit/restore/test_load.py",
    "view.blocks": "unit/view/test_html.py",
    "view.moments": "unit/inspection/test_timeline.py",
    "view.viewed": "unit/view/test_html.py",
}


def own_test(path):
    """Where a module's own test is, or would be; a leading underscore of its name is left out."""
    inside = path.relative_to(PACKAGE)
    return UNIT / inside.parent / f"test_{inside.stem.lstrip('_')}.py"


MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): own_test(path)
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name not in ("__init__.py", "__main__.py") or path == PACKAGE / "__main__.py"
}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_a_test_of_its_own_or_a_line_that_says_which_covers_it(module):
    has_own = MODULES[module].is_file()
    assert has_own or module in COVERED_BY, f"write {MODULES[module].relative_to(TESTS)}"
    assert not (has_own and module in COVERED_BY), "it has a test of its own: remove its line"


@pytest.mark.parametrize("module", COVERED_BY)
def test_a_line_names_a_module_and_a_test_that_are_there(module):
    assert module in MODULES
    assert (TESTS / COVERED_BY[module]).is_file()


def test_the_rooms_of_the_tests_are_those_of_the_package():
    rooms = {path.name for path in UNIT.iterdir() if any(path.glob("*.py"))}
    assert rooms
    assert {room for room in rooms if not (PACKAGE / room / "__init__.py").is_file()} == set()


def folders_imported_by(path):
    """Folders of tests that a file imports from."""
    folders = {folder.name for folder in TESTS.iterdir() if any(folder.rglob("*.py"))}
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    # Tests of these two name what they test: folders at the root that are called as they are.
    return names & folders - {"benchmarks", "examples"}


@pytest.mark.parametrize(
    "path", sorted(TESTS.rglob("*.py")), ids=lambda p: str(p.relative_to(TESTS))
)
def test_what_folders_share_is_equipment(path):
    assert folders_imported_by(path) <= {"equipment", path.relative_to(TESTS).parts[0]}


def test_shared_imports_are_seen():
    assert folders_imported_by(TESTS / "faults" / "test_full_disk.py") == {"equipment", "faults"}
