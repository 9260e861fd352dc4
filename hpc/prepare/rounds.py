"""Shards built by all ranks, in rounds of one a rank; after every round the ranks agree whether all went well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from collectives.comm import Comm
from hpc.prepare import journal
from hpc.prepare.progress import NOUNS, Counter

Advance = Callable[[int], None]  # called with an utterance's rows when it is written


def build_in_rounds(
    comm: Comm, folders: Mapping[str, Path], cut: Mapping[str, Sequence[Sequence[Any]]], mark: str,
    build: Callable[[str, int, Advance], dict[str, Any]], quiet: bool, nouns: tuple[str, str] = NOUNS,
) -> tuple[dict[str, list[Any]], int]:
    """Records of all shards, a list a set, and how many were found finished (collective).

    folders  set -> its folder, which `journal.claim` made ours
    cut      set -> its shards' utterances
    mark     the preparation's fingerprint
    build    writes shard `index` of a set and returns its record: {"files", "utterances", "frames", ...}
    quiet    show no progress
    nouns    what is shown as done: utterances and their rows

    Raises on every rank what `build` raises on one.
    """
    jobs = [(name, index) for name, pieces in cut.items() for index in range(len(pieces))]
    records: dict[tuple[str, int], Any] = {}

    def take(work: Sequence[tuple[str, int]], act: Callable[[str, int], Any]) -> None:
        answers = comm.each(lambda: [act(*work[i]) for i in comm.mine(len(work))])
        for rank, part in enumerate(answers):
            for job, record in zip(work[rank :: comm.size], part, strict=True):
                if record is not None:
                    records[job] = record

    take(jobs, lambda name, index: journal.remembered(folders[name], index, len(cut[name]), mark))
    resumed = len(records)
    todo = [job for job in jobs if job not in records]
    total = sum(len(piece) for pieces in cut.values() for piece in pieces)
    with Counter(comm.is_root() and not quiet, total, nouns) as counter:

        def written(name: str, index: int) -> dict[str, Any]:
            record = build(name, index, counter.advance)
            journal.remember(folders[name], index, len(cut[name]), mark, record)
            return record

        for at in range(0, len(todo), comm.size):
            counter.correct(sum(r["utterances"] for r in records.values()), sum(r["frames"] for r in records.values()))
            take(todo[at : at + comm.size], written)
    return {name: [records[name, i] for i in range(len(pieces))] for name, pieces in cut.items()}, resumed
