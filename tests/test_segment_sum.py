"""Sums of rows by id, and the embedding that needs them: values, order, edges, stacks."""

from __future__ import annotations

import torch
from interpreted import run_interpreted
from kernel_checks import (
    assert_close,
    assert_same_bits,
    normal,
    poison_new_memory,
    poisoned,
    strided,
)
from regmix_kernels import reference

DTYPES = (torch.float32, torch.float16)


def ids(num_proxies: int, num_rows: int, num_segments: int, seed: int) -> torch.Tensor:
    """Return ids of which a quarter is one id, a tenth is ignored, and some never come."""
    generator = torch.Generator().manual_seed(seed)
    size = (num_proxies, num_rows)
    some = torch.randint(0, num_segments, size, generator=generator)
    lot = torch.rand(size, generator=generator)
    some[lot < 0.25] = 1
    some[lot > 0.9] = -100
    return some


def sums_are_the_references() -> None:
    from regmix_kernels import segment_sum

    shapes = ((5, 123, 123, 50), (1, 1, 16, 4), (2, 16, 32, 3), (3, 200, 40, 2), (1, 64, 300, 500))
    for dtype in DTYPES:
        for num_proxies, num_rows, width, num_segments in shapes:
            rows = normal(num_proxies, num_rows, width, seed=0, dtype=dtype)
            some = ids(num_proxies, num_rows, num_segments, seed=1)
            start = normal(num_proxies, num_segments, width, seed=2)
            out = strided(start)
            plan = segment_sum.plan(some, num_segments)
            segment_sum.add_rows(rows, plan, out, scale=0.5)
            for p in range(num_proxies):
                kept = some[p] >= 0
                wanted = reference.embedding_grad(
                    rows[p][kept].double(), some[p][kept], num_segments
                )
                # Rows are exact in both dtypes and sums are float32.
                assert_close(out[p], start[p] + 0.5 * wanted, torch.float32, f"{rows.shape}")


def long_segments_are_summed_across_blocks() -> None:
    from regmix_kernels import segment_sum

    # 700 rows of one id are 44 blocks: more than one tile of parts. The others begin and end
    # in the middle of a block, at its edges, and fill one.
    lengths = {0: 700, 1: 4, 2: 16, 3: 16, 4: 17, 5: 15, 7: 1}
    some = torch.cat([torch.full((length,), id) for id, length in lengths.items()])
    rows = normal(1, len(some), 32, seed=3)
    shuffled = torch.randperm(len(some), generator=torch.Generator().manual_seed(0))
    for order in (torch.arange(len(some)), shuffled):
        out = torch.zeros(1, 9, 32)
        segment_sum.add_rows(rows, segment_sum.plan(some[order][None], 9), out)
        wanted = reference.embedding_grad(rows[0].double(), some[order], 9)
        assert_close(out[0], wanted, torch.float32, "long segments")


def ignored_ids_and_empty_segments_touch_nothing() -> None:
    from regmix_kernels import segment_sum

    some = torch.tensor([[-100, 5, 7, 8, -1, 5]])
    rows = normal(1, 6, 16, seed=4)
    rows[0, [0, 3, 4]] = float("nan")
    out = poisoned(1, 8, 16)
    out[0, 5] = out[0, 7] = 1.0
    segment_sum.add_rows(rows, segment_sum.plan(some, 8), out)
    assert_close(out[0, 5], 1 + rows[0, 1].double() + rows[0, 5], torch.float32, "id 5")
    assert_close(out[0, 7], 1 + rows[0, 2].double(), torch.float32, "id 7")
    assert out[0, [0, 1, 2, 3, 4, 6]].isnan().all()
    every = torch.full((1, 6), -100)
    before = out.clone()
    segment_sum.add_rows(rows, segment_sum.plan(every, 8), out)
    assert_same_bits(out, before, "all ignored")


def a_stack_sums_like_single_proxies() -> None:
    from regmix_kernels import segment_sum

    for dtype in DTYPES:
        for num_rows, width in ((123, 123), (160, 64)):
            rows = normal(3, num_rows, width, seed=5, dtype=dtype)
            some = ids(3, num_rows, 20, seed=6)
            rows[1, 3] = float("nan")
            some[1, 3] = 1
            together = torch.ones(3, 20, width)
            segment_sum.add_rows(rows, segment_sum.plan(some, 20), together)
            assert together[1].isnan().any()
            assert together[::2].isfinite().all()
            for p in range(3):
                alone = torch.ones(1, 20, width)
                plan = segment_sum.plan(some[p : p + 1].clone(), 20)
                segment_sum.add_rows(rows[p : p + 1].clone(), plan, alone)
                assert_same_bits(together[p], alone[0], f"proxy {p}")


def rows_of_a_table_are_exact_and_their_gradient_adds_up() -> None:
    from regmix_kernels import embedding, segment_sum

    for dtype in DTYPES:
        for integer in (torch.int64, torch.int32, torch.uint16):
            table = strided(normal(3, 50, 123, seed=7))
            tokens = ids(3, 41, 50, seed=8).clamp_min(0)
            x = embedding.forward(table, tokens.to(integer), dtype)
            wanted = torch.stack([table[p][tokens[p]] for p in range(3)]).to(dtype)
            assert_same_bits(x, wanted, f"{dtype} {integer}")
        grad = torch.zeros(3, 50, 123)
        embedding.backward(x, segment_sum.plan(tokens.to(torch.uint16), 50), grad)
        for p in range(3):
            sums = reference.embedding_grad(x[p].double(), tokens[p], 50)
            assert_close(grad[p], sums, torch.float32, "embedding")


def a_token_outside_the_table_is_a_row_of_nan() -> None:
    from regmix_kernels import embedding

    x = embedding.forward(torch.ones(2, 5, 16), torch.tensor([[0, 5, 4], [-1, 1, 2]]))
    assert x.isnan().all(dim=-1).tolist() == [[False, True, False], [True, False, False]]


def test_every_property_holds_in_the_interpreter() -> None:
    """One process for all, each named for its property: starting Triton takes seconds."""
    run_interpreted(everything)


def everything() -> None:
    poison_new_memory()
    sums_are_the_references()
    long_segments_are_summed_across_blocks()
    ignored_ids_and_empty_segments_touch_nothing()
    a_stack_sums_like_single_proxies()
    rows_of_a_table_are_exact_and_their_gradient_adds_up()
    a_token_outside_the_table_is_a_row_of_nan()
