"""The run folder and what goes wrong around it: nothing is locked, blamed or shipped that should not be."""

import json

import pytest
from material import edited_manifest, write_frames, write_recipe

from hpc.records import read_records
from hpc.run import RunError, compare_fields


def test_a_recipe_that_failed_before_learning_anything_can_be_corrected(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    (tmp_path / "validation/labels-00000-of-00003.h5").rename(tmp_path / "away.h5")
    trireme("train", recipe, code=1)
    (tmp_path / "away.h5").rename(tmp_path / "validation/labels-00000-of-00003.h5")
    trireme("train", recipe, "task.width=30")
    assert not (tmp_path / "run/failure.json").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.batch=50", "a multiple of splits = 4"),
        ("validate.metric=frame_eror", "the task has frame_error, loss"),
        ("init_from=nowhere", "'nowhere' is not a run folder"),
        ("schedule={name='steps', at=[1.0], rates=[]}", "give one rate each"),
        ("schedule={name='replay', of='nowhere'}", "not a run folder"),
        ("device=cuda", "torch sees no GPU"),
        ("optim={name='adagrad', learning_rate=0.1, placement='after'}", "set optim.momentum (0.9, say)"),
    ],
)
def test_what_a_recipe_says_wrong_is_said_before_training(trireme, tmp_path, override, words):
    done = trireme("train", write_recipe(tmp_path), override, ranks=2, code=None)
    assert done.returncode != 0 and words in done.stderr, done.stderr
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))


def test_the_failure_names_the_rank_that_failed_and_stays_out_of_other_folders(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    shard = tmp_path / "train/features-00000-of-00003.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    trireme("train", recipe, ranks=2, code=1)
    failure = json.loads((tmp_path / "run/failure.json").read_text())
    assert failure["rank"] == 0 and "damaged" in failure["error"]
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    trireme("train", recipe, f"run={foreign}", code=1)
    assert [p.name for p in foreign.iterdir()] == ["thesis.txt"]


def test_a_model_altered_after_it_was_written_is_not_shipped_nor_used(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    trireme("train", recipe)
    run = tmp_path / "run"
    best = json.loads((run / "success").read_text())["best_step"]
    for model in (run / f"checkpoints/step-{best:09d}/model.safetensors", run / "model.safetensors"):
        content = bytearray(model.read_bytes())
        content[-3] ^= 1
        model.write_bytes(content)
    assert "was altered" in trireme("evaluate", run, tmp_path / "validation", code=1).stderr
    (run / "success").unlink()
    assert "altered" in trireme("train", recipe, code=1).stderr
    assert not (run / "success").exists()


def test_a_torn_newest_checkpoint_and_keep_1_do_not_eat_each_other(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    keep = ("checkpoint.keep=1", "checkpoint.every=240", "checkpoint.keep=3")
    trireme("train", recipe, *keep)
    run = tmp_path / "run"
    digest = json.loads((run / "success").read_text())["sha256"]
    (run / "success").unlink()
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    (last / "manifest.json").unlink()
    trireme("train", recipe, "checkpoint.keep=1", "checkpoint.every=240")
    assert json.loads((run / "success").read_text())["sha256"] == digest


def test_data_of_another_making_is_refused(trireme, tmp_path):
    trireme("train", write_recipe(tmp_path))
    for key, changes in (("names", {"names": list("edcba")}), ("classes", {"classes": 6, "names": list("abcdef")})):
        folder = write_frames(tmp_path / f"other-{key}", seed=4)
        with edited_manifest(folder) as manifest:
            manifest["fields"]["labels"] |= changes
        for command in (("evaluate",), ("predict", "--to", "ark")):
            done = trireme(command[0], tmp_path / "run", folder, *command[1:], ranks=2, code=1)
            assert f"another {key} than the training data" in done.stderr and "--stats-from" in done.stderr
    ours = {"features": {"width": 3, "description": {"source": "audio", "mels": 40}}}
    compare_fields(ours, {"features": {"width": 3, "description": {"source": "kaldi", "mels": 40}}}, "x")
    with pytest.raises(RunError, match="another mels"):
        compare_fields(ours, {"features": {"width": 3, "description": {"source": "audio", "mels": 41}}}, "x")


def test_the_log_holds_every_step_and_says_what_it_resumed_from(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    trireme("train", recipe, "log.every=100000")
    records = read_records(tmp_path / "run")
    trained = [r for r in records if r["event"] == "train"]
    assert len(trained) == 1 and trained[0]["step"] == records[-1]["step"] and trained[0]["loss"] > 0
    assert trained[0]["by_rank"][0]["validate"] > 0
    (tmp_path / "run/success").unlink()
    done = trireme("train", recipe, "log.every=100000", ranks=2)
    assert done.stderr.count("resuming from checkpoint step-") == 1
