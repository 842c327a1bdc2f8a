"""Sums of rows: right, added to what was there, and blind to other rows."""

from __future__ import annotations

import torch
from interpreted import run_interpreted


def check_sums() -> None:
    from regmix_kernels import by_reference, row_sums

    values = torch.randn(3, 2500, generator=torch.Generator().manual_seed(0)) * 1e3
    sums = torch.full((3,), 7.0, dtype=torch.float64)
    expected = sums.clone()
    row_sums.add_row_sums(values, sums)
    by_reference.add_row_sums(values, expected)
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-9)
    alone = torch.full((1,), 7.0, dtype=torch.float64)
    row_sums.add_row_sums(values[1:2], alone)
    assert torch.equal(alone[0], sums[1])
    values[0, 17] = float("nan")
    again = torch.full((3,), 7.0, dtype=torch.float64)
    row_sums.add_row_sums(values, again)
    assert again[0].isnan()
    assert torch.equal(again[1:], sums[1:])


def test_row_sums_are_right_and_independent_of_other_rows() -> None:
    run_interpreted(check_sums)
