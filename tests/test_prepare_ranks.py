"""`trireme prepare text` and `prepare sentences` on several ranks: the same bytes, and one complaint."""

from __future__ import annotations

import pytest
from mpi4py import MPI
from prepare_material import tree
from test_prepare_sentences import write_sentences
from test_prepare_text import text_of

from collectives.comm import Comm, RootFailed
from hpc.__main__ import build_parser
from hpc.prepare.command import run


def prepare(comm, *words):
    """What the command does, in these processes."""
    run(build_parser("prepare").parse_args(["prepare", *map(str, words)]), comm)


def check_same(world, capsys, kind, files, folder, *words):
    """Prepare on one rank, on two and on all three; what was written, and what the first rank of all printed."""
    few = Comm(world=MPI.COMM_WORLD.Split(int(world.rank == 2), world.rank))
    prepare(few, kind, *files, folder / f"on{few.size}", *words)
    world.barrier()
    capsys.readouterr()
    prepare(world, kind, *files, folder / "on3", *words)
    said = world.gather(capsys.readouterr().out)
    assert said[0].count("written to") == 1 and not any(said[1:])
    one = tree(folder / "on1")
    assert one == tree(folder / "on2") == tree(folder / "on3")
    return one, said[0]


def check_refused(world, folder, message, *words):
    """What is wrong is an error of rank 0 alone, which prints it."""
    with pytest.raises(RootFailed if world.rank else ValueError, match=message):
        prepare(world, *words)
    assert not list(folder.glob("out/*/dataset.json"))


@pytest.mark.mpi(ranks=[3], timeout=120)
def test_any_number_of_ranks_writes_the_same_and_complains_once(shared_folder, capsys):
    world = Comm()
    world.on_root(lambda: write_files(shared_folder))
    all_sentences(world, shared_folder / "sentences", capsys)
    all_text(world, shared_folder / "text", capsys)


def write_files(folder):
    for name in ("sentences", "text"):
        (folder / name).mkdir()
    write_sentences(folder / "sentences/all")
    (folder / "sentences/other").write_text("1 a\n2 b\n")
    for seed, name in enumerate("abc"):
        (folder / "text" / name).write_text(text_of(9000, seed, 5000))  # some 330 kB each: many utterances
    (folder / "text/blank").write_text("\n\n\n\n")


def all_sentences(world, folder, capsys):
    one, _ = check_same(world, capsys, "sentences", [folder / "all"], folder, "--folds", 3)
    assert len(one) == 3 * 3 * 3
    for words, message in (
        (("--min-count", 0), "--min-count 0"), (("--test", 2), "--test 2"), (("--test", "0,1"), "nor a file"),
        (("--test", folder / "all"), "is given twice"), (("--vocabulary-from", folder), "is not a data set"),
        (("--test", folder / "other"), "other', line 2 has label '2', which"),
    ):
        check_refused(world, folder, message, "sentences", folder / "all", folder / "out", *words)


def all_text(world, folder, capsys):
    files = [folder / name for name in "abc"]
    one, said = check_same(world, capsys, "text", files, folder, "--words", 2000, "--test", 0.05)
    assert len([name for name in one if name.startswith("train/labels-")]) == 8 and "2,000" in said
    for name, words, message in (
        ("a", ("--validation", 0.6), "from 0 to 0.5"), ("a", ("--shards", 0), "--shards 0"),
        ("blank", ("--validation", 0), "only empty lines"),
    ):
        check_refused(world, folder, message, "text", folder / name, folder / "out", *words)
