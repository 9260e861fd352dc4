"""`trireme bench` on tiny sizes: every line is JSON of the documented shape, and its numbers agree with each other."""

import argparse
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from collectives.comm import Comm
from hpc import bench, bench_onebit
from hpc.bench_allreduce import LEAST_ROUNDS, Setting, settings_of
from hpc.bench_crew import Crew, mpiexec
from hpc.bench_data import PlainReading
from hpc.bench_picture import draw, in_bytes
from hpc.bench_sides import Setup, joined, median
from hpc.bench_train import Side, sides_of
from hpc.hosts import Hosts, missing_rights
from hpc.shards import Dataset
from kernels.onebit import accumulate_, quantize_

TINY = ["--layers", "1", "--width", "16", "--classes", "5", "--batch", "32", "--steps", "2", "--repeat", "2"]

needs_hosts = pytest.mark.skipif(bool(reason := missing_rights()), reason=reason or "pretend hosts can be made")


def launched(*words, fails=False, timeout=300):
    """The records of `trireme bench ...` in a process of its own, and what it said."""
    command = [sys.executable, "-m", "hpc", "bench", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert (done.returncode != 0) == fails, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def of(records, what):
    found = [record for record in records if record["what"] == what]
    assert len(found) == 1, [record["what"] for record in records]
    return found[0]


def check_spread(record, prefix=""):
    low, high = record[f"{prefix}quartiles_s"]
    assert 0 < record[f"{prefix}min_s"] <= low <= record[f"{prefix}median_s"] <= high
    assert record[f"{prefix}repetitions"] > 0


@pytest.fixture(scope="module")
def train_records(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "out.jsonl"
    out.write_text('{"kept": true}\n')
    records, _ = launched("train", *TINY, "--ranks", "1,2", "--precision", "bfloat16", "--out", out)
    kept, *written = [json.loads(line) for line in out.read_text().splitlines()]
    assert kept == {"kept": True} and written == records
    return records


def test_every_side_of_the_training_step_is_measured(train_records):
    assert train_records[0]["what"] == "machine" and train_records[0]["versions"]["torch"]
    assert all(record["bench"] == "train" for record in train_records)
    steps = [record for record in train_records if record["what"] == "step"]
    sides = [(s["impl"], s["ranks"], s.get("splits")) for s in steps]
    assert sides == [
        ("trireme", 1, 1), ("torch loop", 1, None), ("trireme", 1, 2), ("trireme", 2, 2), ("torch loop", 2, None),
        ("torch ddp", 2, None),
    ]
    for step in steps:
        check_spread(step)
        assert step["repetitions"] == 4 and step["batch"] == 32 and step["precision"] == "bfloat16"
        assert step["cpu_s"] > 0
        assert step["parameters"] == 440 * 16 + 16 + 16 * 5 + 5
        assert step["frames_per_s"] == pytest.approx(32 / step["median_s"], rel=1e-3)
        if step["impl"] == "trireme":
            assert min(step[f"{phase}_s"] for phase in ("forward", "backward", "exchange")) > 0 and step["read_s"] >= 0


def test_quotients_of_the_training_step(train_records):
    against = of(train_records, "step against torch loop")
    assert against["pairs"] == 2
    assert min(against[key] for key in ("ratio", "ratio_of_pairs", "cpu_ratio", "cpu_ratio_of_pairs")) > 0
    scaled = of(train_records, "2 ranks against 1")
    assert scaled["splits"] == 2 and min(scaled[key] for key in ("speedup", "limit_speedup")) > 0
    assert not [r for r in train_records if r["what"] == "1 ranks against 1"]
    check_against_ddp(of(train_records, "2 ranks against DDP"))
    assert not [r for r in train_records if r["what"] == "overlap"]


def check_against_ddp(record):
    low, high = record["ratio_quartiles"]
    assert 0 < record["ratio_min"] <= low <= record["ratio_of_pairs"] <= high <= record["ratio_max"]
    assert record["ratio"] == pytest.approx(record["frames_per_s"] / record["ddp_frames_per_s"], rel=1e-3)
    assert record["pairs"] == 2


@needs_hosts
def test_a_training_step_on_two_hosts_with_overlap_and_without():
    records, _ = launched("train", *TINY, "--ranks", "1,2", "--hosts", 2, "--bucket", "4K", timeout=120)
    steps = [(r["impl"], r["ranks"], r.get("overlap")) for r in records if r["what"] == "step"]
    assert steps == [("trireme", 2, "on"), ("trireme", 2, "off"), ("torch ddp", 2, None)]
    check_against_ddp(of(records, "2 ranks against DDP"))
    overlap = of(records, "overlap")
    assert (overlap["hosts"], overlap["link"], overlap["pairs"], overlap["bucket"]) == (2, "1gbit", 2, 4096)
    gain = overlap["without_s"] - overlap["with_s"]
    assert overlap["hidden"] == pytest.approx(gain / overlap["exchange_alone_s"], rel=1e-2, abs=1e-2)
    assert min(overlap[key] for key in ("exchange_alone_s", "backward_s", "exchange_left_s")) > 0


@needs_hosts
def test_sides_tell_what_they_sent_and_what_crossed_their_link():
    frames, size = 4000, {"layers": 1, "width": 64, "classes": 50}
    parameters = 440 * 64 + 64 + 64 * 50 + 50
    powersgd = {0: parameters, 1: 64 + 50 + (440 + 64) + (64 + 50), 4: 64 + 50 + 4 * (440 + 64) + 4 * (64 + 50)}
    with bench.scratch() as folder, Hosts(2) as hosts:
        bench.make_data(folder / "data", frames, classes=50)
        setup = Setup(folder / "data", frames, 32, activation="sigmoid", folder=folder, hosts=hosts, **size)
        sums = {}
        for name, options in (("whole", {}), ("halves", {"double_buffering": True})):
            with setup.trireme(name, 2, 2, {"name": "onebit", **options}) as crew:
                assert len(crew.take(3)[0]) == 3
                steps = joined(crew.take(4))
            sums[name] = [median(steps, way) for way in ("reduce", "share", "float32")]
            assert len(steps) == 4 and sum(sums[name][:2]) <= median(steps, "link_sent") < sum(sums[name][:2]) + 4000
        assert sums["halves"] == [2 * size for size in sums["whole"]]  # a batch is two exchanges there
        assert 8 * sum(sums["whole"][:2]) < sums["whole"][2]
        for rank, floats in powersgd.items():
            with setup.ddp(f"powersgd{rank}", 2, rank) as crew:
                crew.take(4)  # the hook begins
                link = median(joined(crew.take(4)), "link_sent")
            assert 4 * floats <= link < 1.1 * 4 * floats + 6000, rank


def check_all_reduce(records, setting, expected):
    """One line an implementation and size, one summary an algorithm of ours and size, that agree with each other."""
    ranks, hosts, sizes, rounds = setting
    lines = [r for r in records if r["what"] == "all-reduce"]
    assert [(r["impl"], r["algorithm"], r["bytes"]) for r in lines] == [(*e, s) for s in sizes for e in expected]
    for line in lines:
        check_spread(line)
        assert (line["ranks"], line["hosts"], line["repetitions"]) == (ranks, hosts, rounds)
        assert line["link"] == ("1gbit" if hosts > 1 else None) and line["repeats"] >= 1
        assert line["gbps"] == pytest.approx(line["bytes"] / line["median_s"] / 1e9, rel=1e-3)
    found = {(r["impl"], r["algorithm"], r["bytes"]): r for r in lines}
    summaries = [r for r in records if r["what"] == "all-reduce against others"]
    assert len(summaries) == len(sizes) * sum(impl == "trireme" for impl, _ in expected)
    limit, label = ("memcpy", "of_copy_bandwidth") if hosts == 1 else ("tcp", "of_tcp_goodput")
    for summary in summaries:
        size = summary["bytes"]
        ours = found["trireme", summary["algorithm"], size]
        for peer, algorithm in (("mpi", "in place"), ("gloo", "")):
            times = found[peer, algorithm, size]["median_s"] / ours["median_s"]
            assert summary[f"times_{peer}"] == pytest.approx(times, rel=1e-3)
        if hosts == 1:
            share = ours["memory_gbps"] / found[limit, "", size]["memory_gbps"]
            assert ours["memory_gbps"] == pytest.approx(ours["gbps"] * (ranks + 1) / ranks, rel=1e-3)
        else:
            share = 2 * (hosts - 1) / hosts * found[limit, "", size]["median_s"] / ours["median_s"]
        assert summary[label] == pytest.approx(share, rel=1e-3) and summary["pairs"] == rounds
        low, high = summary[f"{label}_quartiles"]
        assert 0 < low <= summary[f"{label}_of_pairs"] <= high


SMALL = ("--sizes", "64K,1K", "--rounds", 2)
PEERS = [("mpi", "in place"), ("gloo", ""), ("memcpy", "")]


def test_all_reduce_on_one_host(tmp_path):
    picture, out = tmp_path / "picture.png", tmp_path / "out.jsonl"
    records, _ = launched("allreduce", *SMALL, "--ranks", 2, "--plot", picture, "--out", out)
    check_all_reduce(records, (2, 1, [1024, 65536], 2), [("trireme", "owners"), *PEERS])
    assert [json.loads(line) for line in out.read_text().splitlines()] == records
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_hosts
def test_all_reduce_on_two_hosts():
    records, _ = launched("allreduce", *SMALL, "--ranks", 2, "--hosts", 2, "--bucket", "16K", timeout=120)
    algorithms = [("trireme", name) for name in ("owners", "everyone", "ring")]
    check_all_reduce(records, (2, 2, [1024, 65536], 2), [*algorithms, *PEERS, ("tcp", "")])
    assert {r["bucket"] for r in records if r.get("impl") == "trireme"} == {16384}


@pytest.mark.mpi(ranks=[2], timeout=60)
def test_a_wrong_sum_is_not_measured():
    from hpc.bench_reducer import PERIOD, Side, check

    comm = Comm()
    given, found = np.zeros(PERIOD + 3, np.float32), np.zeros(PERIOD + 3, np.float32)
    check(comm, Side("copy", "", given, lambda: np.copyto(found, given), found, [comm.rank]))
    assert not given.any() and not found.any()
    with pytest.raises(ValueError, match=f"copy : [0-9]+ of {PERIOD + 3} sums are wrong"):
        check(comm, Side("copy", "", given, lambda: np.copyto(found, given), found, range(2)))

    def all_but_one():
        np.copyto(found, given)
        found[-1] += comm.rank

    with pytest.raises(ValueError, match=": 1 of"):
        check(comm, Side("copy", "", given, all_but_one, found, [comm.rank]))


def test_a_slow_size_gets_fewer_rounds():
    words = ("--sizes", "1K", "--rounds", 50, "--seconds", 1e-6, "--ranks", 2)
    records, _ = launched("allreduce", *words)
    assert {r["repetitions"] for r in records if r["what"] == "all-reduce"} == {LEAST_ROUNDS}


def test_what_is_measured_where():
    one, two = (1, None), (2, "1gbit")
    assert settings_of(None, None, "1gbit") == [Setting(k, *where) for where in (one, two) for k in (2, 4)]
    assert settings_of([2, 4], [1, 2], "1gbit") == [Setting(k, *where) for where in (one, two) for k in (2, 4)]
    assert settings_of(None, [3], "9mbit") == [Setting(3, 3, "9mbit")]


def test_a_picture_of_anything_that_was_measured():
    line = {"what": "all-reduce", "impl": "trireme", "algorithm": "ring", "ranks": 3, "hosts": 3, "link": "1gbit"}
    lines = [line | {"bytes": size, "gbps": 0.1} for size in (1024, 4096)]
    plain = [{**lines[0], "impl": "memcpy", "algorithm": "", "hosts": 1, "link": None, "gbps": 9.0}]
    assert len({draw(found) for found in ([], lines, lines + plain)}) == 3
    assert (in_bytes(1 << 20), in_bytes(100)) == ("1 MiB", "100 B")


def test_a_layer_of_sru(tmp_path):
    words = ["sru", "--d", "8,16", "--length", "5", "--batch", "2", "--threads", "1", "--rounds", "2"]
    records, said = launched(*words, "--plot", str(tmp_path / "sru.png"))
    assert (tmp_path / "sru.png").read_bytes().startswith(b"\x89PNG")
    layers = [record for record in records if record["what"] == "layer"]
    kinds = {(r["d"], r["dtype"], r["pass"]) for r in layers}
    assert len(kinds) == 8 and "4 of 4: d 16, length 5, batch 2, 1 thread, bfloat16" in said
    for record in layers:
        check_spread(record)
    for d, dtype, which in kinds:
        here = {r["layer"]: r["median_s"] for r in layers if (r["d"], r["dtype"], r["pass"]) == (d, dtype, which)}
        assert {"sru", "conv2", "conv3", "product", "copy"} <= set(here)
        assert "lstm" in here or (f"torch's LSTM is left out, in {dtype}" in said and dtype == "bfloat16")
        quotients = [r for r in records if r["what"] == "sru against others"]
        mine = next(r for r in quotients if (r["d"], r["dtype"], r["pass"]) == (d, dtype, which))
        if "lstm" in here:
            assert mine["times_lstm"] == pytest.approx(here["lstm"] / here["sru"], rel=1e-3)
        assert mine["times_conv2"] == pytest.approx(here["conv2"] / here["sru"], rel=1e-3)
        assert mine["of_product_and_pass"] > 0


def test_onebit_kernels(tmp_path):
    out = tmp_path / "out.jsonl"
    words = ("--sizes", "3x40,1x100", "--splits", 3, "--threads", "1,2", "--rounds", 3, "--mib", 0)
    records, said = launched("onebit", *words, "--out", out)
    assert [json.loads(line) for line in out.read_text().splitlines()] == records
    assert "4 of 4: 1 x 100, 2 threads" in said
    kernels = {"quantize": (3, 0), "accumulate": (2, 1), "accumulate fresh": (1, 3)}  # passes over floats, splits
    lines = [record for record in records if record["what"] == "1-bit"]
    for rows, width, words in ((3, 40, 2), (1, 100, 4)):
        for threads in (1, 2):
            for kernel, (passes, splits) in kernels.items():
                setting = {"kernel": kernel, "rows": rows, "width": width, "threads": threads}
                here = [line for line in lines if line.items() >= setting.items()]
                found = {line["impl"]: line for line in here}
                assert [line["impl"] for line in here] == ["trireme", "copy", "numpy", "torch"]
                bits = (1 + 2 * rows + rows * words) * max(1, splits)
                for line in here:
                    check_spread(line)
                    assert (line["repetitions"], line["splits"], line["sets"]) == (3, splits, 1)
                    assert line["bytes"] == 4 * (passes * rows * width + bits)
                    assert line["gbps"] == pytest.approx(line["bytes"] / line["median_s"] / 1e9, rel=1e-3)
                    assert line["copy_gbps"] == found["copy"]["gbps"]
                summary, = (r for r in records if r["what"] == "1-bit against others" and r.items() >= setting.items())
                median = {impl: line["median_s"] for impl, line in found.items()}
                assert summary["of_copy_bandwidth"] == pytest.approx(median["copy"] / median["trireme"], rel=1e-3)
                for peer in ("numpy", "torch"):
                    assert summary[f"times_{peer}"] == pytest.approx(median[peer] / median["trireme"], rel=1e-3)
                assert summary["pairs"] == 3
    assert len(lines) == 2 * 2 * 3 * 4


def test_numpys_side_does_the_same():
    size = bench_onebit.Size(3, 40)
    arrays, = bench_onebit.make_sets(size, 1, 0)
    left = arrays.other.clone().view(size).numpy()
    below, above, bits = bench_onebit.numpy_quantize(arrays.values.view(size).numpy(), left)
    assert quantize_(arrays.values, arrays.other, size.columns, arrays.packed[0])
    np.testing.assert_allclose(left.ravel(), arrays.other.numpy(), rtol=1e-5, atol=1e-6)
    found = np.zeros((3, 40), np.float32)
    bench_onebit.numpy_accumulate(found, [(below, above, bits)] * 2, fresh=True)
    bench_onebit.numpy_accumulate(found, [(below, above, bits)], fresh=False)
    total = torch.zeros(120)
    for _ in range(3):
        accumulate_(total, arrays.packed, size.columns)
    np.testing.assert_allclose(found.ravel(), total.numpy(), rtol=1e-5)
    assert below.dtype == above.dtype == np.float32 and bits.shape == (3, 5)


def test_working_sets_are_larger_than_the_cache():
    assert bench_onebit.last_cache() >= 1 << 16
    assert len(bench_onebit.make_sets(bench_onebit.Size(4, 64), 1, 8 * 256 * 3)) == 3
    assert len(bench_onebit.make_sets(bench_onebit.Size(4, 64), 1, 0)) == 1


def test_wrong_bits_are_not_measured(monkeypatch):
    def wrong(values, residual, columns, packed):
        quantize_(values, residual, columns, packed)
        packed[-1] ^= 1

    size = bench_onebit.Size(3, 40)
    arrays, = bench_onebit.make_sets(size, 2, 0)
    bench_onebit.check(size, arrays)
    monkeypatch.setattr(bench_onebit, "quantize_", wrong)
    with pytest.raises(ValueError, match="3 x 40: 1 of 13 of the packed row differ"):
        bench_onebit.check(size, arrays)


def test_data(tmp_path):
    bench.make_data(tmp_path / "set", 30_000, classes=7, shards=3)
    words = ("--split-frames", 6000, "--batch", 500, "--repeat", 3, "--steps", 2)
    records, _ = launched("data", "--data", tmp_path / "set", *words)
    assert [r["what"] for r in records] == ["machine", "load split", "shuffle and stack", "waiting", "waiting"]
    load = of(records, "load split")
    assert load["rows"] == 6000 and load["bytes"] == 6000 * (40 * 4 + 4) and load["data_rows"] >= 30_000
    for prefix, speed in (("", "gbps"), ("limit_", "limit_gbps")):
        check_spread(load, prefix)
        assert load[speed] == pytest.approx(load["bytes"] / load[f"{prefix}median_s"] / 1e9, rel=1e-3)
    assert load["ratio"] == pytest.approx(load["gbps"] / load["limit_gbps"], rel=1e-3)
    assert min(load[f"cpu_ratio{kind}"] for kind in ("", "_of_pairs", "_of_minima")) > 0
    stack = of(records, "shuffle and stack")
    check_spread(stack)
    assert stack["bytes"] == 500 * 11 * 40 * 4 and stack["shuffle_s_per_batch"] > 0
    for waiting in records[-2:]:
        assert 0 < waiting["share"] < 1 and waiting["repetitions"] == 2
        assert waiting["read_s"] >= waiting["longest_read_s"] > 0


def test_generated_data_is_a_data_set(tmp_path):
    bench.make_data(tmp_path, 5000, width=6, classes=4, shards=2)
    dataset = Dataset(tmp_path)
    for shard in range(2):
        dataset.verify(shard)
    assert 5000 <= dataset.rows == dataset.manifest["frames"] < 5600
    lengths = np.diff(dataset.starts)
    assert lengths.min() >= 200 and lengths.max() <= 600
    labels = np.empty(dataset.rows, np.int32)
    dataset.read("labels", 0, dataset.rows, labels)
    assert set(labels) == {0, 1, 2, 3}
    dataset.close()


def test_plain_reading_reads_the_same_rows_across_shards(tmp_path):
    bench.make_data(tmp_path, 4000, width=5, classes=9, shards=3)
    dataset = Dataset(tmp_path)
    low, high = int(dataset.shard_rows[1]) - 70, int(dataset.shard_rows[2]) + 31
    blocks = PlainReading(dataset)(low, high)
    for field, shape in (("features", (high - low, 5)), ("labels", (high - low,))):
        expected = np.empty(shape, dataset.field(field)["dtype"])
        dataset.read(field, low, high, expected)
        found = np.concatenate([block for block in blocks if block.ndim == len(shape)])
        np.testing.assert_array_equal(found, expected)
    dataset.close()


def test_sides_share_the_splits_of_the_largest_number_of_ranks():
    assert sides_of([1]) == [Side(1, 1), Side(1, 0)]
    assert [s for s in sides_of([2, 4]) if s.splits][1:] == [Side(1, 4), Side(2, 4), Side(4, 4)]
    assert {s.ranks for s in sides_of([1, 2, 3, 6], 3)} == {3, 6}


def test_quotients():
    found = bench.quotient([2.0, 4.0, 60.0], [1.0, 1.0, 6.0])
    assert found == {
        "ratio": 4.0, "ratio_of_pairs": 4.0, "ratio_of_minima": 2.0, "ratio_quartiles": [3.0, 7.0],
        "ratio_doubt": "quartiles 3 and 7",
    }
    assert bench.quotient([2.0, 4.0], [1.0, 2.0])["ratio_doubt"] == "2 pairs only"
    steady = bench.quotient([2.0, 2.2, 2.1, 2.0], [1.0, 1.0, 1.0, 1.0], "times")
    assert not [key for key in steady if key.endswith("doubt")] and steady["times_quartiles"] == [2.0, 2.125]


def test_ratios_that_say_nothing_are_not_left_uncommented(monkeypatch, capsys):
    """Records as they come from measurements, of which only the first is steady."""
    def measure(arguments):
        yield {"what": "calm", **bench.quotient([2.0, 2.1, 2.0], [1.0, 1.0, 1.0])}
        yield {"what": "wild", **bench.quotient([2.0, 9.0, 80.0], [1.0, 1.0, 1.0], "times_mpi")}

    monkeypatch.setattr("hpc.bench_allreduce.measure", measure)
    assert bench.run(argparse.Namespace(benchmark="allreduce", out=None)) == 0
    printed = capsys.readouterr()
    assert "too uncertain to be quoted: times_mpi (quartiles 5.5 and 44.5)" in printed.err
    assert "1 of 2 ratios say nothing" in printed.err and "quiet" in printed.err
    assert [json.loads(line).get("times_mpi_doubt") for line in printed.out.splitlines()][1:] == [
        None, "quartiles 5.5 and 44.5"]


@pytest.mark.parametrize("words, said", [
    (["train", "--ranks", "2,3"], "divide the largest"),
    (["train", "--ranks", "1,2", "--batch", "33"], "multiple of 2 ranks"),
    (["train", "--hosts", "3", "--batch", "32"], "none is a multiple of 3 hosts"),
    (["allreduce", "--ranks", "1"], "1 rank on 1 host: give two ranks or more"),
    (["allreduce", "--ranks", "3", "--hosts", "2"], "a multiple of the hosts"),
    (["allreduce", "--sizes", "1K,3"], "a multiple of 4 bytes"),
    (["allreduce", "--sizes", "many"], "not a size such as"),
    (["allreduce", "--sizes", "60000G", "--ranks", "2"], "--sizes: 60,000 GiB take 600,000 GiB of memory on 2 ranks"),
    (["allreduce", "--link", "fast"], "--link: 'fast' is not a rate such as 100mbit or 1gbit"),
    (["train", "--link", "1kbit"], "--link: '1kbit' is not a rate"),
    (["allreduce", "--ranks", "two"], "not a list of numbers such as 1,2,4"),
    (["allreduce", "--hosts", "2,100"], "'2,100': this machine can pretend to be 1 to 64 hosts"),
    (["train", "--hosts", "1,2"], "one number of hosts at a time"),
    (["allreduce", "--rounds", "1.5"], "'1.5' is not a whole number above 0"),
    (["allreduce", "--seconds", "nan"], "not above 0"),
    (["allreduce", "--bucket", "1"], "not a size such as 4K"),
    (["allreduce", "--plot", "nowhere/x.png"], "there is no folder 'nowhere'"),
    (["allreduce", "--plot", "x.jpg"], "end it in .png"),
    (["sru", "--precision", "float8"], "'float8' is not a precision"),
    (["onebit", "--sizes", "2048"], "'2048' is not a list of sizes such as 2048x2048"),
    (["onebit", "--sizes", "0x5"], "not a list of sizes"),
    (["onebit", "--mib", "-1"], "'-1' is not a whole number from 0 on"),
    (["sru", "--d", "0"], "every number must be above 0"),
    (["data", "--out", "."], "'.' is a folder"),
    (["data", "--gb", "0"], "not above 0"),
    (["data", "--data", "nowhere"], "not a data set"),
])
def test_mistakes_are_explained(words, said):
    records, errors = launched(*words, fails=True)
    assert said in errors and not [r for r in records if r["what"] != "machine"]


@pytest.mark.parametrize("rate", ["1gbit", "100mbit", "2.5Gbit", "100kbit", "1tbit"])
def test_rates_that_a_link_can_have(rate):
    parser = argparse.ArgumentParser()
    bench.allreduce_arguments(parser)
    assert parser.parse_args(["--link", rate]).link == rate


def test_workers_that_end_by_themselves_are_reported(tmp_path):
    spec = {"recipe": {"run": str(tmp_path / "run"), "data": {"train": str(tmp_path)}, "task": {"name": "frames"}}}
    with bench.scratch() as folder, pytest.raises(OSError, match="'broken' ended with exit code"):
        Crew("broken", 1, "hpc.bench_worker", spec, folder=folder)


def test_help_shows_examples_and_a_launcher_is_found():
    assert mpiexec()
    for words in (["--help"], ["data", "--help"], ["train", "--help"], ["allreduce", "--help"], ["onebit", "--help"]):
        command = [sys.executable, "-m", "hpc", "bench", *words]
        assert "examples:" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
