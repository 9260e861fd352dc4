"""A run as one self-contained HTML page: no script, nothing loaded from anywhere, the picture inside it.

Everything that comes from the run's files is escaped here, in `_text`.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from hpc.quantities import amount, counted, duration, hidden_share, metric, moment, percent, said_of_bytes, spoken
from hpc.records import metrics_of, number
from hpc.summary import (
    FAILED,
    FINISHED,
    RunHistory,
    cause_of,
    error_name,
    exchange_hidden,
    phases_in,
    summarize,
    time_by_rank,
    training_loss,
)

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f24; --muted: #656d76; --line: #dfe3e8;
  --good: #00654a; --good-page: #d9f2e9; --bad: #a03a00; --bad-page: #fdebe0; --calm: #00548a; --calm-page: #e1eff8; }
@media (prefers-color-scheme: dark) { :root { --page: #0e1116; --card: #161a20; --ink: #e8eaed; --muted: #9aa4af;
  --line: #2b323b; --good: #6fdcb9; --good-page: #0d3529; --bad: #ffab7d; --bad-page: #42210d; --calm: #8fcdf5;
  --calm-page: #0e304a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 14px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 36px 0 10px; }
p { margin: 6px 0; } .muted { color: var(--muted); } .lead { flex-basis: 100%; margin: 0; color: var(--muted); }
.badge { font-size: .85rem; font-weight: 600; padding: 2px 12px; border-radius: 99px; }
.good { color: var(--good); background: var(--good-page); } .bad { color: var(--bad); background: var(--bad-page); }
.calm { color: var(--calm); background: var(--calm-page); }
.failure { margin: 18px 0 0; padding: 12px 16px; border-radius: 10px; color: var(--bad); background: var(--bad-page);
  overflow-wrap: anywhere; }
.failure dl { color: var(--ink); }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 10px; margin: 22px 0; }
.number { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.number b { display: block; font-size: 1.4rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.number span { color: var(--muted); font-size: .85rem; display: block; overflow-wrap: anywhere; }
.box { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: auto; }
.box.tall { max-height: 560px; }
.picture img { display: block; width: 100%; min-width: 820px; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 14px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--card); color: var(--muted); font-weight: 600; font-size: .85rem; }
.text { text-align: left; } tr:last-child td { border-bottom: 0; }
tr.best td { font-weight: 700; background: var(--good-page); }
pre { margin: 0; padding: 14px 16px; font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 8px 0 0; font-size: .92rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
dd.lines { font: .82rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.box dl { padding: 6px 16px 14px; }
footer { margin-top: 40px; color: var(--muted); font-size: .85rem; }
@media (max-width: 640px) { main { padding: 20px 14px 48px; } .numbers { grid-template-columns: 1fr 1fr; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 8px; } }
@media print { .box.tall { max-height: none; } }
"""


def page(run: RunHistory, light: bytes, dark: bytes) -> str:
    """The page of a run.

    run          the run
    light, dark  its picture as PNG files, for readers with a light and a dark screen
    """
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # Browsers then hold the page to its word: nothing runs, nothing is fetched.
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
            f"<title>{_text(run.name)} · {_text(run.status)} · Trireme</title>",
            f"<style>{STYLE}</style></head><body><main>",
            _header(run),
            _failure(run),
            _numbers(run),
            _picture(run, light, dark),
            _section("Validations", _validations(run)),
            _section("Time spent", _time_spent(run)),
            _section("Recipe", f'<div class="box"><pre>{_text(run.recipe)}</pre></div>' if run.recipe else
                     '<p class="muted">This folder holds no recipe.toml.</p>'),
            _section("Attempts", _attempts(run)),
            _section("Checkpoints", _checkpoints(run)),
            _section("Ran on", _ran_on(run)),
            f"<footer>Written by trireme report, {moment(datetime.now(UTC).timestamp())}.</footer>",
            "</main></body></html>\n",
        ]
    )


def _text(value: Any) -> str:
    """Any value as text that is safe in a page."""
    if isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False)
    return html.escape(str(value), quote=True)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>\n{body}</section>" if body else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], texts: Sequence[int] = (0,), best: int = -1) -> str:
    """A table; the columns in `texts` are set left, row `best` stands out."""

    def cells(tag: str, values: Sequence[Any]) -> str:
        left = [' class="text"' if column in texts else "" for column in range(len(values))]
        return "".join(f"<{tag}{kind}>{_text(value)}</{tag}>" for kind, value in zip(left, values, strict=True))

    body = "\n".join(
        f'<tr{" class=best" if index == best else ""}>{cells("td", row)}</tr>' for index, row in enumerate(rows)
    )
    top = f"<thead><tr>{cells('th', head)}</tr></thead>"
    return f'<div class="box tall"><table>{top}\n<tbody>{body}</tbody></table></div>'


def _pairs(pairs: Sequence[tuple[str, Any]]) -> str:
    texts = [(_text(name), _text(value)) for name, value in pairs]
    kinds = [' class="lines"' if "\n" in value.strip() else "" for _, value in texts]
    rows = [f"<dt>{name}</dt><dd{kind}>{value}</dd>" for (name, value), kind in zip(texts, kinds, strict=True)]
    return f"<dl>{''.join(rows)}</dl>"


def _header(run: RunHistory) -> str:
    kind = {FINISHED: "good", FAILED: "bad"}.get(run.status, "calm")
    start, said = run.start, []
    if run.records:
        said.append(f"started {moment(run.records[0]['time'])}")
        said.append(f"last record {moment(run.records[-1]['time'])}")
    else:
        said.append("nothing logged yet")
    if run.end and run.status == FINISHED and run.end.get("stopped"):
        said.append(f"stopped by: {run.end['stopped']}")
    said += [str(start[key]) for key in ("device", "precision") if start.get(key)]
    return (
        f'<header><h1>{_text(run.name)}</h1><span class="badge {kind}">{_text(run.status)}</span>'
        f'<p class="lead">{_text(" · ".join(said))}</p></header>'
    )


def _failure(run: RunHistory) -> str:
    if run.status != FAILED or not run.failure:
        return ""
    line, where = cause_of(run.failure), ("rank", "host", "step", "where")
    details: list[tuple[str, Any]] = []
    for name, value in run.failure.items():
        if name == "time" and math.isfinite(number(value)):
            details.append(("when", moment(value)))
        elif value is not None and not line.startswith(str(value).strip()) and name not in where:
            details.append((spoken(str(name)), value))
    return f'<div class="failure" role="alert"><strong>{_text(line)}</strong>{_pairs(details)}</div>'


def _numbers(run: RunHistory) -> str:
    summary, start = summarize(run), run.start
    best, name = summary["best"] or {}, error_name(run.of("validate"))
    when = f"at epoch {number(best.get('epoch')):.4g}, step {best['step']:,}" if best else "no validation yet"
    cards = [("best validation loss", metric("loss", best.get("loss")), when)]
    if name:
        last = metric(name, (summary["last"] or {}).get(name))
        cards.append((f"{spoken(name)} there", metric(name, best.get(name)), f"last: {last}"))
    hosts, resumes = summary["hosts"], summary["resumes"]
    some_hosts = ", ".join(hosts[:3]) + (" …" if len(hosts) > 3 else "")
    cards += [
        ("epochs", f"{summary['epochs']:.4g}", counted(summary["steps"], "step")),
        (f"{run.noun} seen", amount(summary["frames"]), f"{amount(start.get('train_frames'))} an epoch"),
        ("wall clock", duration(summary["seconds"]), f"resumed {resumes} time{'s' * (resumes != 1)}" if resumes else
         "in one go"),
        (f"{run.noun}/s in training", amount(summary["frames_per_s"]), "all ranks together"),
        ("rank" if summary["ranks"] == 1 else "ranks", amount(summary["ranks"]),
         counted(start["splits"], "split") if start.get("splits") else "– splits"),
        ("host" if len(hosts) == 1 else "hosts", str(len(hosts)), some_hosts),
    ]
    if summary["exchange_hidden"] is not None:
        cards.append(("exchange hidden", percent(summary["exchange_hidden"]), "behind forward and backward"))
    if summary["sent"]["bytes"]:
        said = said_of_bytes(summary["sent"]).partition(", ")[2] or "gradients or changes, and weights or updates"
        cards.append(("bytes between ranks", amount(summary["sent"]["bytes"]), said))
    return '<div class="numbers">' + "".join(
        f'<div class="number"><span>{_text(title)}</span><b>{_text(value)}</b><span>{_text(note)}</span></div>'
        for title, value, note in cards
    ) + "</div>"


def _picture(run: RunHistory, light: bytes, dark: bytes) -> str:
    sources = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in (light, dark)]
    said = f"Learning curves, learning rate, throughput and time spent of run {run.name}"
    return (
        f'<div class="box picture"><picture><source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">'
        f'<img src="{sources[0]}" alt="{_text(said)}"></picture></div>'
    )


def _validations(run: RunHistory) -> str:
    validations, trains = run.of("validate"), run.of("train")
    if not validations:
        return '<p class="muted">No validation yet.</p>'
    names = list(dict.fromkeys(name for v in validations for name in metrics_of(v)))
    rows, before = [], -1
    judged = ["slaves rejected"] if any("slaves" in v.get("told", {}) for v in validations) else []
    for v in validations:
        rows.append([
            f"{v['step']:,}", f"{number(v.get('epoch')):.4g}", amount(v.get("frames")),
            metric("loss", training_loss(trains, before, v["step"])), *(metric(name, v.get(name)) for name in names),
            f"{number(v.get('learning_rate')):.4g}", *(_rejected(v) for _ in judged),
            str(v.get("verdict", "")) + (" ★ best" if v is run.best else ""),
        ])
        before = v["step"]
    head = ["step", "epoch", run.noun, "training loss", *(spoken(name) for name in names), "learning rate", *judged,
            "verdict"]
    best = next((i for i, v in enumerate(validations) if v is run.best), -1)
    return _table(head, rows, texts=(len(head) - 1,), best=best)


def _rejected(validation: dict[str, Any]) -> str:
    """How many slaves, and which."""
    told = validation.get("told", {})
    which: dict[str, int] = told.get("rejected", {})
    said = f"{sum(which.values())} of {told.get('slaves', 0)}"
    return said + (f" (split {', '.join(which)})" if which else "")


def _time_spent(run: RunHistory) -> str:
    by_rank, exchanges = time_by_rank([*run.of("train"), *run.of("rest")]), exchange_hidden(run.of("train"))
    shown, rows = phases_in(by_rank), []
    for (rank, host), spent in by_rank.items():
        total = sum(spent.values())
        shares = [f"{duration(spent[p])} ({spent[p] / total:.1%})" if total else "–" for p in shown]
        hidden = [percent(hidden_share(*exchanges.get(rank, (0.0, 0.0))))] if exchanges else []
        rows.append([rank, host, *shares, duration(total), *hidden])
    if not rows:
        return '<p class="muted">No training interval logged yet.</p>'
    note = '<p class="muted">A rank that waits for a slower one spends that time in exchange.</p>'
    head = ["rank", "host", *shown, "total", *(["exchange hidden"] if exchanges else [])]
    return _table(head, rows, texts=(1,)) + note


def _attempts(run: RunHistory) -> str:
    rows = [
        [moment(s["time"]), f"{s['step']:,}", s.get("resumed_from") or "a fresh start", s.get("ranks", "–"),
         ", ".join(sorted(set(s.get("hosts", ()))))]
        for s in run.of("start")
    ]
    return _table(["started", "at step", "from", "ranks", "hosts"], rows, texts=(0, 2, 4)) if len(rows) > 1 else ""


def _checkpoints(run: RunHistory) -> str:
    kept = {entry.name for entry in (run.path / "checkpoints").glob("*")}
    rows = [
        [c.get("name", "–"), f"{c['step']:,}", f"{number(c.get('bytes')) / 1e6:,.1f} MB",
         duration(number(c.get("seconds"))), "yes" if c.get("name") in kept else "no"]
        for c in run.of("checkpoint")
    ]
    if not rows:
        return '<p class="muted">No checkpoint yet.</p>'
    return _table(["name", "step", "size", "time to write", "still there"], rows)


def _ran_on(run: RunHistory) -> str:
    start = run.start
    pairs: list[tuple[str, Any]] = [
        (spoken(key).replace("frames", run.noun), f"{start[key]:,}" if isinstance(start[key], int) else start[key])
        for key in ("parameters", "train_frames", "validation_frames", "batch", "steps_per_epoch", "threads", "device",
                    "precision")
        if start.get(key) is not None
    ]
    pairs.append(("hosts", ", ".join(sorted(set(start.get("hosts", ())))) or "–"))
    pairs += [(str(name), value) for name, value in dict(start.get("versions") or {}).items()]
    if run.end and run.end.get("sha256"):
        pairs.append(("SHA-256 of the model", run.end["sha256"]))
    return f'<div class="box">{_pairs(pairs)}</div>'
