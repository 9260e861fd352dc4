"""What a plan says: one screen of tables, and sentences of verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hpc.planning.model import Optimum, Step
from hpc.planning.outlook import WAYS, Outlook
from hpc.quantities import amount, counted, percent

WORTH = 1.05  # times as fast: what is less says nothing
USEFUL = 0.5  # efficiency
WIDTH = 110  # of a screen that is none


def span(seconds: float) -> str:
    """Seconds, short: "3.2 s", "18.2 ms", "115 us"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError


def in_bytes(count: float) -> str:
    """Bytes, short: "184 MB", "57.7 kB", "96 B"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


# -- the verdict ------------------------------------------------------------------------------------------------------


def verdict(outlook: Outlook, nodes: Sequence[int]) -> list[str]:
    """Whether 1-bit pays, whether double buffering does, what bounds the step, how far it goes: a sentence each."""
    several = [k for k in nodes if k > 1]
    if not several:
        return ["One node exchanges nothing: ask for several (--nodes)."]
    best = {k: max(outlook.efficiency(k, way) for way in outlook.steps(k)) for k in several}
    useful = [k for k in several if best[k] >= USEFUL]
    at = max(useful) if useful else min(several)
    steps = outlook.steps(at)
    return [
        packing({k: outlook.steps(k) for k in several}, at), *([buffering(steps, at)] if "halves" in steps else []),
        bound(steps, at), reach(at, best[at], max(several)), *rivals(outlook, several, at),
    ]


def quickest(steps: dict[str, Step], ways: Sequence[str] = ("onebit", "halves")) -> str:
    """Of some ways, the quickest."""
    return min((way for way in ways if way in steps), key=lambda way: steps[way].seconds)


def packing(steps: dict[int, dict[str, Step]], at: int) -> str:
    """Whether 1-bit pays, by number of nodes; `at`: the one that counts most."""
    gains = {k: found["float32"].seconds / found[quickest(found)].seconds for k, found in steps.items()}
    pays = [k for k, gain in gains.items() if gain >= WORTH]
    if pays:
        k = at if at in pays else max(pays)
        plain, packed = steps[k]["float32"], steps[k][quickest(steps[k])]
        where = f"from {pays[0]} nodes on" if pays[-1] == max(steps) else f"on up to {pays[-1]} nodes"
        took = f"{span(packed.seconds)} instead of {span(plain.seconds)}"
        return f"Beside float32, 1-bit pays {where}: on {k} a minibatch takes {took}, {gains[k]:.1f} times as fast."
    plain, packed = steps[at]["float32"], steps[at][quickest(steps[at])]
    if plain.visible <= (1 - 1 / WORTH) * plain.seconds:
        left = f"but for {span(plain.visible)} of {span(plain.link)}"
        return f"Beside float32, whose exchange on {at} nodes is hidden behind backward, {left}, 1-bit does not pay."
    extra, saved = packed.work - plain.work + packed.compute - plain.compute, plain.visible - packed.visible
    return (
        f"Beside float32, 1-bit does not pay: on {at} nodes quantizing, adding up and unpacking take "
        f"{span(max(extra, 0.0))} more, and smaller messages save {span(max(saved, 0.0))}."
    )


def buffering(steps: dict[str, Step], at: int) -> str:
    """Whether double buffering pays."""
    whole, halves = steps["onebit"], steps["halves"]
    hidden, more = whole.visible - halves.visible, halves.work - whole.work + halves.compute - whole.compute
    if whole.seconds >= WORTH * halves.seconds:
        times = f"{whole.seconds / halves.seconds:.1f} times as fast as without"
        return f"Double buffering pays: on {at} nodes it hides {span(hidden)} of exchange, {times}."
    if halves.seconds >= WORTH * whole.seconds and hidden > 0:
        return (
            f"Double buffering does not pay: on {at} nodes it hides {span(hidden)} of {span(whole.visible)} of "
            f"exchange, and a second turn, of smaller sub-batches and fixed costs, takes {span(more)} more."
        )
    if halves.seconds >= WORTH * whole.seconds:
        turns = f", and a second turn's fixed costs are {span(more)}" if more > 0 else ""
        return (
            f"Double buffering does not pay: on {at} nodes it exchanges twice as much, of which {span(halves.visible)} "
            f"are not hidden instead of {span(whole.visible)}{turns}."
        )
    both = f"{span(halves.seconds)} with it, {span(whole.seconds)} without"
    return f"Double buffering makes little difference: on {at} nodes {both}."


def bound(steps: dict[str, Step], at: int) -> str:
    """What most of the quickest way's step goes into."""
    way = quickest(steps, tuple(WAYS))
    step = steps[way]
    parts = {
        "by computing": step.compute, "by passes through memory (quantizing, adding up, updating)": step.work,
        "by the link": step.visible,
    }
    most = max(parts, key=lambda name: parts[name])
    share = percent(parts[most] / step.seconds)
    return f"The quickest there, {WAYS[way]}, is bound {most}: {share} of {span(step.seconds)}."


def reach(at: int, efficiency: float, most: int) -> str:
    """How many nodes are of use; `at`: the one that counts most, of the best efficiency there."""
    if efficiency < USEFUL:
        times = efficiency * at
        pays = "do not pay" if times <= 1 else "are more than half idle or busy with the exchange"
        return f"Several nodes {pays}: {at} are {times:.2f} times as fast as one ({percent(efficiency)} of use)."
    further = "; more were not asked for" if at == most else ""
    return f"Up to {counted(at, 'node')} at least half of their time is of use ({percent(efficiency)} there){further}."


def rivals(outlook: Outlook, nodes: Sequence[int], at: int) -> list[str]:
    """Where PowerSGD would be faster than the quickest way, and by how much; `at`: the nodes that count most."""
    if not outlook.costs.low_rank:
        return []
    times = {k: _times(outlook, k) for k in nodes}
    found = [f"of rank {r} {gain:.2f} ({in_bytes(outlook.powersgd_bytes(at, r))})" for r, gain in times[at].items()]
    best = {k: max(gains.values()) for k, gains in times.items()}
    places = {
        "faster": [k for k in nodes if best[k] >= WORTH], "slower": [k for k in nodes if best[k] * WORTH <= 1],
        "as fast": [k for k in nodes if 1 / WORTH < best[k] < WORTH],
    }
    where = "; ".join(f"{how} on {', '.join(map(str, held))}" for how, held in places.items() if held)
    return [
        f"PowerSGD by torch's DDP, which learns otherwise (docs/1bit.md), would be so many times as fast as the "
        f"quickest of these on {at} nodes: {', '.join(found)}. It would be {where} nodes."
    ]


def _times(outlook: Outlook, nodes: int) -> dict[int, float]:
    """How many times as fast PowerSGD is as the quickest way, by its rank."""
    steps = outlook.steps(nodes)
    ours = steps[quickest(steps, tuple(WAYS))].seconds
    return {rank: ours / step.seconds for rank, step in outlook.powersgd(nodes).items()}


# -- the screen -------------------------------------------------------------------------------------------------------


def equation(found: Optimum) -> str:
    """Equation (4) with its terms."""
    above, below = f"{found.batch / 2:,.0f} x {span(found.frame_s)} + {span(found.post_s)}", found.update_s
    terms = f"({above}) / ({span(found.comm_s)} - {span(below)})"
    if found.nodes is None:
        return f"{terms}: not positive, the fixed cost is the limit: {span(2 * below)} a minibatch (section 2.3)"
    if found.nodes > found.batch / 2:
        return f"{terms}: more than a half minibatch has frames"
    return f"{terms} = {found.nodes:.1f}"


def show(outlook: Outlook, nodes: Sequence[int], about: dict[str, Any], title: str, notes: Sequence[str]) -> None:
    """Print the screen.

    about  what was measured (`planning/measure.py`)
    notes  lines of small print above the tables
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    console.print(title, style="bold")
    for note in notes:
        console.print(note)
    console.print(_computing(outlook, about["noun"]))
    console.print(_exchanging(outlook, max(nodes)))
    console.print("Equation (4), double buffered: K = (N/2 T_frm + C T_post) / (T_comm - T_upd)")
    for way in ("float32", "onebit"):
        console.print(f"  {WAYS[way]:8} {equation(outlook.optimum(way, max(nodes)))}")
    console.print(f"  (beyond {counted(max(nodes), 'node')} with T_frm and T_comm as they are there)")
    console.print(_scaling(outlook, nodes, about["noun"]))
    below = [f"{WAYS[way]} {_from(outlook.below_half(way))}" for way in WAYS]
    console.print(f"Less than half of use: {', '.join(below)}.")
    for sentence in verdict(outlook, nodes):
        console.print(sentence)


def _from(nodes: int | None) -> str:
    return "nowhere" if nodes is None else f"from {counted(nodes, 'node')} on"


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left")
    return table


def _computing(outlook: Outlook, noun: str) -> Table:
    """Table 1 of paper 002."""
    sizes = [x for x, _ in sorted(outlook.costs.forward.points)]
    table = _table(f"sub-batch ({noun})", *(f"{size * outlook.counted:,.0f}" for size in sizes))
    seconds = [outlook.costs.compute(size) for size in sizes]
    table.add_row("forward, backward", *map(span, seconds))
    table.add_row("T_frm", *(span(s / (size * outlook.counted)) for s, size in zip(seconds, sizes, strict=True)))
    return table


def _exchanging(outlook: Outlook, nodes: int) -> Table:
    """Bytes and costs of an exchange."""
    table = _table(
        f"exchange, {nodes} nodes", "to owners", "back", "T_comm", "quantize", "a row", "C T_post", "to model"
    )
    costs, (plain, packed) = outlook.costs, outlook.traffic(nodes)
    for way, traffic, line in (("float32", plain, costs.post32), ("onebit", packed, costs.post)):
        fixed = [span(costs.quantize), span(costs.update)] if way == "onebit" else ["", ""]
        moving = outlook.link.seconds(traffic, way == "float32")
        table.add_row(
            WAYS[way], in_bytes(traffic.reduce), in_bytes(traffic.share), span(moving), fixed[0], span(line.row),
            span(line.base), fixed[1],
        )
    return table


def _scaling(outlook: Outlook, nodes: Sequence[int], noun: str) -> Table:
    """Steps by number of nodes."""
    heads = [f"{name}\n{what}" for name in ("float32", "1-bit", "halves") for what in ("step", f"{noun}/s", "eff.")]
    table = _table("nodes", "sub-\nbatch", *heads)
    for k in nodes:
        cells = [str(k), f"{outlook.batch * outlook.counted / outlook.setting(k).splits:,.0f}"]
        for way in WAYS:
            step = outlook.steps(k).get(way)
            rest = [amount(outlook.speed(k, way)), percent(outlook.efficiency(k, way))] if step else ["", ""]
            cells += [span(step.seconds) if step else "", *rest]
        table.add_row(*cells)
    return table
