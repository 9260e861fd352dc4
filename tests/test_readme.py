"""What the README tells a newcomer to type is what works: every command is parsed, every recipe key is resolved."""

import re
import shlex
from pathlib import Path

import pytest

from hpc.__main__ import build_parser
from hpc.build import registry
from hpc.config import Data, Minibatch, keywords_of, load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.M | re.S)
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in LINES if re.match(r"(mpiexec|srun|trireme) ", line) and "..." not in line]


def words_of(line):
    words = shlex.split(line.partition(" > ")[0])
    return words[1:] if words[0] == "trireme" else words[words.index("hpc") + 1 :]


def test_there_are_commands():
    assert {words_of(c)[0] for c in COMMANDS} >= {
        "train", "prepare", "evaluate", "predict", "report", "compare", "doctor", "launch", "submit",
        "sbatch", "jobs", "logs",
    }


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line):
    words = words_of(line)
    arguments = build_parser(words[0]).parse_args(words)
    if words[0] == "train" and arguments.recipe.startswith("jobs/"):
        load(ROOT / arguments.recipe, arguments.overrides, registry())


def test_make_targets_and_files_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z]+)", README))
    assert {"demo", "test", "setup", "check"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path


def test_the_table_of_recipe_keys_is_true():
    rows = dict(re.findall(r"^\| `\[(\w+)\]` \| (.*) \|$", README, re.M))
    known = registry()
    valid = {
        table: {key for cls in known[table].values() for key in keywords_of(cls)} | {"name"} | set(known[table])
        for table in ("task", "strategy", "optim", "schedule")
    }
    assert {"task", "strategy", "optim", "schedule", "data", "validate", "minibatch", "checkpoint", "log"} == set(rows)
    for table, keys in valid.items():
        told = set(re.findall(r"`(\w+)`", rows[table]))
        assert told and told <= keys, (table, told - keys)
        assert set(known[table]) <= set(re.findall(r"\w+", rows[table])), table
    for table, section in (("data", Data), ("minibatch", Minibatch)):
        assert set(re.findall(r"`(\w+)`", rows[table])) == set(section.model_fields), table


def test_ci_calls_what_the_readme_names():
    script = (ROOT / ".ci/run").read_text()
    assert "make demo" in script and ("make test" in script or "make check" in script)
