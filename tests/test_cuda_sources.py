"""CUDA sources without a GPU: compiled for several generations of them, and run on the CPU."""

from __future__ import annotations

import subprocess
import sys

import cuda_on_cpu
import numpy as np
import pytest
import torch
from test_kernels import SQUARED

from kernels import compile as command
from kernels import gpu, update
from kernels.update import SLOTS, Constants, reference

compiles = pytest.mark.skipif(bool(gpu.compiler_missing()), reason=gpu.compiler_missing())
runs = pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=cuda_on_cpu.missing())

WRONG = 'extern "C" __global__ void wrong(float* x) { x[0] = nothing; }'
GREEDY = """
extern "C" __global__ void __launch_bounds__(1024, 2) greedy(float* x) {
    float own[80];
    for (int i = 0; i < 80; ++i) own[i] = x[i * 32 + threadIdx.x];
    __syncthreads();
    for (int k = 0; k < 8; ++k) for (int i = 0; i < 80; ++i) own[i] = own[i] * own[(i + k) % 80] + 1.0f;
    for (int i = 0; i < 80; ++i) x[i * 32 + threadIdx.x] = own[i];
}
extern "C" __global__ void indexed(float* x, int n) {
    __shared__ float all[64];
    float own[1000];
    for (int i = 0; i < n; ++i) own[i * 7 % 1000] = x[i];
    all[threadIdx.x] = own[n];
    __syncthreads();
    x[threadIdx.x] = all[n];
}
extern "C" __global__ void modest(float* x) { x[0] = 1.0f; }
"""


# -- compiled for GPUs ------------------------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize("architecture", command.ARCHITECTURES)
def test_every_source_compiles_and_nothing_spills(architecture):
    assert "update.cu" in command.sources()
    for source in command.sources():
        found = gpu.compiled(source, architecture)
        assert found, source
        for kernel in found:
            assert 0 < kernel.registers <= 255, kernel
            assert not kernel.spills, kernel
    assert {k.function for k in gpu.compiled("update.cu", architecture)} == {f"trireme_{rule}" for rule in SLOTS}
    both = {f"trireme_onebit_{name}" for name in ("quantize", "accumulate")}
    assert {k.function for k in gpu.compiled("onebit.cu", architecture)} == both
    both = {"trireme_block", "trireme_departure"}
    assert {k.function for k in gpu.compiled("block.cu", architecture)} == both


@compiles
def test_errors_and_spills_are_found(tmp_path, capsys):
    wrong, greedy = tmp_path / "wrong.cu", tmp_path / "greedy.cu"
    wrong.write_text(WRONG)
    greedy.write_text(GREEDY)
    with pytest.raises(ValueError, match=r'(?s)wrong\.cu does not compile for sm_80:.*"nothing" is undefined'):
        gpu.compiled(wrong, "sm_80")
    with pytest.raises(ValueError, match="does not compile for sm_1234"):
        gpu.compiled("update.cu", "sm_1234")
    found = {kernel.function: kernel for kernel in gpu.compiled(greedy, "sm_80")}
    assert found["greedy"].spilled and found["greedy"].registers == 32
    assert found["indexed"].stack == 4000 and found["indexed"].shared == 256 and not found["indexed"].spilled
    assert [kernel.spills for kernel in found.values()] == [True, True, False]  # by name
    assert command.main([str(wrong), str(greedy), "absent.cu", "--architectures", "sm_80"]) == 1
    told = capsys.readouterr()
    assert "wrong.cu does not compile" in told.err and "absent.cu" in told.err and "modest spills" not in told.err
    assert "greedy.cu: greedy spills on sm_80" in told.err and "greedy.cu: indexed spills on sm_80: 4000" in told.err
    assert "modest" in told.out


@compiles
def test_the_command_shows_a_table():
    words = [sys.executable, "-m", "kernels.compile", "update.cu", "--architectures", "sm_75,sm_90"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("trireme_adam ") == 2 and "registers" in done.stdout and "sm_90" in done.stdout


def test_the_command_says_what_to_install(tmp_path):
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text("raise ImportError('libfoo.so: cannot open')\n")
    done = subprocess.run(
        [sys.executable, "-m", "kernels.compile"], env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "libfoo.so" in done.stderr and "pip install 'trireme[kernels]'" in done.stderr
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0


def test_a_changed_header_is_another_source(tmp_path, monkeypatch):
    """CuPy keeps what it compiled under the text of the source alone."""
    monkeypatch.setattr(gpu, "SOURCES", tmp_path)
    (tmp_path / "one.cu").write_text('#include "one.h"\n')
    (tmp_path / "one.h").write_text("#define ONE 1\n")
    before = gpu._code(tmp_path / "one.cu")
    (tmp_path / "one.h").write_text("#define ONE 2\n")
    assert before.startswith('#include "one.h"\n') and gpu._code(tmp_path / "one.cu") != before


def test_arguments_are_addresses_and_numpy_scalars():
    packed = np.zeros(1, [("a", np.float32), ("b", np.int32)])[0]
    found = gpu.by_value([7, np.int64(-1), np.float32(0.5), packed])
    assert [value.itemsize for value in found] == [8, 8, 4, 8] and all(value.size == 1 for value in found)
    for unfit in (0.5, None, np.zeros(3)):
        with pytest.raises(TypeError, match="addresses"):
            gpu.by_value([unfit])


# -- the CPU in the GPU's place ---------------------------------------------------------------------------------------

BLOCK_SUM = """
extern "C" __global__ void block_sum(const float* x, float* out, int count) {
    __shared__ float of_warp[32];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    float sum = i < count ? x[i] : 0.0f;
    for (int by = 16; by; by /= 2) sum += __shfl_down_sync(0xffffffffu, sum, by);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    BARRIER
    if (threadIdx.x < 32) {
        sum = threadIdx.x < blockDim.x / 32 ? of_warp[threadIdx.x] : 0.0f;
        for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
        if (threadIdx.x == 0) out[blockIdx.x] = sum;
    }
}
"""
MANY = """
#define WARP 0xffffffffu
extern "C" __global__ void votes(const float* x, unsigned* out) {
    const unsigned found = __ballot_sync(WARP, x[threadIdx.x] > 0.0f);
    if (threadIdx.x % 32 == 5) out[threadIdx.x / 32] = found;
}
extern "C" __global__ void lanes(int* out) {
    const int t = threadIdx.x, l = t % 32;
    out[t] = __shfl_sync(WARP, t, l + 1, 8);
    out[t + 64] = __shfl_up_sync(WARP, t, 3, 16);
    if (l < 16) out[t + 128] = __shfl_xor_sync(0x0000ffffu, t, 1);
    else out[t + 128] = __shfl_down_sync(0xffff0000u, t, 2);
    out[t + 192] = __any_sync(WARP, l == 3) + 2 * __all_sync(WARP, l < 32) + 4 * __all_sync(WARP, l == 3);
}
extern "C" __global__ void atomics(int* of_int, float* of_float) {
    atomicAdd(of_float, 0.5f);
    atomicAdd(of_int, 1);
    atomicOr(of_int + 1, 1 << threadIdx.x % 32);
    atomicMax(of_int + 2, (int)(blockIdx.y * 100 + threadIdx.y));
}
extern "C" __global__ void turned(const float* x, float* out) {
    extern __shared__ __align__(16) float held[];
    held[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = held[blockDim.x - 1 - threadIdx.x];
}
extern "C" __global__ void apart(float* out) {
    if (threadIdx.x < 16) __syncthreads();
    out[threadIdx.x] = 1.0f;
    if (threadIdx.x >= 16)
        __syncthreads();
}
"""


def built(text, folder, name="one.cu"):
    (folder / name).write_text(text)
    return cuda_on_cpu.build(folder / name, folder)


@runs
def test_barriers_and_shuffles(tmp_path):
    library = built(BLOCK_SUM.replace("BARRIER", "__syncthreads();"), tmp_path)
    values = torch.arange(1000, dtype=torch.float32)
    for threads in (32, 64, 256, 1024):
        blocks = -(-1000 // threads)
        for descending in (False, True):
            out = torch.full((blocks,), -1.0)
            arguments = (values.data_ptr(), out.data_ptr(), np.int32(1000))
            library.launch("block_sum", blocks, threads, arguments, descending)
            assert torch.equal(out, torch.stack([part.sum() for part in values.split(threads)])), (threads, descending)


@runs
def test_a_barrier_left_out_shows_in_the_order_of_threads(tmp_path):
    library = built(BLOCK_SUM.replace("BARRIER", ""), tmp_path)
    values, found = torch.arange(1, 1025, dtype=torch.float32), []
    for descending in (False, True):
        out = torch.zeros(4)
        library.launch("block_sum", 4, 256, (values.data_ptr(), out.data_ptr(), np.int32(1024)), descending)
        found.append(out)
    assert not torch.equal(*found)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return built(MANY, tmp_path_factory.mktemp("many"))


@runs
@pytest.mark.parametrize("descending", [False, True])
def test_votes_lanes_and_atomics(many, descending):
    assert many.functions == ("votes", "lanes", "atomics", "turned", "apart")
    x = torch.randn(80, generator=torch.Generator().manual_seed(1))  # two warps and a half
    out = torch.zeros(3, dtype=torch.int32)
    many.launch("votes", 1, 80, (x.data_ptr(), out.data_ptr()), descending)
    wanted = [sum(1 << lane for lane, value in enumerate(part) if value > 0) for part in x.split(32)]
    assert out.numpy().view(np.uint32).tolist() == wanted
    lanes = torch.zeros(256, dtype=torch.int32)
    many.launch("lanes", 1, 64, (lanes.data_ptr(),), descending)
    t = np.arange(64)
    halves = np.where(t % 32 < 16, t ^ 1, np.where(t % 32 < 30, t + 2, t))
    upwards = np.where(t % 16 >= 3, t - 3, t)
    wanted = np.concatenate([t // 8 * 8 + (t + 1) % 8, upwards, halves, np.full(64, 3)])
    assert lanes.tolist() == wanted.tolist()
    of_int, of_float = torch.zeros(3, dtype=torch.int32), torch.zeros(1)
    many.launch("atomics", (2, 3), (4, 5), (of_int.data_ptr(), of_float.data_ptr()), descending)
    assert of_int.tolist() == [120, 15, 204] and of_float.item() == 60.0


@runs
def test_what_would_be_undefined_is_refused(many, tmp_path):
    x, out = torch.arange(64.0), torch.zeros(64)
    both = (x.data_ptr(), out.data_ptr())
    many.launch("turned", 2, 64, both, shared=256)
    assert torch.equal(out, x.flip(0))
    with pytest.raises(ValueError, match="turned: bytes of shared memory written: expected 128, got 129"):
        many.launch("turned", 2, 64, both, shared=128)
    with pytest.raises(ValueError, match="apart: threads of a block wait for each other"):
        many.launch("apart", 1, 32, both[1:])
    with pytest.raises(ValueError, match="turned: number of arguments: expected 2, got 1"):
        many.launch("turned", 1, 64, both[:1], shared=256)
    with pytest.raises(ValueError, match="turned: bytes of argument 1: expected 8, got 4"):
        many.launch("turned", 1, 64, (both[0], np.int32(1)), shared=256)
    with pytest.raises(ValueError, match=r"(?s)wrong_on_cpu\.cpp does not compile.*nothing.* was not declared"):
        built(WRONG, tmp_path, "wrong.cu")
    with pytest.raises(ValueError, match=r"expected kernels.*got \[\]"):
        built("__global__ void mangled() {}", tmp_path)


# -- update.cu --------------------------------------------------------------------------------------------------------

CONSTANTS = Constants(1 / 96, 1e-3, 0.999, 0.1, 0.9, 0.1, 0.995, 0.005, 1.7, 1e-4)


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    return cuda_on_cpu.build("update.cu", tmp_path_factory.mktemp("update"))


def updated(library, rule, tensors, blocks, threads, descending):
    """Whether the kernel of a rule finds all of the gradient finite, as `update._cuda` would launch it."""
    bad = torch.zeros(1, dtype=torch.int32)
    pointers = [t.data_ptr() for t in tensors] + [0] * (4 - len(tensors))
    arguments = (*pointers, np.int64(tensors[0].numel()), update._packed(CONSTANTS)[0], bad.data_ptr())
    library.launch(f"trireme_{rule}", blocks, threads, arguments, descending)
    assert bad.item() in (0, 1)
    return not bad.item()


def made(rule, size):
    """Weights, gradient and state."""
    random = torch.Generator().manual_seed(1)
    weights, grad = (torch.randn(size, generator=random) for _ in range(2))
    return [weights, grad * 30, *[torch.rand(size, generator=random) for _ in range(SLOTS[rule])]]


@runs
@pytest.mark.parametrize("rule", SLOTS)
def test_the_same_bits_as_the_reference(updates, rule):
    assert set(updates.functions) == {f"trireme_{rule}" for rule in SLOTS}
    for size in (0, 1, 1000):
        wanted = made(rule, size)
        assert reference(rule, wanted[0], wanted[1], wanted[2:], CONSTANTS)
        for blocks, threads in ((1, 1), (1, 64), (3, 128), (8, 128), (1, 256)):
            for descending in (False, True):
                found = made(rule, size)
                assert updated(updates, rule, found, blocks, threads, descending)
                assert all(map(torch.equal, found, wanted)), (size, blocks, threads, descending)


@runs
@pytest.mark.parametrize("rule", SLOTS)
def test_a_gradient_that_is_not_finite_is_told(updates, rule):
    for value in (float("inf"), float("-inf"), float("nan")):
        for at in (0, 500, 999):
            tensors = made(rule, 1000)
            tensors[1][at] = value
            assert not updated(updates, rule, tensors, 2, 128, at == 500), (value, at)
    largest = made(rule, 1000)
    largest[1][:] = torch.finfo(torch.float32).max
    assert updated(updates, rule, largest, 2, 128, False) == (rule not in SQUARED), "state that overflows is told, too"
