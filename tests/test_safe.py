"""What comes from a stranger can make nothing run, leads nowhere else, and takes no more memory than it has bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from material import edited_manifest, write_frames, write_recipe

from collectives.comm import Comm
from collectives.errors import is_refusal
from hpc import checkpoint
from hpc.checkpoint import MANIFEST, Checkpoint, CheckpointError, check, check_own, newest, read_manifest, step_name
from hpc.config import RecipeError, read_toml
from hpc.files import sha256_of, write_sealed
from hpc.flat import Flat
from hpc.prepare.sentences import prepare_sentences
from hpc.prepare.text import prepare_text
from hpc.run import RunError, read_data
from hpc.shards import DataError, Dataset

sys.path.insert(0, str(Path(__file__).parent / "faults"))
import fuzz

EVERY = 1000  # bytes


@pytest.fixture
def data(tmp_path):
    return write_frames(tmp_path / "data", utterances=6, shards=1)


def replaced(folder, change, name="features-00000-of-00001.h5"):
    """Change a shard with h5py, as a stranger would, with a manifest that fits it; then read everything."""
    path = folder / name
    with h5py.File(path, "r+", libver="latest") as file:
        change(file)
    content = path.read_bytes()
    with edited_manifest(folder) as manifest:
        entry = next(e for e in manifest["shards"][0]["files"] if e["name"] == name)
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    data = Dataset(folder)
    data.verify(0)
    data.keys()


def test_an_unchanged_shard_is_read(data):
    replaced(data, lambda file: None)


@pytest.mark.parametrize("name", ["features", "features/values", "features/starts", "keys"])
@pytest.mark.parametrize("link", [h5py.SoftLink("/labels"), h5py.ExternalLink("/etc/passwd", "/")])
def test_links_are_refused(data, name, link):
    def change(file):
        del file[name]
        file[name] = link

    with pytest.raises(DataError, match="which may lead anywhere"):
        replaced(data, change)


def test_external_storage_is_refused(data, tmp_path):
    (tmp_path / "elsewhere").write_bytes(bytes(1 << 20))

    def change(file):
        shape = file["features/values"].shape
        del file["features/values"]
        file["features"].create_dataset(
            "values", shape, np.float32, external=[(str(tmp_path / "elsewhere"), 0, h5py.h5f.UNLIMITED)]
        )

    with pytest.raises(DataError, match="lies in other files"):
        replaced(data, change)


def test_virtual_data_sets_are_refused(data):
    def change(file):
        shape = file["features/values"].shape
        del file["features/values"]
        layout = h5py.VirtualLayout(shape, np.float32)
        layout[:] = h5py.VirtualSource("labels-00000-of-00001.h5", "labels/values", shape)
        file["features"].create_virtual_dataset("values", layout)

    with pytest.raises(DataError, match="lies in other files"):
        replaced(data, change)


@pytest.mark.parametrize("options", [
    {"compression": "gzip"}, {"shuffle": True}, {"scaleoffset": 2}, {"compression": "lzf"},
])
def test_filters_are_refused(data, options):
    def change(file):
        values = file["features/values"][:]
        del file["features/values"]
        file["features"].create_dataset("values", data=values, chunks=True, **options)

    with pytest.raises(DataError, match="only fletcher32 is read"):
        replaced(data, change)


def test_shapes_that_the_file_cannot_hold_are_refused_before_anything_is_allocated(data):
    """Nothing of them is stored: HDF5 would make up the values, terabytes of them."""
    for name, shape, dtype in (("values", (1 << 40, 6), np.float32), ("starts", (1 << 40,), np.int64)):
        def change(file, name=name, shape=shape, dtype=dtype):
            if name in file["features"]:
                del file["features"][name]
            file["features"].create_dataset(name, shape, dtype, chunks=(64, *shape[1:]), fletcher32=True)

        with pytest.raises(DataError, match="does not hold"):
            replaced(data, change)


def test_chunks_larger_than_memory_are_refused(data):
    def change(file):
        values = file["features/values"][:]
        del file["features/values"]
        held = file["features"].create_dataset(
            "values", values.shape, np.float32, maxshape=(None, 6), chunks=(1 << 26, 6), fletcher32=True
        )
        assert held.chunks

    with pytest.raises(DataError, match="stored in chunks"):
        replaced(data, change)


def test_texts_of_any_length_are_refused(data):
    """HDF5 keeps such in a heap without checksums, and never comes back from one that is damaged."""
    def change(file):
        keys = file["keys"][:].tolist()
        del file["keys"]
        file.create_dataset("keys", data=keys, dtype=h5py.string_dtype())

    with pytest.raises(DataError, match="keys cannot be read"):
        replaced(data, change)


@pytest.mark.parametrize("name", [
    "../data/features-00000-of-00001.h5", "/etc/passwd", "a/b.h5", "", ".", ".hidden", "a\0b",
])
def test_a_manifest_names_files_in_its_own_folder_only(data, name):
    with edited_manifest(data) as manifest:
        manifest["shards"][0]["files"][0]["name"] = name
    with pytest.raises(DataError, match=r"shards\.0\.files\.0\.name"):
        Dataset(data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model's checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder, splits=2)
    words = [sys.executable, "-m", "mpi4py", "-m", "hpc", "train", str(recipe), "schedule.epochs=1"]
    subprocess.run([*words, "schedule.min_epochs=1"], check=True, cwd=Path(__file__).parents[1], capture_output=True)
    return newest(folder / "run/checkpoints").path


def test_a_checkpoint_that_cannot_be_read_is_one_that_is_not_gone_on_from(trained, tmp_path, monkeypatch):
    """As one of which a byte is flipped: a disk fails by both."""
    folder = tmp_path / "checkpoints"
    for step in (10, 20):
        shutil.copytree(trained, folder / step_name(step))

    def failing(path):
        if path.parent.name == step_name(20) and path.name == "model.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return sha256_of(path)

    monkeypatch.setattr(checkpoint, "sha256_of", failing)
    found = newest(folder)
    assert found.path == folder / step_name(10) and "cannot be read" in found.complaints[0]
    with pytest.raises(OSError, match="goes on from another one") as caught:
        check_own(folder / step_name(20))
    assert not is_refusal(caught.value)


def every_flipped_byte_is_refused(folder, error, read):
    """Of each file in a folder every thousandth byte, and its last: `read` must raise `error`, naming the file."""
    tried = 0
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for at in {*range(0, len(content), EVERY), len(content) - 1}:
            changed = bytearray(content)
            changed[at] ^= 1 << at % 8
            path.write_bytes(changed)
            with pytest.raises(error, match=path.name):
                read(folder)
            tried += 1
        path.write_bytes(content)
        read(folder)
    assert tried > 20


def test_every_flipped_byte_of_a_checkpoint_is_refused_and_its_file_named(trained, tmp_path):
    every_flipped_byte_is_refused(shutil.copytree(trained, tmp_path / "checkpoint"), CheckpointError, check)


@pytest.mark.parametrize("kind", ["frames", "sentences", "text"])
def test_every_flipped_byte_of_a_data_set_is_refused_and_its_file_named(tmp_path, kind):
    if kind == "frames":
        fields, folder = ("features", "labels"), write_frames(tmp_path / "train", utterances=40)
    else:
        (tmp_path / "lines").write_text("".join(f"c{i % 3} w{i % 7} w{i % 11} w{i % 13}\n" for i in range(900)))
        if kind == "sentences":
            prepare_sentences(Comm(), tmp_path / "lines", tmp_path, validation=0.0, shards=2, quiet=True)
        else:
            prepare_text(Comm(), {"train": [tmp_path / "lines"]}, tmp_path, shards=2, quiet=True)
        fields, folder = ("words",), tmp_path / "train"
    targets = ("labels",) if kind == "sentences" else ()

    def read(folder):
        data = Dataset(folder, fields, targets)
        try:
            for shard in range(len(data.manifest["shards"])):
                data.verify(shard)
        finally:
            data.close()

    every_flipped_byte_is_refused(folder, DataError, read)


def test_a_checkpoints_manifest_names_files_in_its_own_folder_only(trained, tmp_path):
    place = shutil.copytree(trained, tmp_path / "checkpoint")
    manifest = {k: v for k, v in read_manifest(place).items() if k != "seal"}
    outside = json.loads(json.dumps(manifest).replace("rank-00000.safetensors", "../../rank-00000.safetensors"))
    write_sealed(place / MANIFEST, outside)
    with pytest.raises(CheckpointError, match="String should match pattern"):
        check(place)


def test_a_checkpoint_of_pickled_tensors_is_not_read(trained, tmp_path):
    place = shutil.copytree(trained, tmp_path / "checkpoint")
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return (ran.touch, ())

    torch.save(Trap(), place / "model.safetensors")
    manifest = {k: v for k, v in read_manifest(place).items() if k != "seal"}
    content = (place / "model.safetensors").read_bytes()
    manifest["files"]["model.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_sealed(place / MANIFEST, manifest)
    check(place)
    model = torch.nn.Linear(2, 2)
    flat = Flat(model, torch.zeros)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint(place, flat).weights_into(flat.weights)
    assert not ran.exists()


@pytest.mark.parametrize("text", ["x = " + "[" * 100_000, "x = 1\n" * 300_000])
def test_recipes_that_are_too_much_are_refused(tmp_path, text):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(RecipeError, match=r"nested too deeply|more than"):
        read_toml(tmp_path / "recipe.toml")


def test_code_in_the_current_folder_is_not_run(plain_environment, tmp_path):
    """By the processes that are started beside the one that was asked for: the guard, and ranks of a launch."""
    recipe, place = write_recipe(tmp_path), tmp_path / "here"
    (place / "hpc").mkdir(parents=True)
    for name in ("secrets.py", "hpc/__init__.py", "mpi4py.py", "torch.py"):
        (place / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w'); raise SystemExit(3)\n")
    words = [Path(sys.executable).with_name("trireme"), "launch", recipe, "-n", "2", "schedule.epochs=1"]
    subprocess.run([*words, "schedule.min_epochs=1"], env=plain_environment, cwd=place, check=True)
    assert (tmp_path / "run/success").exists() and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["recipe.toml", "logs", "ranks/rank-00000.stacks", "metrics.jsonl"])
def test_nothing_is_written_through_links_in_a_run_folder(trireme, tmp_path, name):
    recipe, victim = write_recipe(tmp_path), tmp_path / "victim"
    victim.write_text("untouched")
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim)
    if name != "recipe.toml":
        (tmp_path / "run/recipe.toml").write_text("")
    assert "is a link" in trireme("train", recipe, code=1).stderr
    assert victim.read_text() == "untouched" and not (tmp_path / "run/job.lock").exists()


@pytest.mark.parametrize("run", ["runs/a\ntouch b", "runs/\x1b[2J", ""])
def test_a_run_folder_has_a_name_that_can_stand_in_a_script(trireme, tmp_path, run):
    recipe = write_recipe(tmp_path)
    text = recipe.read_text()
    recipe.write_text("\n".join(f"run = {json.dumps(run)}" if x.startswith("run =") else x for x in text.split("\n")))
    assert "run" in trireme("sbatch", recipe, code=1).stderr


@pytest.mark.parametrize(("field", "changes"), [
    ("features", {"width": 10**10}), ("features", {"width": 10**10, "mean": None}), ("features", {"dtype": "float64"}),
    ("labels", {"classes": 10**9}), ("labels", {"width": 3}), ("labels", {"dtype": "S3"}),
])
def test_sizes_that_a_manifest_makes_up_are_refused(data, field, changes):
    with edited_manifest(data) as manifest:
        manifest["fields"][field] |= changes
    with pytest.raises(DataError, match=r"fields\.|describes others|cannot be opened"):
        Dataset(data)


@pytest.mark.parametrize("text", ["[]", '{"fields": []}', "[" * 100_000, '{"a": 1}'])
def test_a_run_folder_with_other_things_in_it_is_none(tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(RunError, match="not a run folder"):
        read_data(tmp_path)


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_fuzzed_input_is_refused_or_read(reader):
    found = fuzz.drive(reader, 600, seed=11)
    assert found["read"] + found["refused"] == 600 and found["refused"] > 100, found
