"""`trireme plan`: how many nodes pay for a recipe, and whether 1-bit exchange or double buffering does.

It measures a recipe's costs here, for a few seconds each (`planning/measure.py`), and computes steps on nodes that one
may not have (`planning/model.py`). Source: paper 002, section 2.1, equations (3) and (4), and section 5.1.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from collectives.comm import Comm
from hpc.bench import rounded, say, scratch
from hpc.bench_crew import Crew
from hpc.bench_options import bits_of, link, numbers, positive
from hpc.build import part_of, registry
from hpc.config import Recipe, RecipeError, load, options
from hpc.planning.measure import measure
from hpc.planning.model import Costs, Curve, Line, Link
from hpc.planning.outlook import Outlook
from hpc.planning.words import show, span, verdict
from hpc.quantities import amount, counted
from hpc.shards import read_manifest

EXAMPLES = """examples:
  trireme plan jobs/recipes/demo.toml --link 1gbit                  computing measured here, the link as told
  trireme plan my.toml data.batch=4096 --link 10gbit --ranks-a-node 8 --nodes 1,2,4,8
  trireme plan my.toml                                              the link: between two ranks of this machine
  mpiexec -n 2 -ppn 1 python -m mpi4py -m hpc plan my.toml          and as it is between these two nodes
  trireme plan my.toml --link 40gbit --gpu-speedup 50 --memory-speedup 15

A node is a machine of --ranks-a-node ranks and one link. Where several ranks are there, they measure at once, as they
would train. What is useful of a node is the share of its time that one node alone would not need: its speed over that
of as many nodes that exchange nothing.
"""
NODES = [1, 2, 4, 8, 16, 32, 64]
FEWEST = 8  # items of the smallest sub-batch that is measured


def seconds(text: str) -> float:
    """A duration: "50us", "1.5ms", "0.001"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e-?\d+)?)(us|ms|s)?", text.lower())
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is not a time such as 50us, 1ms or 0.001 (seconds)")
    return float(found[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0, None: 1.0}[found[2]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    number = positive(int)
    parser.add_argument("recipe", help="a recipe file (TOML); those that come with Trireme are in jobs/recipes/")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="recipe keys to set")
    parser.add_argument("--link", type=link, help="rate of a node's link each way (10gbit); without it, it is measured")
    parser.add_argument(
        "--latency", type=seconds, default=None, metavar="T", help="until a message arrives, with --link (50us)"
    )
    parser.add_argument(
        "--nodes", type=numbers, default=None, metavar="K,K",
        help="numbers of nodes (1,2,4 ... 64); beyond the largest, equation (4) takes costs as they are there",
    )
    parser.add_argument(
        "--ranks-a-node", type=number, default=None, metavar="R", help="ranks of a node (1, or as started)"
    )
    parser.add_argument(
        "--gpu-speedup", type=positive(float), default=1.0, metavar="X",
        help="as if forward and backward were so many times as fast as here",
    )
    parser.add_argument(
        "--memory-speedup", type=positive(float), default=None, metavar="Y",
        help="and passes through memory (quantizing, adding, updating) so many times (default: X)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the screen")


def run(arguments: argparse.Namespace, comm: Comm) -> int:
    """Measure, and say what follows (collective)."""
    comm.on_root(lambda: _check(arguments, comm))  # one complaint, not K
    recipe = load(arguments.recipe, arguments.overrides, registry())
    ranks = _ranks(arguments, comm)
    nodes = _nodes(arguments, recipe, ranks)
    sizes = _sizes(recipe, nodes, ranks)
    busy = counted(max(ranks, comm.size), "rank")
    comm.on_root(lambda: say(f"measuring {arguments.recipe} here, {busy} at once ..."))
    if comm.alone:
        found = _measured_alone(recipe, comm, sizes, ranks, arguments.link is None)
    else:
        found = measure(recipe, comm, sizes, arguments.link is None)
    comm.on_root(lambda: _tell(arguments, recipe, nodes, ranks, found))
    return 0


def _check(arguments: argparse.Namespace, comm: Comm) -> None:
    """Raise ValueError or OSError for what cannot be planned, before anything is measured (rank 0)."""
    recipe = load(arguments.recipe, arguments.overrides, registry())
    read_manifest(Path(recipe.data.train))
    strategy: Any = registry()["strategy"][recipe.strategy.name]
    part_of(recipe.data.batch, strategy.parts_of_a_batch(**options(recipe.strategy)), recipe.splits)
    if arguments.latency is not None and arguments.link is None:
        raise ValueError("--latency goes with --link; without --link both are measured")
    asked, there = arguments.ranks_a_node, len(comm.islands[0])
    if asked and len(comm.islands) > 1 and asked != there:
        raise ValueError(
            f"--ranks-a-node {asked}: {counted(there, 'rank')} a node were started; leave it out, or start so many"
        )
    if any(len(island) != there for island in comm.islands):
        raise ValueError(f"nodes have {sorted({len(island) for island in comm.islands})} ranks; start as many on each")
    _nodes(arguments, recipe, _ranks(arguments, comm))


def _ranks(arguments: argparse.Namespace, comm: Comm) -> int:
    """Of a node: as asked, or as started on several."""
    return arguments.ranks_a_node or (len(comm.islands[0]) if len(comm.islands) > 1 else 1)


def _nodes(arguments: argparse.Namespace, recipe: Recipe, ranks: int) -> list[int]:
    """The numbers of nodes that a minibatch has items for. Raises RecipeError if there are none."""
    fitting = [k for k in arguments.nodes or NODES if recipe.data.batch >= k * ranks]
    if not fitting:
        raise RecipeError(
            f"recipe key 'data.batch' = {recipe.data.batch}: fewer items than ranks on "
            f"{counted((arguments.nodes or NODES)[0], 'node')} of {counted(ranks, 'rank')}; ask for fewer (--nodes)"
        )
    return fitting


def _sizes(recipe: Recipe, nodes: list[int], ranks: int) -> list[int]:
    """The sub-batches to measure: those of all numbers of nodes, and their halves."""
    batch, found = recipe.data.batch, set()
    for k in nodes:
        splits = k * ranks if recipe.splits % (k * ranks) else recipe.splits
        found |= {batch // splits, batch // splits // 2}
    found.add(batch // ranks)
    return sorted(size for size in found if size >= FEWEST) or [max(found)]


def _measured_alone(recipe: Recipe, comm: Comm, sizes: list[int], ranks: int, between: bool) -> dict[str, Any]:
    """What a process alone measures; with others that it starts here, where a node has several ranks, or there is a
    link to measure."""
    spec: dict[str, Any] = {"recipe": recipe.to_dict(), "sizes": sizes, "link": between}
    if ranks == 1:
        found = measure(recipe, comm, sizes, False)
        if not between:
            return found
        spec = {"recipe": None, "floats": found["floats"]}
    with scratch() as folder, Crew("plan", max(ranks, 2), "hpc.planning.measure", spec, folder=folder) as crew:
        told = crew.take(1)[0]
    return found | told if ranks == 1 else told


def _tell(arguments: argparse.Namespace, recipe: Recipe, nodes: list[int], ranks: int, found: dict[str, Any]) -> None:
    costs = _faster(_costs(found["costs"]), arguments)
    between = _link(arguments, found)
    strategy = recipe.strategy
    outlook = Outlook(
        costs, between, found["shapes"], found["floats"], batch=recipe.data.batch, counted=found["costs"]["counted"],
        splits=recipe.splits, ranks=ranks, bucket=int(getattr(strategy, "bucket_mib", 0.0) * (1 << 20)),
        wire=getattr(strategy, "wire", "float32"), overlap=getattr(strategy, "overlap", "on") == "on",
        deferred=bool(getattr(strategy, "clip_norm", 0.0)) and strategy.name == "allreduce",
    )
    if arguments.json:
        told = {
            "recipe": arguments.recipe, "data": recipe.data.train, "task": recipe.task.name,
            **{key: found[key] for key in ("noun", "parameters", "device", "busy")},
            "precision": recipe.precision, "threads": recipe.threads, "batch": recipe.data.batch, "ranks_a_node": ranks,
            "gpu_speedup": arguments.gpu_speedup, "memory_speedup": arguments.memory_speedup or arguments.gpu_speedup,
            "link": {
                "asked": arguments.link, "both": between.both.points, "streamed": between.streamed.points,
                "message": between.message, "core": between.core,
            },
            "costs": found["costs"], **outlook.to_dict(nodes), "verdict": verdict(outlook, nodes),
        }
        print(json.dumps(rounded(told)))
        return
    show(outlook, nodes, found, _title(arguments, recipe, found), _notes(arguments, recipe, ranks, found))


def _costs(values: dict[str, Any]) -> Costs:
    """What `planning/measure.py` found."""
    return Costs(
        Curve([(x, y) for x, y in values["forward"]]), Curve([(x, y) for x, y in values["backward"]]),
        [(int(start), float(share)) for start, share in values["final"]], values["quantize"],
        Line(*values["post"]), Line(*values["post32"]), values["update"], dict(values["low_rank"]),
        values["contended"],
    )


def _faster(costs: Costs, arguments: argparse.Namespace) -> Costs:
    compute, memory = arguments.gpu_speedup, arguments.memory_speedup or arguments.gpu_speedup
    return costs if compute == memory == 1.0 else costs.faster(compute, memory)


def _link(arguments: argparse.Namespace, found: dict[str, Any]) -> Link:
    """As told, or as measured."""
    if arguments.link is not None:
        latency = 50e-6 if arguments.latency is None else arguments.latency
        return Link.of(bits_of(arguments.link) / 8, latency, found["message"])
    measured = found["link"]
    core = 0.0 if arguments.gpu_speedup != 1.0 else measured["core"]
    both, streamed = (Curve([(x, y) for x, y in measured[name]]) for name in ("both", "streamed"))
    return Link(both, streamed, found["message"], core)


def _title(arguments: argparse.Namespace, recipe: Recipe, found: dict[str, Any]) -> str:
    return (f"{arguments.recipe}: {amount(found['parameters'])} parameters, minibatches of {recipe.data.batch:,}, "
            f"{recipe.precision} on {found['device']}, {counted(recipe.threads, 'thread')} a rank")


def _notes(arguments: argparse.Namespace, recipe: Recipe, ranks: int, found: dict[str, Any]) -> list[str]:
    """How it was measured, and what was assumed."""
    notes = [f"measured by {counted(found['busy'], 'rank')} at once on this machine; a node: {counted(ranks, 'rank')}"]
    if arguments.link is not None:
        latency = 50e-6 if arguments.latency is None else arguments.latency
        notes.append(f"link: {arguments.link} each way, {span(latency)} until a message arrives, as told")
    else:
        hosts, of = found["link"]["hosts"], counted(found["link"]["ranks"], "rank")
        bytes_, took = max(found["link"]["streamed"])
        rate = f"{amount(8 * bytes_ / took)}bit/s each way"
        here = "of this machine, which is no network (--link RATE tells of one)"
        where = f"on {counted(hosts, 'host')}" if hosts > 1 else here
        notes.append(f"link: {rate}, measured between {of} {where}")
    compute, memory = arguments.gpu_speedup, arguments.memory_speedup or arguments.gpu_speedup
    if not compute == memory == 1.0:
        notes.append(f"as if computing were {compute:g} times as fast as here, passes through memory {memory:g} times")
    if recipe.splits > 1:
        notes.append(f"splits: {recipe.splits}, where ranks divide them; else one a rank")
    if recipe.strategy.name not in ("allreduce", "onebit"):
        notes.append(
            f"'{recipe.strategy.name}', the recipe's own strategy, exchanges once a block and is not planned: these "
            "are exchanges of every minibatch"
        )
    return notes


