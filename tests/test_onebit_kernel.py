"""1-bit quantization and its sums: what they promise, by whichever side of the kernel that serves here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.onebit import Columns, accumulate_, empty_, quantize_, reference_accumulate_, reference_quantize_

# (first float, shape): unaligned, with padding between some; columns of 1, 7, 31, 32, 33, 40, 64, 129, 2048 and 4099.
PLACES = [
    (3, (5, 40)), (203, (1, 33)), (300, (7, 1)), (310, (3, 2048)), (6500, (2, 31)), (6600, (4, 32)), (6800, (1,)),
    (6801, (3, 7)), (6900, (1, 129)), (7031, (2, 2, 32)), (7161, (1, 4099)),
]  # fmt: skip
COLUMNS = Columns.of(PLACES)
FLOATS = COLUMNS.end + 17
SPECIAL = [float("inf"), float("-inf"), float("nan")]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def made(columns=COLUMNS, seed=1, floats=None):
    """Values and a residual, of the same size; some are 0.0, some -0.0."""
    random = torch.Generator().manual_seed(seed)
    values, residual = (torch.randn(floats or columns.end + 17, generator=random) for _ in range(2))
    for at, zero in ((0, 0.0), (5, -0.0)):
        values[at::11], residual[at::11] = zero, zero
    return values, residual


def row_of(columns):
    return torch.full((columns.packed,), 0x5A5A5A5A, dtype=torch.int32)  # all of it is overwritten


def quantized(act, values, residual, columns=COLUMNS):
    """Whether all is finite, the packed row, and what is left; the values must stay as they are."""
    given, packed = values.clone(), row_of(columns)
    left = None if residual is None else residual.clone()
    finite = act(given, left, columns, packed)
    assert torch.equal(bits(given), bits(values))
    return finite, packed, left


def rows_of(number, columns=COLUMNS, dry=()):
    """Packed rows; those in `dry` hold nothing, and what else is in them must not be read as numbers."""
    rows = torch.empty((number, columns.packed), dtype=torch.int32)
    for k in range(number):
        rows[k] = quantized(reference_quantize_, *made(columns, seed=k + 7), columns)[1]
        if k in dry:
            rows[k].fill_(-1)
            empty_(rows[k])
    return rows


def bits(floats):
    return floats.contiguous().view(torch.int32)


def levels_of(packed, columns=COLUMNS):
    """float32 [C, 2]."""
    return packed[1 : 1 + 2 * columns.count].view(torch.float32).view(-1, 2)


def split(floats, columns=COLUMNS):
    """The columns, one by one."""
    return [floats[start : start + width] for start, width in zip(columns.starts, columns.widths, strict=True)]


# -- laws -------------------------------------------------------------------------------------------------------------


def test_near_to_the_definition_in_float64():
    values, residual = made()
    finite, packed, left = quantized(quantize_, values, residual)
    assert finite and packed[0] == 1
    words = packed[1 + 2 * COLUMNS.count :].tolist()
    for v, (below, above), kept in zip(
        split(values.double() + residual.double()), levels_of(packed), split(left), strict=True
    ):
        high = v >= 0
        for level, chosen in ((below, v[~high]), (above, v[high])):
            assert level.item() == pytest.approx(chosen.mean().item() if len(chosen) else 0.0, rel=1e-5, abs=1e-7)
        torch.testing.assert_close(kept.double(), v - torch.where(high, above, below), rtol=1e-5, atol=1e-6)
        for block in high.split(32):
            assert words.pop(0) & 0xFFFFFFFF == sum(1 << k for k, yes in enumerate(block.tolist()) if yes)
    assert not words
    double, exact = residual.double(), row_of(COLUMNS)
    assert reference_quantize_(values.double(), double, COLUMNS, exact) and double.dtype == torch.float64
    torch.testing.assert_close(left.double(), double, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(levels_of(packed), levels_of(exact), rtol=1e-5, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 100), st.integers(1, 12), st.integers(0, 2**31))
def test_what_was_applied_and_what_is_left_are_what_was_given(rows, width, steps, seed):
    columns = Columns.of([(2, (rows, width))])
    applied, left = torch.zeros(columns.end), torch.zeros(columns.end)
    packed, total = row_of(columns), torch.zeros(columns.end, dtype=torch.float64)
    for step in range(steps):
        values = made(columns, seed=seed + step, floats=columns.end)[0] * 2.0 ** (step % 7)
        assert quantize_(values, left, columns, packed)
        accumulate_(applied, packed[None], columns)
        total += values
    torch.testing.assert_close((applied.double() + left)[2:], total[2:], rtol=1e-5, atol=1e-3)


def test_no_other_levels_have_a_smaller_squared_error():
    values, residual = made()
    packed = quantized(quantize_, values, residual)[1]
    for v, (below, above) in zip(split((values + residual).double()), levels_of(packed).double(), strict=True):
        def error(below, above, v=v):
            return (v - torch.where(v >= 0, above, below)).square().sum().item()

        least, high = error(below, above), int((v >= 0).sum())
        for by in (-1e-3, 1e-3):
            assert error(below + by, above) > least if high < len(v) else error(below + by, above) == least
            assert error(below, above + by) > least if high else error(below, above + by) == least


def test_columns_of_one_sign_and_of_zeros():
    columns = Columns.of([(0, (5, 40))])
    one = torch.rand(40, generator=torch.Generator().manual_seed(1)) + 0.5
    values = torch.cat([one, -one, torch.zeros(40), torch.full((40,), -0.0), torch.full((40,), 3.25)])
    finite, packed, left = quantized(quantize_, values, torch.full((200,), -0.0), columns)
    assert finite
    below, above = levels_of(packed, columns).t()
    mean = one.mean().item()
    assert above.tolist() == pytest.approx([mean, 0, 0, 0, 3.25])
    assert below.tolist() == pytest.approx([0, -mean, 0, 0, 0])
    assert packed[-10:].tolist() == [-1, 255, 0, 0, -1, 255, -1, 255, -1, 255]  # -0.0 is not negative
    assert not left[80:].any() and left[:80].any()


def test_without_a_residual_nothing_is_added_or_kept():
    values, _ = made()
    found, zeros = quantized(quantize_, values, None), quantized(quantize_, values, torch.zeros(FLOATS))
    assert found[0] and zeros[0] and torch.equal(found[1], zeros[1]) and found[2] is None


@pytest.mark.parametrize("act", [quantize_, reference_quantize_])
def test_what_is_not_finite_is_told_wherever_it_is(act):
    for width in (1, 31, 32, 33, 40, 100):
        columns = Columns.of([(5, (3, width))])
        for at in sorted({0, width // 2, width - 1, width, 3 * width - 1}):
            for value in SPECIAL:
                for where in (0, 1):
                    both = made(columns)
                    assert act(both[0], both[1].clone(), columns, row_of(columns))
                    both[where][5 + at] = value
                    assert not act(both[0], both[1].clone(), columns, row_of(columns)), (width, at, value, where)
                    if not where:
                        assert not act(both[0], None, columns, row_of(columns)), (width, at, value)
    largest = torch.finfo(torch.float32).max
    columns = Columns.of([(0, (1, 64))])
    values = torch.zeros(64)
    values[3] = largest
    assert act(values, torch.zeros(64), columns, row_of(columns))
    values[35] = largest  # in the same lane
    assert not act(values, torch.zeros(64), columns, row_of(columns))


@pytest.mark.parametrize(("act", "add"), [(quantize_, accumulate_), (reference_quantize_, reference_accumulate_)])
def test_vectors_cross_exactly(act, add):
    columns = Columns.of([(2, (40,)), (50, ())])
    assert columns.count == 41
    values, residual = made(columns)
    given = values + residual
    finite, packed, left = quantized(act, values, residual, columns)
    out = torch.full_like(values, 7.0)
    add(out, packed[None], columns, fresh=True)
    for inside, was, rest in zip(split(out, columns), split(given, columns), split(left, columns), strict=True):
        assert finite and torch.equal(inside, was) and not rest.any()


def test_padding_is_neither_read_nor_written():
    inside = torch.zeros(FLOATS, dtype=torch.bool)
    for column in split(inside):
        column.fill_(True)
    assert 0 < int((~inside).sum()) < FLOATS
    values, residual = made()
    wanted = quantized(quantize_, values, residual)
    values[~inside], residual[~inside] = float("nan"), float("nan")
    found = quantized(quantize_, values, residual)
    assert found[0] and torch.equal(found[1], wanted[1])
    assert found[2][~inside].isnan().all() and torch.equal(bits(found[2][inside]), bits(wanted[2][inside]))
    for fresh in (False, True):
        for rows in (0, 2):
            out = torch.full((FLOATS,), 7.0)
            out[~inside] = float("nan")
            accumulate_(out, rows_of(rows), COLUMNS, fresh=fresh)
            assert out[~inside].isnan().all() and not out[inside].isnan().any()
            assert (out[inside] == 7.0).all() == (not rows and not fresh)


@pytest.mark.parametrize("dry", [(), (0,), (1, 2), (0, 1, 2, 3, 4, 5)])
def test_sums_are_those_of_rows_that_hold_something(dry):
    rows = rows_of(6, dry=dry)
    held, start = [row[None] for k, row in enumerate(rows) if k not in dry], made(seed=3)[0]
    one_by_one, together = start.clone(), start.clone()
    for row in held:
        accumulate_(one_by_one, row, COLUMNS)
    accumulate_(together, rows, COLUMNS)
    assert torch.equal(bits(together), bits(one_by_one))
    for column in split(one_by_one):
        column.zero_()
    for row in held:
        accumulate_(one_by_one, row, COLUMNS)
    accumulate_(together, rows, COLUMNS, fresh=True)
    assert torch.equal(bits(together), bits(one_by_one))


def test_a_part_of_the_columns_is_as_the_whole():
    values, residual = made()
    _, whole, left = quantized(quantize_, values, residual)
    out = torch.zeros(FLOATS)
    accumulate_(out, whole[None], COLUMNS)
    words = [*COLUMNS.table(torch.device("cpu"))[2].tolist(), COLUMNS.words]
    for first, last in ((0, 1), (3, 7), (4, 19), (17, COLUMNS.count), (0, COLUMNS.count), (5, 5)):
        low, high = COLUMNS.starts[first], COLUMNS.starts[last - 1] + COLUMNS.widths[last - 1] if last > first else 0
        high, part = max(low, high), COLUMNS.part(first, last, low)
        finite, packed, own = quantized(quantize_, values[low:high], residual[low:high], part)
        edge = 1 + 2 * COLUMNS.count
        wanted = [torch.ones(1, dtype=torch.int32), whole[1 + 2 * first : 1 + 2 * last],
                  whole[edge + words[first] : edge + words[last]]]
        assert finite and torch.equal(packed, torch.cat(wanted))
        assert torch.equal(bits(own), bits(left[low:high]))
        partial = torch.zeros(high - low)
        accumulate_(partial, packed[None], part)
        assert torch.equal(bits(partial), bits(out[low:high]))


def test_the_table_is_that_of_the_columns():
    starts, widths, words = COLUMNS.table(torch.device("cpu")).tolist()
    assert (starts, widths) == (COLUMNS.starts, COLUMNS.widths) and COLUMNS.end == starts[-1] + widths[-1]
    assert words == [sum(-(-width // 32) for width in widths[:k]) for k in range(COLUMNS.count)]
    assert COLUMNS.packed == 1 + 2 * COLUMNS.count + words[-1] - (-widths[-1] // 32)
    nothing = Columns.of([(0, (0, 5)), (7, (3, 0))])
    assert nothing.table(torch.device("cpu")).shape == (3, 0) and (nothing.end, nothing.packed) == (0, 1)


def test_no_columns_at_all():
    columns, values = Columns([]), torch.full((5,), float("nan"))
    finite, packed, _ = quantized(quantize_, values, values.clone(), columns)
    assert finite and packed.tolist() == [1]
    accumulate_(values, packed[None], columns, fresh=True)
    assert values.isnan().all()


def test_what_does_not_fit_is_refused():
    values, residual = made()
    packed, rows = row_of(COLUMNS), rows_of(2)
    for wrong in (
        (values[::2], None, COLUMNS, packed), (values, residual[1:], COLUMNS, packed),
        (values, residual.double(), COLUMNS, packed), (values, residual, COLUMNS, packed[1:]),
        (values, residual, COLUMNS, packed.float()), (values[: COLUMNS.end - 1], None, COLUMNS, packed),
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            quantize_(*wrong)
    for wrong in (
        (values[: COLUMNS.end - 1], rows, COLUMNS), (values, rows[:, 1:], COLUMNS), (values, rows.float(), COLUMNS),
        (values, rows.t().contiguous().t(), COLUMNS), (torch.randn(2 * FLOATS)[::2], rows, COLUMNS),
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            accumulate_(*wrong)


def test_rows_may_lie_apart():
    wide = torch.full((3, COLUMNS.packed + 5), -1, dtype=torch.int32)
    rows = wide[:, 2 : 2 + COLUMNS.packed]
    rows.copy_(rows_of(3))
    out, wanted = torch.zeros(FLOATS), torch.zeros(FLOATS)
    accumulate_(out, rows, COLUMNS)
    accumulate_(wanted, rows.contiguous(), COLUMNS)
    assert wanted.any() and torch.equal(out, wanted)


def test_sums_that_begin_at_zero_are_never_minus_zero():
    columns = Columns.of([(0, (1, 40))])
    row = row_of(columns)
    assert quantize_(torch.ones(40), None, columns, row)
    levels_of(row, columns).fill_(-0.0)
    for act in (accumulate_, reference_accumulate_):
        out = torch.full((40,), -0.0)
        act(out, row[None], columns)
        assert bits(out).tolist() == [-(1 << 31)] * 40
        act(out, row[None], columns, fresh=True)
        assert bits(out).tolist() == [0] * 40
