"""Spans and `trireme trace` on real runs: two ranks, several windows, a resume, and that tracing changes nothing."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from itertools import pairwise

import pytest
from material import write_recipe
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Annotation, Text
from PIL import Image
from rich.console import Console
from test_training import ranks_below, wait_for_step

from hpc.files import sha256_of
from hpc.records import read_records
from hpc.spans import SPANS_AT_MOST, Spans, clock_offset, offset_bounds
from hpc.summary import read_run, summarize
from hpc.trace import chrome, percents, show, trace
from hpc.trace_picture import WORDS, picture
from hpc.trace_records import EXCHANGE, LOADING, STEP, Attempt, RankTrace, Span, lanes_of, last_turns, read_traces

WINDOW = 6  # turns traced from the start and from every validation on
BUCKETS = "strategy={name='allreduce', bucket_mib=0.004}"  # some buckets even of a small model


@pytest.fixture(scope="module")
def traced(tmp_path_factory, plain_environment):
    """A run of two ranks, two epochs, with spans of an exchange."""
    folder = tmp_path_factory.mktemp("traced")
    recipe = write_recipe(folder)
    done = subprocess.run(
        ["mpiexec", "-n", "2", sys.executable, "-m", "mpi4py", "-m", "hpc", "train", recipe, BUCKETS,
         f"log.trace={WINDOW}", "validate.every=0", "schedule={name='newbob', epochs=2, min_epochs=99}"],
        env=plain_environment, check=True, capture_output=True, text=True, timeout=120,
    )
    (folder / "said.txt").write_text(done.stderr)
    return folder / "run"


def test_a_window_opens_at_the_start_and_after_every_validation(traced):
    (attempt,) = read_traces(traced)
    assert sorted(attempt.ranks) == [0, 1]
    per_epoch = read_run(traced).start["steps_per_epoch"]
    assert per_epoch > WINDOW
    expected = [*range(1, WINDOW + 1), *range(per_epoch + 1, per_epoch + WINDOW + 1)]
    for rank in attempt.ranks.values():
        assert [turn.step for turn in rank.turns] == expected
        assert sum(span.name == "validate" for span in rank.spans) == 2


def test_phases_cover_the_turns_and_nothing_overlaps_within_a_lane(traced):
    (attempt,) = read_traces(traced)
    for rank in attempt.ranks.values():
        assert {lane for lane in lanes_of(rank.spans) if not lane.startswith(EXCHANGE)} == {"turn", STEP, LOADING}
        for lane, spans in lanes_of(rank.spans).items():
            for before, after in pairwise(spans):
                assert before.begin <= before.end <= after.begin <= after.end, (lane, before, after)
        for turn in rank.turns:
            names = [span.name for span in turn.phases if span.name not in ("log", "checkpoint")]
            assert names == ["read", "forward", "backward", "backward"] * 2 + ["exchange"]
            assert all(span.end <= turn.end for span in turn.phases), turn
            named = r"bucket (\d+) (reduce|update|share)"
            parts = [re.fullmatch(named, span.name).groups() for span in turn.exchanges]
            assert len(parts) == len(set(parts)) == 3 * len({bucket for bucket, _ in parts}) > 2, "several buckets"
            assert 0 < turn.exchanging() <= turn.seconds
        whole = sum(turn.seconds for turn in rank.turns)
        assert 0.6 * whole < sum(sum(turn.spent().values()) for turn in rank.turns) <= whole


def test_the_next_piece_of_every_split_is_loaded_while_this_one_trains(traced):
    (attempt,) = read_traces(traced)
    for rank in attempt.ranks.values():
        loads = [span for span in rank.spans if span.lane == LOADING]
        splits = range(2 * rank.rank, 2 * rank.rank + 2)
        assert {span.name for span in loads} == {f"load split {split}" for split in splits}
        for split in splits:
            own = [span for span in loads if span.name == f"load split {split}"]
            ahead = [s for s in own if any(t.begin < s.begin < t.end for t in rank.turns)]
            assert ahead, "none was read while a turn was under way"
            assert len({(s.args["epoch"], s.args["block"]) for s in own}) == len(own)


def test_the_clocks_of_two_ranks_agree(traced):
    """Nobody has the whole sum before everybody came to the last backward: true of times on one clock."""
    (attempt,) = read_traces(traced)
    pairs = list(zip(attempt.ranks[0].turns, attempt.ranks[1].turns, strict=True))
    assert len(pairs) == 2 * WINDOW
    for one, other in pairs:
        ends, begins = [], []
        for turn in (one, other):
            ends.append(next(s.end for s in turn.phases if s.name == "exchange"))
            begins.append([s.begin for s in turn.phases if s.name == "backward"][-2])
        assert max(begins) <= min(ends)
    started = read_run(traced).start["time"] * 1e9
    assert abs(pairs[0][0].begin - started) < 60e9, "times are those of rank 0's wall clock"


def test_the_share_of_the_exchange_that_was_hidden_is_recorded_and_shown(traced, trireme):
    trains = [r for r in read_records(traced) if r["event"] == "train"]
    parts = [part for train in trains for part in train["by_rank"]]
    assert all(part["exchange_active"] >= 0 for part in parts) and any(part["exchange_active"] for part in parts)
    waited, active = (sum(part[key] for part in parts) for key in ("exchange", "exchange_active"))
    hidden = summarize(read_run(traced))["exchange_hidden"]
    assert hidden == pytest.approx(min(1, max(0, 1 - waited / active)))
    shown = f"{100 * hidden:.0f} %"
    assert "exchange hidden" in (traced.parent / "said.txt").read_text()
    trireme("report", traced)
    assert "exchange hidden" in (traced / "report.html").read_text() and shown in (traced / "report.html").read_text()
    told = trireme("compare", traced, traced, "--out", traced.parent).stdout
    assert "exchange hidden" in told and shown in told


def test_the_command_writes_a_timeline_a_picture_and_a_table(traced, trireme):
    told = trireme("trace", traced).stdout
    for words in ("ui.perfetto.dev", "chrome://tracing", str(traced / "trace.png"), "forward", "slowest is rank"):
        assert words in told, told
    written = json.loads((traced / "trace.json").read_text())
    events = [e for e in written["traceEvents"] if e["ph"] == "X"]
    assert min(e["ts"] for e in events) == 0 and all(e["dur"] >= 0 for e in events)
    assert {e["pid"] for e in events} == {0, 1}
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in written["traceEvents"] if e["name"] == "thread_name"}
    assert {named[e["pid"], e["tid"]].rstrip(" 0123456789") for e in events} == {"turn", "step", "exchange", "loading"}
    for thread in named:  # a viewer wants what is in one thread to be in order
        held = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if (e["pid"], e["tid"]) == thread)
        assert all(before[1] <= after[0] + 1e-3 for before, after in pairwise(held)), named[thread]
    processes = [e["args"]["name"] for e in written["traceEvents"] if e["name"] == "process_name"]
    assert [name.split(" on ")[0] for name in processes] == ["rank 0", "rank 1"]
    (attempt,) = read_traces(traced)
    assert len(events) == sum(len(rank.spans) for rank in attempt.ranks.values())
    turn = attempt.ranks[1].turns[3]
    inside = [e for e in events if e["pid"] == 1 and e["args"]["step"] == turn.step and e["name"] == "forward"]
    assert [e["dur"] for e in inside] == pytest.approx(
        [(s.end - s.begin) / 1e3 for s in turn.phases if s.name == "forward"]
    )
    with Image.open(traced / "trace.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width == 1600 and len(picture.convert("L").getcolors()) > 20


def test_the_numbers_of_the_table_add_up(traced, trireme, tmp_path):
    told = json.loads(trireme("trace", traced, "--json", "--turns", "1", "--out", tmp_path / "t.json").stdout)
    assert (tmp_path / "t.json").exists() and (tmp_path / "t.png").exists()
    assert [row["rank"] for row in told["ranks"]] == [0, 1] and told["attempts"] == 1
    for row in told["ranks"]:
        assert sum(row["shares"].values()) == pytest.approx(1) and row["turns"] == 2 * WINDOW
        assert row["exchange_hidden"] is None, "ranks of one host exchange between two layers, in backward's time"
        turns = read_traces(traced)[0].ranks[row["rank"]].turns
        assert row["turn_s"] == pytest.approx(statistics.fmean(turn.seconds for turn in turns))
        assert row["working_s"] == pytest.approx(row["turn_s"] * (1 - row["shares"]["exchange"]))
    working = [row["working_s"] for row in told["ranks"]]
    assert told["slowest"] == working.index(max(working)) and told["behind"] >= 0


def test_tracing_changes_nothing_learned_and_none_writes_nothing(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    fixed = ("schedule={name='constant', epochs=1}",)
    digests = {}
    for turns in (0, 4):
        run = tmp_path / f"run{turns}"
        trireme("train", recipe, f"run={run}", f"log.trace={turns}", *fixed, ranks=2)
        digests[turns] = sha256_of(run / "model.safetensors")
        assert (run / "trace").exists() == bool(turns)
    assert digests[0] == digests[4]
    said = trireme("trace", tmp_path / "run0", code=1).stderr
    assert "log.trace" in said and "Traceback" not in said
    assert "not a run folder" in trireme("trace", tmp_path / "nothing", code=1).stderr


def test_attempts_after_a_resume_and_a_torn_last_line(trireme, start, tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "stopped"
    more = (f"run={run}", "schedule.epochs=60", "validate.every=0", "log.trace=10")
    process = start("train", recipe, *more, ranks=2)
    wait_for_step(run, 20, process)
    os.kill(max(ranks_below(process.pid)), signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    (first,) = read_traces(run)
    for rank in (0, 1):  # as a kill in the middle of writing leaves it
        path = run / "trace" / f"rank-{rank:05d}.jsonl"
        path.write_bytes(path.read_bytes()[:-9])
    (torn,) = read_traces(run)
    assert [len(r.spans) for r in torn.ranks.values()] == [len(r.spans) - 1 for r in first.ranks.values()]
    process = start("train", recipe, *more)
    at = read_run(run).end["step"]
    wait_for_step(run, at + 12, process)
    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert "training frames, 1 rank on " in said and ", 4 splits, " in said
    before, after = read_traces(run)
    assert before == torn and sorted(after.ranks) == [0] and after.began > before.began
    assert after.ranks[0].step == at and after.ranks[0].turns[0].step == at + 1
    told = trireme("trace", run).stdout
    assert "last attempt" in told and "One rank" in told
    events = [e for e in json.loads((run / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    assert {(e["args"]["attempt"], e["pid"]) for e in events} == {(1, 0), (1, 1), (2, 0)}


# -- the recorder and the reader, alone ---------------------------------------------------------------------------


class Alone:
    """A world of one rank; what `Spans.open` and `clock_offset` ask of a Comm."""

    rank, size, host = 0, 1, "here"

    def barrier(self):
        pass

    def gather(self, value):
        return [json.loads(json.dumps(value))]


def opened(folder, turns):
    spans = Spans(folder, turns)
    spans.open(Alone(), 0)
    (folder / "recipe.toml").write_text("")
    return spans


def test_spans_of_many_threads_are_all_written(tmp_path):
    spans = opened(tmp_path, 5)

    def work(number):
        for i in range(300):
            spans.note(f"bucket {number} reduce", i, i + 1)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        spans.flush()
    spans.flush()
    (attempt,) = read_traces(tmp_path)
    assert len(attempt.ranks[0].spans) == 8 * 300
    assert len(lanes_of(attempt.ranks[0].spans)) == 8, "parts at the same time get lanes of their own"


def test_a_trace_is_bounded(tmp_path):
    spans = opened(tmp_path, 2)
    for i in range(SPANS_AT_MOST + 100):
        spans.add("read", i, i + 1)
    spans.flush()
    assert not spans.left and len(read_traces(tmp_path)[0].ranks[0].spans) == SPANS_AT_MOST
    spans.add("validate", 10**9, 10**9 + 1)
    assert spans.left == 2, "a validation opens it again"


def test_a_folder_that_cannot_be_written_ends_the_tracing_only(tmp_path):
    (tmp_path / "trace").write_text("a file in the way")
    spans = Spans(tmp_path, 5)
    spans.open(Alone(), 0)
    spans.add("read", 0, 1)
    spans.turn(1, 0.1)
    spans.flush()
    assert not spans.left


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    spans = opened(tmp_path, 5)
    for i in range(3):
        spans.add("read", i, i + 1)
    spans.flush()
    path = tmp_path / "trace/rank-00000.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:7], *lines[3:]]) + "\n")
    with pytest.raises(ValueError, match=r"rank-00000\.jsonl', line 3: .*delete this line"):
        read_traces(tmp_path)
    path.write_text(lines[0] + "\n")
    with pytest.raises(ValueError, match="holds no span yet"):
        read_traces(tmp_path)


def test_one_clock_needs_no_estimate_and_others_are_bounded():
    offset, error = clock_offset(Alone())
    assert error == 0 and abs(time.monotonic_ns() + offset - time.time_ns()) < 1e9
    draw = random.Random(4)
    for _ in range(50):
        truth = draw.randrange(-(10**15), 10**15)
        marks = {"there": [[], []], "here": [[], []]}
        now = 0
        for _ in range(16):
            entered = [now + draw.randrange(10**6) for _ in range(4)]
            left = [max(entered) + draw.randrange(1, 10**5) for _ in range(4)]
            now = max(left)
            for k, name in enumerate(("there", "there", "here", "here")):
                shift = truth if name == "here" else 0
                marks[name][k % 2].append((entered[k] - shift, left[k] - shift))
        low, high = offset_bounds(marks["there"], marks["here"])
        assert low <= truth <= high and high - low < 2 * 10**5


def made(rank, count, pause_after=0, parts=1):
    """A rank's trace of `count` turns of a second; a break of 99 s after one of them, if asked for."""
    spans, now = [], 0
    for step in range(1, count + 1):
        begin = now
        for name, length in (("read", 1), ("forward", 3 + rank), ("backward", 4), ("exchange", 2 - rank)):
            spans.append(Span(name, now, now + length * 10**8, STEP, {}))
            now += length * 10**8
        for bucket in range(parts):
            at = begin + bucket * 10**8
            spans.append(Span(f"bucket {bucket} reduce", at, at + 10**8, EXCHANGE, {}))
        spans.append(Span(f"step {step}", begin, now, "turn", {"step": step, "epoch": step / 9}))
        now += 99 * 10**9 if step == pause_after else 0
    return RankTrace(rank, f"node{rank}", 0, sorted(spans, key=lambda s: (s.begin, -s.end)))


def test_turns_that_are_drawn_follow_one_another():
    assert last_turns(made(0, 9), 3) == [7, 8, 9]
    assert last_turns(made(0, 9, pause_after=8), 3) == [6, 7, 8]
    assert last_turns(made(0, 9, pause_after=6), 3) == [7, 8, 9]
    assert last_turns(made(0, 2), 3) == [1, 2] and last_turns(made(0, 0), 3) == []


def write_attempt(folder, traces):
    """Rank files that read back as these traces."""
    (folder / "trace").mkdir(parents=True)
    (folder / "recipe.toml").write_text("")
    for trace_ in traces:
        header = {"rank": trace_.rank, "host": trace_.host, "ranks": len(traces), "step": 0, "attempt": 7,
                  "offset_ns": 0, "error_ns": 0}
        lines = [header, *(list(span) for span in trace_.spans)]
        (folder / f"trace/rank-{trace_.rank:05d}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def test_the_slowest_rank_is_named_and_the_hidden_share_is_right(tmp_path):
    write_attempt(tmp_path, [made(0, 4, parts=5), made(1, 4, parts=5)])
    found = trace(tmp_path)
    assert found["slowest"] == 1 and found["behind"] == pytest.approx(0.9 / 0.8 - 1)
    first, second = found["ranks"]
    assert first["shares"] == pytest.approx({"read": 0.1, "forward": 0.3, "backward": 0.4, "exchange": 0.2, "other": 0})
    assert first["turn_s"] == pytest.approx(1.0) and first["working_s"] == pytest.approx(0.8)
    assert first["exchange_hidden"] == pytest.approx(1 - 0.2 / 0.5)
    assert second["exchange_hidden"] == pytest.approx(1 - 0.1 / 0.5)
    said = shown(found)
    assert "60 %" in said and "Means over each rank's turns" in said
    works = "The slowest is rank 1 on node1: 900 ms of a turn's 1.00 s outside 'exchange'"
    assert f"{works}, 12 % more than rank 0, which waits for it in 'exchange'." in said


def shown(found):
    console = Console(file=io.StringIO(), width=100)
    show(found, console)
    return console.file.getvalue()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_row_adds_up_though_one_turn_is_long_and_words_fit_the_number_of_ranks(tmp_path, ranks):
    """A pause within one turn of nine: the median turn is then shorter than the mean outside 'exchange'."""
    traces = [made(min(rank, 1), 9) for rank in range(ranks)]
    for rank, trace_ in enumerate(traces):
        paused = next(s for s in trace_.spans if s.name == "step 9")
        longer = [*(s for s in trace_.spans if s is not paused), paused._replace(end=paused.end + 20 * 10**9)]
        traces[rank] = RankTrace(rank, f"node{rank}", 0, sorted(longer, key=lambda s: (s.begin, -s.end)))
    write_attempt(tmp_path, traces)
    found = trace(tmp_path)
    for row in found["ranks"]:
        assert row["turn_s"] == pytest.approx((9 + 20) / 9) and sum(row["shares"].values()) == pytest.approx(1)
        assert row["working_s"] == pytest.approx(row["turn_s"] * (1 - row["shares"]["exchange"]))
    said = shown(found)
    line = next(line for line in said.splitlines() if " 9 " in line and "node0" in line)
    assert sum(int(share) for share in re.findall(r"(\d+) %", line)) == 100, line
    words = ("One rank: ", "than rank 0: the ranks are even", "than the median of the others: the ranks are even")
    assert [some in said for some in words] == [ranks == 1, ranks == 2, ranks == 3], said


def test_percents_add_up():
    assert percents([1 / 3] * 3) == [34, 33, 33] and percents([0.005] * 200) == [1] * 100 + [0] * 100
    assert percents([1.0, 0.0]) == [100, 0] and percents([]) == []


def lightness(colour):
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_parts_of_the_exchange_have_colours_of_their_own_that_differ_in_grey_too(traced):
    (attempt,) = read_traces(traced)
    figure = picture("run", attempt, 3, None)
    handles = {text.get_text(): patch for text, patch in zip(
        figure.legends[0].get_texts(), figure.legends[0].get_patches(), strict=True)}
    parts = [handles[WORDS[kind]].get_facecolor() for kind in ("reduce", "update", "share")]
    phases = [patch for said, patch in handles.items() if said not in WORDS.values()]
    assert not {to_hex(colour) for colour in parts} & {to_hex(patch.get_facecolor()) for patch in phases}
    shades = [lightness(colour) for colour in parts]
    assert shades[0] + 0.1 < shades[1] and shades[1] + 0.1 < shades[2], shades
    plain = [lightness(patch.get_facecolor()) for patch in phases if not patch.get_hatch()]
    assert min(b - a for a, b in pairwise(sorted(plain))) > 0.01, "phases that look alike in grey have a pattern"
    title = figure.legends[0].get_title().get_text()
    assert re.search(r"in \d+ buckets; number 0 holds the model's last layers", title)


@pytest.mark.parametrize("turns", [1, 3, 12])
def test_labels_stay_within_their_bars(traced, turns):
    (attempt,) = read_traces(traced)
    figure = picture("run", attempt, turns, 0)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    bars = [
        path.get_extents(collection.get_transform())
        for collection in axes.collections for path in collection.get_paths()
    ]
    labels = [text for text in axes.texts if isinstance(text, Text) and not isinstance(text, Annotation)]
    assert labels
    for label in labels:
        x, y = axes.transData.transform(label.get_position())
        own = min((bar for bar in bars if bar.contains(x, y)), key=lambda bar: bar.width)
        said = label.get_window_extent()
        assert own.x0 <= said.x0 and said.x1 <= own.x1, label.get_text()
    above = [text.get_window_extent() for text in axes.texts if isinstance(text, Annotation) and text.get_text()]
    steps = sorted(above, key=lambda said: said.x0)
    assert all(one.x1 <= other.x0 for one, other in pairwise(steps)), "steps run into each other"


def test_many_ranks_one_rank_and_no_whole_turn_can_be_drawn(tmp_path):
    kinds = {"many": [made(r % 2, 3) for r in range(40)], "one": [made(0, 1)], "none": [made(0, 1)]}
    kinds["many"] = [RankTrace(i, "node", 0, t.spans) for i, t in enumerate(kinds["many"])]
    kinds["none"] = [RankTrace(0, "node", 0, [s for s in made(0, 1).spans if s.lane != "turn"])]
    for name, traces in kinds.items():
        write_attempt(tmp_path / name, traces)
        found = trace(tmp_path / name, turns=2)
        with Image.open(found["png"]) as picture:
            assert picture.width == 1600 and picture.height < 3000
        assert (found["slowest"] is None) == (name == "none")
        show(found, Console(file=io.StringIO()))
    labels = 2 + 2 * 3  # name and order of the rank and of its three lanes
    assert len(chrome([Attempt(0, {0: kinds["one"][0]})])["traceEvents"]) == labels + len(kinds["one"][0].spans)


def test_a_picture_as_the_place_for_the_timeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match="name of a picture"):
        trace(tmp_path, tmp_path / "x.png")
