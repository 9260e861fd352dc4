"""What a stranger may hand over (recipes, manifests, shards, checkpoints), altered at random, read: `make fuzz`.

    python tests/faults/fuzz.py --inputs 200000                all readers, a process each in turn
    python tests/faults/fuzz.py --inputs 2000 --reader shards

Digests and seals are made anew after every alteration, so that what is behind them is tested. Every input must end in a
clear error (RecipeError, DataError, CheckpointError) or in a read; of a shard in a read of the values as written, for
its checksums are not made anew. Readers run in processes of their own, with 1 GiB of address space above what they
start with, and 20 s an input. Prints a line a reader, and exits with 1 if any number after "refused" is not 0:

    {"reader", "inputs", "read", "refused", "wrong", "unclear", "crashes", "hangs", "memory", "examples"}
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import mmap
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

MEMORY = 1 << 30
INPUT_S = 20.0
ODD: list[Any] = [
    0, -1, 1, 2**31, 2**63, -(2**63), 1e308, 1e-300, 0.5, "", "a", "../../etc/passwd", "/etc/passwd", "x" * 10_000,
    True, False, None, [], {}, [[]], [0] * 1000, {"": {}}, "\0", "step-000000001", "features-00000-of-00001.h5",
]
READERS = ("recipe", "manifest", "shards", "checkpoint")


def altered_bytes(raw: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, removed, put in, or copied from elsewhere."""
    content = bytearray(raw)
    for _ in range(draw.choice([1, 1, 1, 2, 5, 20])):
        if not content:
            break
        at = draw.randrange(len(content))
        what = draw.randrange(7)
        if what < 3:
            content[at] = draw.choice([content[at] ^ (1 << draw.randrange(8)), draw.randrange(256), 0, 255])
        elif what == 3:
            del content[at : at + draw.choice([1, 8, 100, len(content)])]
        elif what == 4:
            content[at:at] = draw.randbytes(draw.choice([1, 8, 64]))
        elif what == 5:
            origin = draw.randrange(len(content))
            size = draw.choice([1, 8, 64, 512])
            content[at : at + size] = content[origin : origin + size]
        else:  # a number that counts or points somewhere
            size = draw.choice([2, 4, 8])
            value = draw.choice([0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), len(raw), draw.getrandbits(8 * size)])
            content[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(content)


def altered_value(value: Any, draw: random.Random) -> Any:
    """JSON in which one node, or a few, are another value, gone, or twice there."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice([1, 1, 2, 4])):
        holder, key = value, None
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(holder[key], dict | list) and holder[key] and draw.random() < 0.8:
                holder = holder[key]
                continue
            what = draw.randrange(6)
            if what < 3:
                holder[key] = copy.deepcopy(draw.choice(ODD))
            elif what == 3:
                del holder[key]
            elif what == 4 and isinstance(holder, dict):
                holder[draw.choice(["", "a", "schema", "name", "__class__", str(key) + "x"])] = holder.pop(key)
            elif isinstance(holder, list):
                holder.append(copy.deepcopy(draw.choice([holder[key], *ODD])))
            elif isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
                holder[key] = draw.choice([holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 1000, 0.5])
            break
    return value


# -- readers: each prepares its material in a folder, and returns what reads one altered input ---------------------


def recipe(folder: Path) -> Callable[[random.Random], bool]:
    from hpc.build import registry
    from hpc.config import load

    texts = [path.read_bytes() for path in sorted((ROOT / "jobs/recipes").glob("*.toml"))]
    known = registry()
    path = folder / "recipe.toml"
    words = b"true -1 0 1e999 nan inf '' [] {} [[ 1979-05-27 'x' 999999999999 07:32:00".split()
    settings = ["optim.learning_rate=1", "a.b.c=1", "=", "splits=[", "data=1", "task.name=x", "run='a'"]

    def read(draw: random.Random) -> bool:
        text = draw.choice(texts)
        if draw.random() < 0.5:
            lines = text.split(b"\n")
            at = draw.randrange(len(lines))
            key, sign, _ = lines[at].partition(b"=")
            lines[at] = key + sign + b" " + draw.choice(words) if sign else draw.choice(lines)
            text = b"\n".join(lines)
        else:
            text = altered_bytes(text, draw)
        path.write_bytes(text)
        load(path, [draw.choice(settings)] if draw.random() < 0.2 else [], known)
        return True

    return read


def manifest(folder: Path) -> Callable[[random.Random], bool]:
    from material import write_frames

    from hpc.files import write_sealed
    from hpc.pieces import read_piece
    from hpc.shards import MANIFEST, Dataset, read_manifest

    write_frames(folder / "data", utterances=6, shards=2)
    path = folder / "data" / MANIFEST
    whole, raw = read_manifest(folder / "data"), path.read_bytes()

    def read(draw: random.Random) -> bool:
        if draw.random() < 0.8:
            write_sealed(path, {k: v for k, v in altered_value(whole, draw).items() if k != "seal"})
        else:
            path.write_bytes(altered_bytes(raw, draw))
        data = Dataset(folder / "data")
        try:
            data.verify(0)
            read_piece(data, [(0, data.rows)], 0)
        finally:
            data.close()
        return True

    return read


def shards(folder: Path) -> Callable[[random.Random], bool]:
    import numpy as np
    from material import write_frames

    from hpc.shards import Dataset, read_manifest, write_manifest

    write_frames(folder / "data", utterances=6, shards=1)
    whole = read_manifest(folder / "data")
    names = [entry["name"] for entry in whole["shards"][0]["files"]]
    raw = {name: (folder / "data" / name).read_bytes() for name in names}

    def everything() -> tuple[list[str], Any, Any]:
        data = Dataset(folder / "data")
        try:
            data.verify(0)
            features = np.empty((data.rows, data.field("features")["width"]), np.float32)
            labels = np.empty(data.rows, np.int32)
            data.read("features", 0, data.rows, features)
            data.read("labels", 0, data.rows, labels)
            return data.keys(), features, labels
        finally:
            data.close()

    keys, features, labels = everything()

    def read(draw: random.Random) -> bool:
        victim = draw.choice(names)
        for name in names:
            (folder / "data" / name).write_bytes(raw[name])
        content = altered_bytes(raw[victim], draw)
        (folder / "data" / victim).write_bytes(content)
        told = json.loads(json.dumps(whole))
        entry = told["shards"][0]["files"][names.index(victim)]
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        write_manifest(folder / "data", told)
        found = everything()
        return found[0] == keys and np.array_equal(found[1], features) and np.array_equal(found[2], labels)

    return read


def checkpoint(folder: Path) -> Callable[[random.Random], bool]:
    import torch
    from material import write_recipe

    from hpc.checkpoint import MANIFEST, Checkpoint, check, newest, read_manifest
    from hpc.files import write_sealed
    from hpc.flat import Flat

    recipe_file = write_recipe(folder, splits=2, batch=48)
    words = [sys.executable, "-m", "mpi4py", "-m", "hpc", "train", str(recipe_file), "schedule.epochs=1"]
    subprocess.run([*words, "schedule.min_epochs=1", "task.width=8"], check=True, cwd=ROOT, capture_output=True)
    place = newest(folder / "run/checkpoints").path
    assert place is not None
    whole = read_manifest(place)
    raw = {name: (place / name).read_bytes() for name in (*whole["files"], MANIFEST)}
    from collectives.comm import Comm
    from hpc.build import load_run

    _, _, model, _ = load_run(folder / "run", "cpu", Comm())
    flat = Flat(model, torch.zeros)

    def read(draw: random.Random) -> bool:
        for name, content in raw.items():
            (place / name).write_bytes(content)
        victim = draw.choice(list(raw))
        if victim == MANIFEST and draw.random() < 0.8:
            write_sealed(place / MANIFEST, {k: v for k, v in altered_value(whole, draw).items() if k != "seal"})
        else:
            content = altered_bytes(raw[victim], draw)
            if victim == "state.json" and draw.random() < 0.5:
                content = json.dumps(altered_value(json.loads(raw[victim]), draw)).encode()
            (place / victim).write_bytes(content)
            if victim != MANIFEST:
                told = json.loads(json.dumps(whole))
                told["files"][victim] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                write_sealed(place / MANIFEST, {k: v for k, v in told.items() if k != "seal"})
        check(place)
        opened = Checkpoint(place, flat)
        opened.weights_into(flat.weights)
        opened.slice("momentum", 0, flat.size)
        for split in range(2):
            opened.split(split)
            opened.carry(split, lambda tensor: tensor)
        return True

    return read


# -- processes ------------------------------------------------------------------------------------------------------


def work(reader: str, seed: int, begin: int, end: int, place: str) -> None:
    """Inputs [begin, end): the number of the one under way goes into the file `place`, what came of them to stdout."""
    from hpc.checkpoint import CheckpointError
    from hpc.config import RecipeError
    from hpc.shards import DataError

    with open(place, "r+b") as file:
        under_way = mmap.mmap(file.fileno(), 8)
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        read = globals()[reader](Path(folder))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for number in range(begin, end):
            struct.pack_into("<q", under_way, 0, number)
            try:
                what = "read" if read(random.Random(seed * 1_000_003 + number)) else "wrong"
            except (CheckpointError, RecipeError, DataError):
                what = "refused"
            except MemoryError as error:
                what = "memory"
                examples.setdefault(what, f"{number}: {error}")
            except Exception as error:
                what = "unclear"
                examples.setdefault(f"{what} {type(error).__name__}", f"{number}: {error}"[:300])
            if what == "wrong":
                examples.setdefault(what, str(number))
            counts[what] += 1
            if number % 200 == 0 or number == end - 1:
                print(json.dumps({"counts": counts, "examples": examples}), flush=True)
                counts.clear()


def drive(reader: str, inputs: int, seed: int) -> dict[str, Any]:
    """All inputs of a reader, in as many processes as it takes."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    at = 0
    with tempfile.NamedTemporaryFile() as place, tempfile.TemporaryFile("w+") as errors, ExitStack() as files:
        place.write(bytes(8))
        place.flush()
        while at < inputs:
            words = [sys.executable, __file__, "--work", reader, str(seed), str(at), str(inputs), place.name]
            said = files.enter_context(tempfile.TemporaryFile("w+"))
            worker = subprocess.Popen(words, cwd=ROOT, stdout=said, stderr=errors)
            last, since, hung = -1, time.monotonic(), False
            while worker.poll() is None:
                number = struct.unpack("<q", Path(place.name).read_bytes())[0]
                if number != last:
                    last, since = number, time.monotonic()
                if last >= at and time.monotonic() - since > INPUT_S:
                    hung = True
                    worker.kill()
                time.sleep(0.05)
            said.seek(0)
            for record in map(json.loads, said):
                counts.update(record["counts"])
                examples = record["examples"] | examples
            done = struct.unpack("<q", Path(place.name).read_bytes())[0] + 1
            if worker.returncode:
                if done <= at:
                    errors.seek(0)
                    raise RuntimeError(f"the reader '{reader}' did not start: {errors.read()[-2000:]}")
                what = "hangs" if hung else "crashes"
                counts[what] += 1
                examples.setdefault(what, f"{done - 1}: exit code {worker.returncode}")
            at = done
    names = ("read", "refused", "wrong", "unclear", "crashes", "hangs", "memory")
    return {"reader": reader, "inputs": inputs, **{n: counts[n] for n in names}, "examples": examples}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=200_000, help="a reader (default: 200000)")
    parser.add_argument("--reader", action="append", choices=READERS, help="default: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        reader, seed, begin, end, place = arguments.work
        work(reader, int(seed), int(begin), int(end), place)
        return 0
    bad = 0
    for reader in arguments.reader or READERS:
        found = drive(reader, arguments.inputs, arguments.seed)
        print(json.dumps(found), flush=True)
        bad += sum(found[name] for name in ("wrong", "unclear", "crashes", "hangs", "memory"))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
