"""Table 4's shape (paper 002): frames a second over minibatch size, 1-bit SGD beside float32, torch's DDP and PowerSGD.

    python benchmarks/onebit_speed.py speed          two pretend hosts, 1 Gbit/s and 100 Mbit/s (as root): half an hour
    python benchmarks/onebit_speed.py speed --sizes 256,1024 --links 100mbit --rounds 5
    python benchmarks/onebit_speed.py tune           learning rates on AN4, without a throttle
    python benchmarks/onebit_speed.py accuracy       AN4 at these rates, over a link of 100 Mbit/s: half an hour
    python benchmarks/onebit_speed.py tune --sides float32,onebit,bmuf,postlocal --out FILE       block training, too
    python benchmarks/onebit_speed.py --summary --plot docs/onebit_speed.png            measures nothing

A host has one rank, and one of this machine's cores where there are enough, which carries its packets too.

**speed**: a DNN of random frames. All sides live at once and take turns, one after the other on one link, then on the
other, forwards and backwards in turn; a turn is some steps, after one that settles. A size that has its lines in --out
is not measured again. {"what": "speed", "side", "batch", "link", "setup", "median_s", "quartiles_s", ...,
"frames_per_s", "bytes" (that a rank sends a step: counted where MPI takes them, or by formula for DDP),
"link_bytes" (that left the rank's host a step, headers and all)}, and {"what": "speed ratio", "side", "beside",
"ratio" (how many times the frames a second of what it stands beside), "ratio_quartiles", ...}.

**accuracy**: AN4's senones, prepared as benchmarks/RESULTS.md says. All sides start from the same weights and see the
same batches in the same order. {"what": "accuracy", "side", "rate", "seed", "link", "setup", "curve": [{"frames",
"seconds" (of training, validation not counted), "accuracy" (held out)}, ...], "link_bytes" a step, "failure"}. Every
side's rate is that of its best held-out accuracy with the first seed; plain DDP, which learns the same, has float32's.
Without compression first, for so many steps on all sides that compress: --cold.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from onebit.race import Race, race_setup
from onebit.sides import OF_SPEED, RANKS, SIDES, WARM_UP, Lines, Side, Team, burst_kib
from onebit.tables import draw, markdown
from runs import ROOT

from hpc.bench import in_turns, machine, make_data, quotient, say, scratch, spread
from hpc.bench_options import link as rate_of_a_link
from hpc.bench_options import numbers, positive
from hpc.bench_sides import CONTEXT, PHASES, WIDTH, Setup, Steps, median
from hpc.hosts import Hosts, missing_rights
from hpc.planning.powersgd import summed, sums_of

SETTLE = 1  # steps
MOST = 8  # steps of a turn, and at most so many frames of them, or one step:
MOST_FRAMES = 4096
LEAST_ROUNDS = 5


def shapes(setup: Setup) -> list[tuple[int, Sequence[int]]]:
    """Of the DNN's matrices and biases, as `hpc.planning.powersgd` wants them; where they begin is not asked for."""
    sizes = [(2 * CONTEXT + 1) * WIDTH, *[setup.width] * setup.layers, setup.classes]
    return [(0, shape) for before, after in pairwise(sizes) for shape in ((after, before), (after,))]


def speed(arguments: argparse.Namespace, lines: Lines) -> None:
    """Measure every size that has no lines yet."""
    model = {key: getattr(arguments, key) for key in ("layers", "width", "classes")}
    about = model | {"activation": "sigmoid", "threads": 1, "ranks": RANKS}
    with scratch() as folder, Hosts(RANKS) as hosts:
        for batch in arguments.sizes:
            held = {(r["side"], r["link"]) for r in lines.of("speed", batch=batch, setup=about)}
            if held >= {(side, link) for side in arguments.sides for link in arguments.links}:
                continue
            frames = (WARM_UP + SETTLE + 1 + arguments.rounds * len(arguments.links) * (SETTLE + most(batch))) * batch
            make_data(folder / f"data{batch}", frames, width=WIDTH, classes=arguments.classes)
            (folder / str(batch)).mkdir()
            setup = Setup(
                data=folder / f"data{batch}", split_frames=frames, batch=batch, activation="sigmoid",
                folder=folder / str(batch), hosts=hosts, **model,
            )
            lines.add([{**record, "setup": about} for record in measure(arguments, setup)])
            shutil.rmtree(folder / f"data{batch}")


def most(batch: int) -> int:
    """Steps of a turn at most."""
    return max(1, min(MOST, MOST_FRAMES // batch))


def measure(arguments: argparse.Namespace, setup: Setup) -> list[dict[str, Any]]:
    """All sides with one minibatch size on all links."""
    hosts, batch = setup.hosts, setup.batch
    assert hosts is not None
    hosts.throttle(None)
    turns: dict[tuple[str, str], list[Steps]] = {(s, link): [] for s in arguments.sides for link in arguments.links}
    with ExitStack() as stack:
        say(f"minibatches of {batch}: starting {', '.join(arguments.sides)}")
        teams = {name: Team(name, setup, stack) for name in arguments.sides}
        for team in teams.values():
            team.take(SETTLE)
        parameters = teams[arguments.sides[0]].parameters
        began = time.monotonic()
        for round_ in range(arguments.rounds):
            if round_ >= LEAST_ROUNDS and time.monotonic() - began > arguments.seconds:
                break
            for link in in_turns(round_, arguments.links):
                hosts.throttle(link, burst_kib(link))
                for name in in_turns(round_, arguments.sides):
                    turns[name, link].append(turn(teams[name], turns[name, link], arguments.turn, batch))
            said = "; ".join(
                f"{link}: " + ", ".join(f"{s} {batch / median(turns[s, link][-1]):,.0f}" for s in arguments.sides)
                for link in arguments.links
            )
            say(f"  round {round_ + 1}, {time.monotonic() - began:.0f} s, frames/s on {said}")
        starts = {name: team.starts for name, team in teams.items()}
    records = [
        told(name, link, batch, parameters, turns[name, link], setup) | {"starts": starts[name]} for name, link in turns
    ]
    for name, link in turns:
        for other in SIDES[name].beside:
            if (other, link) in turns:
                mine, theirs = ([median(steps) for steps in turns[each, link]] for each in (name, other))
                records.append({
                    "what": "speed ratio", "side": name, "beside": other, "batch": batch, "link": link,
                    "pairs": len(mine), **quotient(theirs, mine),
                })
    return records


def turn(team: Team, before: list[Steps], seconds: float, batch: int) -> Steps:
    """A side's next turn: as many steps as take about so many seconds, after one that settles."""
    step = median(before[-1]) if before else seconds
    settle = SETTLE if not before or step < 1.0 or team.name == "onebit-db" else 0
    return team.take(settle + max(1, min(most(batch), round(seconds / step))))[settle:]


def told(name: str, link: str, batch: int, parameters: int, turns: list[Steps], setup: Setup) -> dict[str, Any]:
    """The record of a side on a link."""
    steps, side = [step for taken in turns for step in taken], SIDES[name]
    timing = spread([step["seconds"] for step in steps])
    if side.strategy is None:
        count = sum(sums_of(shapes(setup), side.powersgd)) if side.powersgd else parameters
        own: dict[str, Any] = {"bytes": summed(count, RANKS).total, "bytes_by": "formula"}
    else:
        ways = {f"{way}_bytes": median(steps, way) for way in ("reduce", "share")}
        own = {"bytes": sum(ways.values()), "bytes_by": "counted", **ways}
        own |= {f"{phase}_s": median(steps, phase) for phase in PHASES}
    return {
        "what": "speed", "side": name, "batch": batch, "link": link, "parameters": parameters, "turns": len(turns),
        **timing, "cpu_s": median(steps, "cpu"), "frames_per_s": batch / timing["median_s"], **own,
        "link_bytes": median(steps, "link_sent"), "burst_kib": burst_kib(link),
    }


def main() -> int:
    number = positive(int)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("speed", "tune", "accuracy"))
    parser.add_argument("--sides", type=lambda text: text.split(","), default=OF_SPEED, help=",".join(SIDES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "onebit_speed.jsonl")
    parser.add_argument("--summary", action="store_true", help="print the tables of --out; measure nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (PNG); measure nothing")
    one = parser.add_argument_group("speed")
    one.add_argument("--sizes", type=numbers, default=[256, 512, 1024, 2048, 4096, 8192], help="minibatches, in frames")
    one.add_argument("--links", type=links, default=["1gbit", "100mbit"])
    one.add_argument("--layers", type=number, default=3)
    one.add_argument("--width", type=number, default=2048)
    one.add_argument("--classes", type=number, default=1000)
    one.add_argument("--rounds", type=number, default=15, help="turns of every side on every link, at most")
    one.add_argument("--seconds", type=float, default=200.0, help="after so long no further round of a size is begun, "
                     f"but for the first {LEAST_ROUNDS} (default 200)")
    one.add_argument("--turn", type=float, default=1.0, help="seconds of a turn, about (default 1)")
    two = parser.add_argument_group("tune, accuracy")
    two.add_argument("--data", type=Path, default=ROOT / "data" / "an4", help="prepared AN4: train, validation")
    two.add_argument("--link", type=rate_of_a_link, default="100mbit")
    two.add_argument("--seeds", type=numbers, default=[1])
    two.add_argument("--an4-layers", type=number, default=2)
    two.add_argument("--an4-width", type=number, default=512)
    two.add_argument("--batch", type=number, default=256)
    two.add_argument("--epochs", type=number, default=4)
    two.add_argument("--cold", type=int, default=87, help="steps before anything is compressed (default 87)")
    two.add_argument("--every", type=number, default=217, help="steps between validations (default 217)")
    two.add_argument("--work", type=Path, default=ROOT / "runs" / "onebit_speed", help="where runs are kept")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.sides if name not in SIDES]:
        parser.error(f"--sides: {', '.join(unknown)}: choose from {', '.join(SIDES)}")
    lines = Lines(arguments.out)
    if arguments.plot:
        arguments.plot.write_bytes(draw(lines.records, race_setup(arguments), shown(arguments)))
    if arguments.summary:
        print(markdown(lines.records, race_setup(arguments), shown(arguments)))
    if arguments.plot or arguments.summary:
        return 0
    if arguments.what is None:
        parser.error("say what to do: speed, tune, accuracy, --summary or --plot FILE")
    if missing := missing_rights():
        sys.exit(missing)
    lines.add([machine() | {"for": arguments.what}])
    if arguments.what == "speed":
        speed(arguments, lines)
        return 0
    race = Race(arguments, lines)
    for seed in arguments.seeds:
        for side in arguments.sides:
            race.tune(side) if arguments.what == "tune" else race.race(side, seed)
        if arguments.what == "tune":
            break
    return 0


def shown(arguments: argparse.Namespace) -> dict[str, Side]:
    """The sides asked for."""
    return {name: SIDES[name] for name in arguments.sides}


def links(text: str) -> list[str]:
    return [rate_of_a_link(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
