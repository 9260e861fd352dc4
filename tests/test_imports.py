"""Who may import whom: one way only, and the outside libraries each in their one room."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("hpc", "models", "collectives", "kernels", "jobs")
ALLOWED = {
    "jobs": {"jobs", "hpc", "models", "collectives", "kernels"},
    "hpc": {"hpc", "models", "collectives", "kernels"},
    "models": {"models", "kernels"},
    "collectives": {"collectives", "kernels"},
    "kernels": {"kernels"},
}
ROOMS = {
    "mpi4py": {"collectives/comm.py", "hpc/doctor.py", "hpc/bench_reducer.py"},
    "h5py": {"hpc/hdf5.py", "hpc/shards.py"},
    "cupy": {"kernels/gpu.py"},
    "submitit": {"jobs/submit.py"},
}
FILES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path):
    """Every imported top-level name with what is imported from it, wherever in the file it stands."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module.split(".")[0], node.module


def test_there_are_files_to_look_at():
    assert {str(f.parts[0]) for f in FILES} == set(PACKAGES)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way_only(path):
    wrong = [name for top, name in imports(path) if top in PACKAGES and top not in ALLOWED[path.parts[0]]]
    assert not wrong, f"{path} imports {wrong}"
    for library, rooms in ROOMS.items():
        assert str(path) in rooms or library not in {top for top, _ in imports(path)}, f"{path} imports {library}"
    if path.parts[0] == "hpc":
        concrete = {"models.frames", "collectives.allreduce"} & {name for _, name in imports(path)}
        assert not concrete or str(path) == "hpc/build.py", f"{path} knows {concrete}"


def test_who_only_looks_at_runs_waits_for_no_torch():
    """Importing it takes seconds, of a shared file system tens of seconds."""
    quick = "hpc.report, hpc.trace, hpc.compare, hpc.doctor, hpc.bench, jobs.listing, jobs.logs"
    words = [sys.executable, "-c", f"import sys, {quick}; sys.exit('torch' in sys.modules)"]
    assert subprocess.run(words, cwd=ROOT).returncode == 0


def test_no_junk_drawers_and_nothing_that_runs_code_from_files():
    names = {path.name for path in FILES}
    assert not names & {"utils.py", "helpers.py", "common.py", "base.py", "misc.py"}
    for path in FILES:
        assert not {"pickle", "dill", "joblib"} & {top for top, _ in imports(path)}, path
        assert "torch.load(" not in (ROOT / path).read_text(), path


def test_the_loop_stays_one_screen():
    assert len((ROOT / "hpc/train.py").read_text().splitlines()) <= 150
