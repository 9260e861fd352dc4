"""`make demo`: real speech in, a trained model out, on 2 ranks in a few minutes.

Five voices in five languages from Debian's asterisk-core-sounds packages (about two hours of prompts, CC BY-SA and
CC BY). The job: which of them speaks, frame by frame, in utterances never trained on. It calls a user's own commands.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hpc.quantities import counted
from hpc.shards import read_manifest

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "jobs" / "recipes" / "demo.toml"
LANGUAGES = ("en", "es", "fr", "it", "ru")
# Not speech, or the same sound in every language: silence, tones, and the screaming monkeys.
EXCLUDED = ("*/silence/*", "*/tt-*", "*beep*", "*tone.*")
OWN = "make demo VOICES='anna=/path/to/annas/wavs ben=/path/to/bens/wavs'"


class DemoError(RuntimeError):
    """The demo cannot go on; the message says what to do instead."""


def fetch_voices(folder: Path) -> dict[str, Path]:
    """Download and unpack the voices' packages (nothing is installed); name -> folder of wav files.

    Raises DemoError if apt-get or dpkg is missing or the download fails.
    """
    voices = {language: folder / language for language in LANGUAGES}
    missing = [language for language, place in voices.items() if not (place / ".unpacked").exists()]
    if not missing:
        return voices
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise DemoError(f"this machine has no {tool} to fetch the voices with. Use folders of your own:\n  {OWN}")
    folder.mkdir(parents=True, exist_ok=True)
    packages = [f"asterisk-core-sounds-{language}-wav" for language in missing]
    print(f"fetching {', '.join(packages)} (about 20 MB each)", flush=True)
    done = subprocess.run(["apt-get", "download", *packages], cwd=folder, capture_output=True, text=True)
    if done.returncode:  # package lists may be missing or old
        subprocess.run(["apt-get", "update"], capture_output=True)
        done = subprocess.run(["apt-get", "download", *packages], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise DemoError(
            f"the voices could not be downloaded ({done.stderr.strip().splitlines()[-1:]}); run 'apt-get update' as "
            f"root and try again, or use folders of your own:\n  {OWN}"
        )
    for language, package in zip(missing, packages, strict=True):
        archive = next(folder.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg", "-x", archive, voices[language]], check=True)
        (voices[language] / ".unpacked").touch()
        archive.unlink()
    return voices


def ranks_command(ranks: int) -> list[str]:
    """The start of a command line on some ranks, with the launcher beside this Python if there is one."""
    beside = Path(sys.executable).parent / "mpiexec"
    launcher = str(beside) if beside.exists() else shutil.which("mpiexec")
    if launcher is None:
        raise DemoError("no mpiexec found; 'trireme doctor' says what to install")
    return [launcher, "-n", str(ranks), sys.executable, "-m", "mpi4py", "-m", "hpc"]


def call(command: list[str]) -> str:
    """Run a command where the user can see its messages; its standard output. Raises DemoError if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise DemoError(f"this command failed with exit code {done.returncode}:\n  {' '.join(command)}\n{done.stdout}")
    return done.stdout


def main(words: list[str] | None = None) -> int:
    """Fetch, prepare, train, evaluate, draw, and print the results; 0 if all of it worked."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__, epilog=f"with voices of your own:\n  {OWN}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("voices", nargs="*", metavar="NAME=DIR", help="a class and its folder of wav or flac files")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "demo")
    arguments = parser.parse_args(words)
    try:
        show(run(arguments.voices, arguments.data, arguments.run, arguments.ranks))
    except KeyboardInterrupt:
        print("demo: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def run(given: list[str], data: Path, run_folder: Path, ranks: int) -> dict[str, object]:
    """The whole job; what `show` prints."""
    if given:
        tag = hashlib.sha256(" ".join(given).encode()).hexdigest()[:8]  # other voices, another data set and run
        given = [f"{name}={Path(place).expanduser()}" for name, _, place in (word.partition("=") for word in given)]
        sources, prepared, run_folder = given, data / f"own-{tag}", run_folder.with_name(f"{run_folder.name}-{tag}")
    else:
        voices = fetch_voices(data / "voices")
        sources, prepared = [f"{name}={folder}" for name, folder in voices.items()], data / "demo"
    began = time.monotonic()
    on_ranks, alone = ranks_command(ranks), [sys.executable, "-m", "hpc"]
    excluded = [word for pattern in EXCLUDED for word in ("--exclude", pattern)]
    print(call([*on_ranks, "prepare", "frames", "--from", "audio", *sources, *excluded, str(prepared)]), flush=True)
    own_data = [f"data.train={prepared}/train", f"data.validation={prepared}/validation", f"run={run_folder}"]
    call([*on_ranks, "train", str(RECIPE), *own_data])
    validation = prepared / "validation"
    metrics = json.loads(call([*on_ranks, "evaluate", str(run_folder), str(validation), "--json"]).splitlines()[-1])
    call([*alone, "report", str(run_folder)])
    counts = read_manifest(validation)["fields"]["labels"]["counts"]
    return {
        "task": "frames", "frame_accuracy": round(1 - metrics["frame_error"], 4),
        "majority": round(max(counts) / sum(counts), 4), "ranks": ranks, "seconds": round(time.monotonic() - began, 1),
        "run": str(run_folder),
    }


def show(result: dict[str, object]) -> None:
    """The result table, where everything lies, and one JSON line."""
    run_folder = Path(str(result["run"]))
    success = json.loads((run_folder / "success").read_text())
    table = Table(title="Which voice speaks? Frames of utterances never trained on")
    table.add_column("")
    table.add_column("", justify="right", overflow="fold")
    table.add_row("frames named correctly", f"[bold]{float(str(result['frame_accuracy'])):.1%}[/bold]")
    table.add_row("always naming the majority class", f"{float(str(result['majority'])):.1%}")
    table.add_row("frames trained on", f"{success['frames']:,}")
    table.add_row("training", f"{success['seconds']:.0f} s on {counted(success['ranks'], 'rank')}")
    for name, file in (
        ("model", "model.safetensors"), ("picture", "report.png"), ("page", "report.html"),
        ("log", "metrics.jsonl"), ("recipe", "recipe.toml"),
    ):
        table.add_row(name, os.path.relpath(run_folder / file), style="dim" if name == "recipe" else "")
    Console().print(table)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(main())
