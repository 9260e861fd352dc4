"""`trireme report` and `trireme compare` on run folders written here: a resume, torn lines, failures, many ranks."""

from __future__ import annotations

import argparse
import io
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from hpc import compare as comparing
from hpc import report as reporting
from hpc import trace as tracing
from hpc.compare import compare, distinct_names, recipe_differences, same_until, show
from hpc.quantities import counted
from hpc.records import read_attempts, read_records
from hpc.report import report
from hpc.report_picture import picture
from hpc.summary import (
    FAILED,
    FINISHED,
    OPEN,
    PREEMPTED,
    phases_in,
    read_run,
    summarize,
    time_by_rank,
    training_loss,
)

PER_EPOCH, BATCH, START = 4, 100, 1_700_000_000.0


class Log:
    """Writes a run folder the way training does, one record at a time; a second passes a step."""

    def __init__(self, path: Path, ranks: int = 2, recipe: str = 'seed = 1\n[strategy]\nname = "bmuf"\n'):
        path.mkdir(parents=True)
        (path / "recipe.toml").write_text(recipe, encoding="utf-8")
        self.path, self.ranks, self.now = path, ranks, START

    def write(self, event: str, step: int, **values) -> None:
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "time": self.now, "step": step, **values}) + "\n")

    def start(self, step: int = 0, resumed_from: str | None = None, **values) -> Log:
        told = {"ranks": self.ranks, "hosts": [f"node{r}" for r in range(self.ranks)], "splits": 4, "parameters": 1234,
                "train_frames": PER_EPOCH * BATCH, "validation_frames": 50, "batch": BATCH, "device": "cpu",
                "steps_per_epoch": PER_EPOCH, "threads": 1, "precision": "float32", "versions": {"torch": "2.13.0"}}
        self.write("start", step, resumed_from=resumed_from, **{**told, **values})
        return self

    def train(self, step: int, loss: float, seconds: float = 1.0, together: bool = False, **more) -> None:
        """together: forward and backward are recorded as one, as they once were."""
        self.now += seconds
        computing = {"compute": 0.6 * seconds} if together else {"forward": 0.2 * seconds, "backward": 0.4 * seconds}
        by_rank = [
            {"rank": r, "host": f"node{r}", "frames_per_s": BATCH / self.ranks / seconds, "read": 0.1 * seconds,
             **computing, "exchange": 0.1 * seconds, "validate": 0.0, "checkpoint": 0.0, **more}
            for r in range(self.ranks)
        ]
        self.write("train", step, epoch=step / PER_EPOCH, frames=step * BATCH, loss=loss, learning_rate=0.1,
                   frames_per_s=BATCH / seconds, seconds=seconds, by_rank=by_rank)

    def validate(self, step: int, loss: float, best: bool = True, **metrics) -> None:
        self.write("validate", step, epoch=step / PER_EPOCH, frames=step * BATCH, loss=loss, learning_rate=0.1,
                   seconds=0.2, verdict="continue", best=best, **{"frame_error": loss / 4, **metrics})

    def epochs(self, count: int, after: int = 0, shift: float = 0.0) -> Log:
        for step in range(after + 1, count * PER_EPOCH + 1):
            self.train(step, 2.0 / step + shift)
            if step % PER_EPOCH == 0:
                self.validate(step, 2.2 / step + shift)
                self.write("checkpoint", step, name=f"step-{step}", seconds=0.1, bytes=4096)
        return self

    def end(self, step: int, stopped: str = "epochs") -> Path:
        self.write("end", step, frames=step * BATCH, seconds=1.0, best_step=step, best={"loss": 0.1}, sha256="ab" * 32,
                   stopped=stopped)
        if stopped != "preempted":
            (self.path / "success").write_text("{}")
        return self.path


def steps(run: Path, event: str) -> list[int]:
    return [r["step"] for r in read_records(run) if r["event"] == event]


class Links(HTMLParser):
    """Everything in a page that could make a browser load something; and the page's visible text."""

    LOADING = ("src", "srcset", "href", "action", "data", "poster", "background", "style")

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.found += [(name, value) for name, value in attributes if name in self.LOADING or name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def page_of(run: Path) -> Links:
    report(run)
    return Links((run / "report.html").read_text("utf-8"))


# -- records ------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_dropped(tmp_path):
    run = Log(tmp_path / "run").start().epochs(1).path
    whole = read_records(run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "time": 17000')
    assert read_records(run) == whole and len(whole) == 1 + PER_EPOCH + 2


def test_a_torn_line_before_a_resume_is_dropped(tmp_path):
    log = Log(tmp_path / "run").start().epochs(1)
    with open(log.path / "metrics.jsonl", "a") as file:
        file.write('{"event": "tra\n')
    log.start(4, "step-4").epochs(2, after=4)
    assert steps(log.path, "train") == list(range(1, 9))


@pytest.mark.parametrize("bad", [b'{"event": "tr', b"[1, 2]", b'{"event": "train", "step": 3}', b"\xff\x80"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, bad):
    run = Log(tmp_path / "run").start().epochs(1).path
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
    lines[2] = bad
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=r"metrics\.jsonl', line 3: .*delete this line"):
        read_records(run)


def test_a_resume_supersedes_what_it_does_again(tmp_path):
    log = Log(tmp_path / "run").start().epochs(2)
    log.train(9, 99.0)  # beyond the checkpoint: lost in the crash
    log.start(4, "step-4").epochs(3, after=4, shift=1.0)
    assert steps(log.path, "train") == list(range(1, 13))
    assert steps(log.path, "validate") == steps(log.path, "checkpoint") == [4, 8, 12]
    losses = [r["loss"] for r in read_records(log.path) if r["event"] == "validate"]
    assert losses == [2.2 / 4, 2.2 / 8 + 1, 2.2 / 12 + 1]
    assert [len(attempt) for attempt in read_attempts(log.path)] == [1 + 8 + 4 + 1, 1 + 8 + 4]


def test_a_fresh_start_supersedes_everything(tmp_path):
    log = Log(tmp_path / "run").start()
    log.validate(0, 5.0)
    log.start()
    log.validate(0, 6.0)
    assert [r["loss"] for r in read_records(log.path) if r["event"] == "validate"] == [6.0]


@pytest.mark.parametrize("name", ["", "nothing"])
def test_what_is_no_run_folder_is_told(tmp_path, name):
    with pytest.raises(ValueError, match=r"is not a run folder: .*recipe\.toml, metrics\.jsonl"):
        read_records(tmp_path / name)


# -- summary ------------------------------------------------------------------------------------------------------


def test_status_follows_the_last_attempt(tmp_path):
    log = Log(tmp_path / "run").start().epochs(1)
    assert read_run(log.path).status == OPEN
    log.end(4, "preempted")
    assert read_run(log.path).status == PREEMPTED
    log.now += 60
    log.start(4, "step-4")
    assert read_run(log.path).status == OPEN
    (log.path / "failure.json").write_text(json.dumps({"cause": "out of memory", "time": log.now + 5}))
    assert read_run(log.path).status == FAILED
    log.now += 60
    log.start(4, "step-4").epochs(2, after=4)  # an older failure no longer counts
    assert read_run(log.path).status == OPEN
    log.end(8)
    assert read_run(log.path).status == FINISHED


def test_wall_clock_counts_lost_work_but_not_the_gap(tmp_path):
    log = Log(tmp_path / "run").start().epochs(2)  # 8 s, of which 4 s are done again
    log.now += 3600
    log.start(4, "step-4").epochs(2, after=4)  # 4 s
    assert read_run(log.path).seconds == pytest.approx(12.0)


def test_time_by_rank_adds_up_to_the_intervals(tmp_path):
    log = Log(tmp_path / "run", ranks=3).start()
    log.train(1, 1.0, seconds=2.0)
    log.train(2, 1.0, seconds=3.0)
    spent = time_by_rank(read_run(log.path).of("train"))
    assert list(spent) == [(0, "node0"), (1, "node1"), (2, "node2")]
    expected = {"compute": 0, "read": 0.5, "forward": 1.0, "backward": 2.0, "exchange": 0.5, "validate": 0,
                "checkpoint": 0, "judge": 0, "select": 0, "other": 1.0}
    assert spent[1, "node1"] == pytest.approx(expected)
    assert phases_in(spent) == ("forward", "backward", "exchange", "read", "validate", "checkpoint", "other")


def test_runs_recorded_before_forward_and_backward_were_told_apart_are_shown(tmp_path):
    log = Log(tmp_path / "run").start()
    log.train(1, 1.0, together=True)
    before = time_by_rank(read_run(log.path).of("train"))
    assert phases_in(before) == ("compute", "exchange", "read", "validate", "checkpoint", "other")
    text = page_of(log.path).text
    assert "compute" in text and "60.0%" in text and "backward" not in text
    log.train(2, 1.0)  # resumed later
    after = time_by_rank(read_run(log.path).of("train"))
    assert phases_in(after)[:3] == ("compute", "forward", "backward")
    assert after[0, "node0"]["compute"] == pytest.approx(0.6) and after[0, "node0"]["other"] == pytest.approx(0.4)
    assert "backward" in page_of(log.path).text


def test_the_hidden_share_counts_only_what_recorded_an_exchange(tmp_path):
    log = Log(tmp_path / "run").start()
    log.train(1, 1.0)
    assert summarize(read_run(log.path))["exchange_hidden"] is None
    assert "hidden" not in page_of(log.path).text
    log.train(2, 1.0, exchange_active=0.4)
    log.train(3, 1.0, exchange_active=0.0)
    assert summarize(read_run(log.path))["exchange_hidden"] == pytest.approx(0.75)
    assert "75 %" in page_of(log.path).text
    log.train(4, 1.0, exchange_active=0.0001)
    log.train(5, 9.0, exchange_active=0.0001, exchange=9.0)
    assert summarize(read_run(log.path))["exchange_hidden"] == 0.0, "never below nothing"


def test_training_loss_is_weighted_by_frames():
    trains = [{"step": 1, "frames": 100, "loss": 4.0}, {"step": 4, "frames": 400, "loss": 2.0},
              {"step": 5, "frames": 500, "loss": 9.0}]
    assert training_loss(trains, -1, 4) == pytest.approx((4.0 * 100 + 2.0 * 300) / 400)
    assert training_loss(trains, 4, 8) == 9.0
    assert math.isnan(training_loss(trains, 5, 8))


# -- report -------------------------------------------------------------------------------------------------------


def build(kind: str, path: Path) -> Path:
    if kind == "empty":
        Log(path)
        (path / "metrics.jsonl").write_text('{"event": "sta')
        return path
    log = Log(path, ranks={"one rank": 1, "many ranks": 40}.get(kind, 3)).start()
    if kind == "started":
        return path
    if kind == "not finite":
        log.train(1, math.nan)
        log.train(2, math.inf)
        log.validate(2, math.nan, best=False, frame_error=None)
        return path
    if kind == "resumed":
        log.epochs(2)
        log.ranks = 1
        return log.start(4, "step-4").epochs(30, after=4).end(120)
    return log.epochs(3).end(12)


KINDS = ["empty", "started", "one rank", "several ranks", "many ranks", "resumed", "not finite"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_run_gives_a_picture_and_a_self_contained_page(tmp_path, kind):
    run = build(kind, tmp_path / "run")
    page = page_of(run)
    with Image.open(run / "report.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width == 1600 and 800 < picture.height < 2000
        assert len(picture.convert("L").getcolors()) > 20  # something is drawn
    text = (run / "report.html").read_text("utf-8")
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert [name for name, _ in page.found] == ["srcset", "src"]
    assert all(value.startswith("data:image/png;base64,") for _, value in page.found)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert sorted(p.name for p in run.iterdir() if p.name.startswith(".")) == []  # no temporary file left


def test_the_page_holds_the_numbers(tmp_path):
    log = Log(tmp_path / "run").start()
    log.train(4, 1.25)
    log.validate(4, 0.75, frame_error=0.3125, perplexity=17.5)
    log.train(8, 1.0)
    log.validate(8, 0.875, best=False, frame_error=0.375, perplexity=18.5)
    log.write("checkpoint", 8, name="step-8", seconds=0.25, bytes=12_000_000)
    (log.path / "checkpoints" / "step-8").mkdir(parents=True)
    text = page_of(log.end(8, "early stop")).text
    for expected in ("finished", "early stop", "0.7500", "31.25%", "17.5", "1.2500", "continue ★ best", "12.0 MB",
                     "40.0%", "node0, node1", "2.13.0", 'name = "bmuf"', "ab" * 32):
        assert expected in text, expected
    assert text.count("★") == 1


def test_a_failure_is_shown_with_its_cause_and_everything_is_escaped(tmp_path):
    evil = "<script>alert('1')</script>&\"<img src=x>"
    log = Log(tmp_path / "<b>run", recipe=f"note = '''{evil}'''\n")
    log.start(versions={evil: evil}, hosts=[evil], device=evil).epochs(1)
    log.write("checkpoint", 4, name=evil, seconds=0.1, bytes=1)
    log.validate(4, 0.5, **{evil: 1.0}, best=True)
    failure = {"cause": f"loss is NaN {evil}", "rank": 1, "host": "node1", "step": 4, "trace": [evil]}
    (log.path / "failure.json").write_text(json.dumps(failure))
    page = page_of(log.path)
    assert "failed" in page.text and f"loss is NaN {evil} (rank 1, host node1, step 4)" in page.text
    assert f"note = '''{evil}'''" in page.text
    assert not page.tags & {"script", "b>run"} and "img" in page.tags
    assert [name for name, _ in page.found] == ["srcset", "src"]  # no tag came out of the texts


def test_the_cause_is_found_where_training_leaves_it(tmp_path):
    from hpc.run import RunFolder

    log = Log(tmp_path / "run").start()
    folder = RunFolder(log.path)
    folder.opened = True
    folder.fail(1, "node1", 3, "while in phase 'read'", ValueError("shard is torn"))
    text = page_of(log.path).text
    assert "ValueError: shard is torn (rank 1, host node1, step 3, while in phase 'read')" in text


@pytest.mark.parametrize("text", ['{"cause": "torn', "", '"just words"'])
def test_a_damaged_failure_file_still_gives_a_page(tmp_path, text):
    log = Log(tmp_path / "run").start()
    (log.path / "failure.json").write_text(text)
    assert "failed" in page_of(log.path).text


@pytest.mark.parametrize(("name", "values", "ends"), [
    ("frame_error", [0.9, 0.05, 0.0005], (0.0, 1.0)),
    ("frame_error", [0.0, 0.0], (0.0, 1.0)),
    ("accuracy", [0.1, 0.9, 0.9995], (0.0, 1.0)),
    ("word_error", [1.7, 0.4, 0.001], (0.0, 2.0)),
])
def test_a_share_is_drawn_between_nothing_and_all(tmp_path, name, values, ends):
    log = Log(tmp_path / "run").start()
    for step, value in enumerate(values, 1):
        log.write("validate", step, epoch=step / PER_EPOCH, frames=step * BATCH, loss=1 / step, learning_rate=0.1,
                  seconds=0.2, verdict="continue", best=True, **{name: value})
    title = f"Validation {name.replace('_', ' ')}"
    axes = next(a for a in picture(read_run(log.path)).axes if a.get_title("left") == title)
    low, high = axes.get_ylim()
    assert ends[0] <= low <= min(values) and max(values) <= high <= ends[1] and low < high


def test_one_rank_and_one_split_are_said_in_the_singular(tmp_path):
    assert "2 splits" in page_of(Log(tmp_path / "two").start(splits=2).path).text
    text = page_of(Log(tmp_path / "one", ranks=1).start(splits=1).path).text
    assert "1 split" in text and "1 splits" not in text and "rank1" in text, "a card's title and number"
    assert [counted(n, "rank") for n in (0, 1, 2, 1293)] == ["0 ranks", "1 rank", "2 ranks", "1,293 ranks"]


# -- compare ------------------------------------------------------------------------------------------------------


def test_the_first_difference_between_curves_is_found(tmp_path):
    log = Log(tmp_path / "a").start().epochs(3)
    a, b = read_run(log.path), read_run(Log(tmp_path / "b").start().epochs(3).path)
    assert same_until(a, b) == {"equal": 3, "until": 12, "differs_at": None, "why": None, "metrics": []}
    other = Log(tmp_path / "c").start().epochs(1)
    other.validate(8, 2.2 / 8, frame_error=2.2 / 32 + 1e-16)  # the last bit counts
    c = read_run(other.path)
    assert same_until(a, c) == {"equal": 1, "until": 4, "differs_at": 8, "why": "metrics", "metrics": ["frame_error"]}
    short = read_run(Log(tmp_path / "d").start().epochs(2).path)
    for pair in ((a, short), (short, a)):
        assert same_until(*pair) == {"equal": 2, "until": 8, "differs_at": 12, "why": "length", "metrics": []}
    odd = Log(tmp_path / "e").start()
    odd.validate(3, 2.2 / 4)
    assert same_until(a, read_run(odd.path))["why"] == "step"


def test_recipe_differences_are_by_dotted_key():
    one = {"run": "a", "seed": 1, "strategy": {"name": "bmuf", "block_steps": 64}}
    two = {"run": "b", "seed": 1, "strategy": {"name": "allreduce"}}
    names = ["bmuf", "allreduce", "bmuf"]
    assert recipe_differences([one, two, one]) == {"strategy.name": names, "strategy.block_steps": [64, None, 64]}
    assert recipe_differences([one, {**one, "run": "c"}]) == {}


def test_names_are_the_shortest_that_differ():
    assert distinct_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert distinct_names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert distinct_names([Path("/x/a"), Path("/x/a"), Path("/x/b")]) == ["a #1", "a #2", "b"]


def test_compare_tells_identical_from_different(tmp_path):
    runs = [Log(tmp_path / name, ranks=ranks, recipe=f"seed = {seed}\n").start().epochs(2, shift=shift).end(8)
            for name, ranks, seed, shift in (("one", 1, 1, 0.0), ("two", 2, 1, 0.0), ("other", 2, 7, 0.5))]
    for run, content in zip(runs, (b"same", b"same", b"else"), strict=True):
        (run / "model.safetensors").write_bytes(content)
    answer = compare(runs, tmp_path)
    assert answer["models_identical"] is False and compare(runs[:2], tmp_path)["models_identical"] is True
    assert answer["recipe"] == {"seed": [1, 1, 7]}
    assert [row["curve"]["differs_at"] for row in answer["runs"]] == [None, None, 4]
    with Image.open(tmp_path / "compare.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width == 1600
    console = Console(file=io.StringIO(), width=140)
    show(answer, console)
    said = console.file.getvalue()
    assert "two: validation curve identical to one's (2 validations); models byte-identical" in said
    assert "other: validation curve differs from one's from the beginning: first difference at step 4" in said
    assert "models differ" in said and "seed" in said


def test_compare_takes_unfinished_runs_and_refuses_one_alone(tmp_path):
    bare = Log(tmp_path / "bare").start().path
    full = Log(tmp_path / "full").start().epochs(1).path
    answer = compare([bare, full], tmp_path / "picture.png")
    assert answer["models_identical"] is None and (tmp_path / "picture.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="got 1 run, expected two or more"):
        compare([full], tmp_path)
    (full / "recipe.toml").write_text("seed = = 1")
    with pytest.raises(ValueError, match=r"recipe\.toml' is not TOML"):
        compare([bare, full], tmp_path)


# -- the commands -------------------------------------------------------------------------------------------------


def command(module, *words: str) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args(words))


def test_the_commands_print_paths_or_one_json_line(tmp_path, capsys):
    runs = [str(Log(tmp_path / name).start().epochs(1).path) for name in ("a", "b")]
    assert command(reporting, runs[0]) == 0
    said = capsys.readouterr().out
    assert f"{runs[0]}/report.png" in said and f"{runs[0]}/report.html" in said and OPEN in said
    assert command(comparing, *runs, "--out", str(tmp_path / "x.png")) == 0
    assert f"wrote {tmp_path / 'x.png'}" in capsys.readouterr().out
    for words in ((reporting, runs[0]), (comparing, *runs, "--out", str(tmp_path))):
        assert command(*words, "--json") == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1 and json.loads(lines[0])


def test_json_holds_no_nan(tmp_path, capsys):
    run = build("not finite", tmp_path / "run")
    command(reporting, str(run), "--json")
    said = capsys.readouterr().out
    assert json.loads(said)["last"]["loss"] is None and "NaN" not in said and "Infinity" not in said


@pytest.mark.parametrize("module", [reporting, comparing, tracing])
def test_help_has_examples(module, capsys):
    with pytest.raises(SystemExit):
        command(module, "--help")
    assert f"trireme {module.__name__.removeprefix('hpc.')} runs/" in capsys.readouterr().out


def test_the_modules_load_without_mpi_and_before_matplotlib():
    heavy = ("mpi4py", "torch", "matplotlib")
    code = f"import sys, hpc.report, hpc.compare, hpc.trace; print([name for name in {heavy} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
