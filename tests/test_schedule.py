"""Learning-rate policies against sequences worked out by hand, and where validations and ends fall."""

import json

import pytest

from hpc.schedule import Constant, Decay, Halving, Newbob, Replay, Schedule, Steps


def walk(policy, losses, per_epoch=10, every=0):
    """(rate used, verdict) of each validation until the schedule stops."""
    schedule, at, seen = Schedule(policy, per_epoch, every), 0, []
    for loss in losses:
        rate = schedule.rate(at).learning_rate
        at = schedule.next_judgement(at)
        seen.append((rate, schedule.judge(at, loss)))
        schedule = copied(schedule, policy)
        if schedule.stopped:
            break
    return seen, schedule


def copied(schedule, policy):
    """Through JSON and into a fresh object, as a resume does."""
    state = json.loads(json.dumps(schedule.state()))
    fresh = Schedule(policy, schedule.per_epoch, schedule.every)
    fresh.restore(state)
    return fresh


def test_halving_is_algorithm_1_of_paper_000():
    # improvements: big, big, small (halve), small again (stop); min_improvement 1.003
    seen, schedule = walk(Halving(0.1), [2.0, 1.5, 1.499, 1.498, 9.9])
    assert seen == [(0.1, "continue"), (0.1, "continue"), (0.1, "halve"), (0.05, "stop")]
    assert schedule.stopped == "schedule"


def test_halving_goes_on_halving_every_epoch_while_progress_is_large():
    seen, _ = walk(Halving(0.1), [2.0, 1.9999, 1.5, 1.2, 1.1999])
    assert seen == [(0.1, "continue"), (0.1, "halve"), (0.05, "halve"), (0.025, "halve"), (0.0125, "stop")]


def test_a_model_that_stayed_is_no_result_and_halves_the_rate():
    """All that was learned was thrown away: Algorithm 1 would take the same loss twice for the end."""
    schedule = Schedule(Halving(0.1), 10)
    verdicts = [schedule.judge(10 * k, loss, stayed) for k, (loss, stayed) in enumerate(
        [(2.0, False), (2.0, True), (2.0, True), (1.5, False), (1.499, False)], 1
    )]
    assert verdicts == ["continue", "halve", "halve", "continue", "halve"] and not schedule.stopped
    patient = Schedule(Constant(0.1, patience=2), 10)
    assert [patient.judge(10 * k, 1.0, stayed=k > 1) for k in range(1, 7)] == ["continue", *["halve"] * 5]
    assert not patient.stopped, "one that waits for a smaller rate is not without progress"
    assert copied(schedule, Halving(0.1)).rate(50).learning_rate == pytest.approx(0.1 / 8)


def test_newbob_rolls_back_a_worse_model_and_halves():
    seen, schedule = walk(Newbob(1.0), [2.0, 1.0, 1.2, 0.95, 0.9499])
    assert seen == [(1.0, "continue"), (1.0, "continue"), (1.0, "roll back"), (0.5, "halve"), (0.25, "stop")]
    assert schedule.best == 0.9499


def test_newbob_waits_for_min_epochs():
    seen, _ = walk(Newbob(1.0, min_epochs=5), [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert [v for _, v in seen] == ["continue", "halve", "halve", "halve", "stop"]


def test_listed_steps():
    policy = Steps(0.1, at=[1.0, 2.5], rates=[0.05, 0.01], epochs=4)
    schedule = Schedule(policy, per_epoch=10)
    assert [schedule.rate(at).learning_rate for at in (0, 9, 10, 24, 25, 39)] == [0.1, 0.1, 0.05, 0.05, 0.01, 0.01]
    with pytest.raises(ValueError, match="one rate each"):
        Steps(0.1, at=[1.0], rates=[])


def test_replay_uses_the_recorded_rates_and_then_the_last():
    seen, _ = walk(Replay(9.0, [0.4, 0.2], of="x"), [3, 2, 1])
    assert [r for r, _ in seen] == [0.4, 0.2, 0.2]


def test_early_stop_counts_validations_without_a_new_best():
    _, schedule = walk(Constant(0.1, patience=2, epochs=9), [3.0, 2.0, 2.5, 2.0, 1.0])
    assert schedule.stopped == "early stop" and schedule.validations == 4 and schedule.best_at == 20


def test_validations_fall_on_multiples_or_epochs_and_on_the_last_step():
    epochs = Schedule(Constant(0.1, epochs=3), per_epoch=10)
    assert [epochs.next_judgement(at) for at in (0, 9, 10, 29)] == [10, 10, 20, 30]
    often = Schedule(Constant(0.1, epochs=2), per_epoch=10, every=6)
    assert [often.next_judgement(at) for at in (0, 6, 13, 18)] == [6, 12, 18, 20]
    assert Schedule(Constant(0.1), 10).rate(25).epoch == 2


def test_decay_begins_after_its_epochs():
    policy = Decay(1.0, factor=0.5, after=2, epochs=9)
    assert [policy.rate(progress, 0) for progress in (0, 1.99, 2, 2.99, 3)] == [1, 1, 0.5, 0.5, 0.25]
