"""The head with its loss: values and gradients against float64, extreme logits, stacks."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from interpreted import run_interpreted
from kernel_checks import assert_same_bits, normal, poison_new_memory, strided
from regmix_kernels import reference
from regmix_kernels.compilation import compile_case
from torch import Tensor

# Largest relative error in the Frobenius norm.
TOLERANCE = {
    # Sums of up to 320 terms in float32, exponentials to 2 units.
    "float32": 2e-6,
    # Logits rounded to 11 bits: those of 4 by 2^-10, and their exponentials by as much.
    "float16": 3e-3,
    # Logits (chunked) or exponentials (fused) and results rounded to 8 bits; the interpreter cuts
    # off instead of rounding, which doubles the error.
    "bfloat16": 1e-2,
    # A head whose rows have 8 in common: exponentials that are cut off sum to less than 1 by 2^-9.
    "bfloat16, logits of 300": 3e-2,
    # Logits of 300 in float32 are exact to 1.5e-5, and so are their exponentials.
    "float32, logits of 300": 1e-4,
    # The loss is the difference of two numbers of 300, exact to 3e-5 each.
    "nats": 1e-4,
}

# P, N, D, V: tails everywhere; D 160 goes in two parts on an A100.
SHAPES = ((1, 37, 32, 123), (3, 5, 123, 123), (2, 130, 48, 140), (1, 17, 160, 70))
SCALE = 1 / 64
Ways = Callable[..., tuple[Tensor, Tensor]]


def test_every_property_holds_in_the_interpreter() -> None:
    """One process for all, each named for its property: starting Triton takes seconds."""
    run_interpreted(everything)


def everything() -> None:
    poison_new_memory()
    losses_and_gradients_are_those_of_the_reference()
    the_loss_alone_is_the_reference_for_any_width()
    extreme_logits_neither_overflow_nor_vanish()
    ignored_labels_leave_no_trace()
    the_gradient_of_the_head_can_be_left_out()
    chunks_add_up()
    a_stack_equals_single_proxies()
    a_proxy_that_is_nan_spoils_no_other()
    what_cannot_be_fused_is_refused()


def inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return e, a head that is strided over proxies, and labels: repeated, ignored, unknown."""
    num_proxies, num_tokens, width, vocab_size = shape
    e = normal(num_proxies, num_tokens, width, seed=seed, dtype=dtype)
    head = normal(num_proxies, vocab_size, width, seed=seed + 1) * 1.5 * width**-0.5
    generator = torch.Generator().manual_seed(seed + 2)
    labels = torch.randint(0, vocab_size, (num_proxies, num_tokens), generator=generator)
    labels[:, : num_tokens // 3] = labels[:, :1]
    labels[:, 1] = -100
    labels[:, 3] = vocab_size
    return e, strided(head.to(dtype)), labels


def expected(e: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return nats and both gradients of SCALE * sum(nats) in float64; ignored tokens give 0."""
    e, head = (x.double().detach().requires_grad_() for x in (e, head))
    counted = (labels >= 0) & (labels < head.shape[1])
    rows = []
    for proxy, kept in enumerate(counted):
        nats = reference.linear_cross_entropy(e[proxy, kept], head[proxy], labels[proxy, kept])
        rows.append(torch.zeros(len(kept), dtype=torch.float64).masked_scatter(kept, nats))
    nats = torch.stack(rows)
    return nats.detach(), *torch.autograd.grad(SCALE * nats.sum(), (e, head))


def computed(
    way: str, e: Tensor, head: Tensor, labels: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return nats and gradients of `chunked` or `fused`; the head's is added to `start`."""
    from regmix_kernels import linear_cross_entropy, segment_sum

    if start is None:
        start = torch.zeros(head.shape)
    dhead = strided(start)

    # The interpreter multiplies the bit patterns of bfloat16; the segment sum has tests of its own.
    def widened(rows: Tensor, *arguments: object, **options: object) -> None:
        add_rows(rows.float(), *arguments, **options)

    add_rows = segment_sum.add_rows
    with mock.patch.object(segment_sum, "add_rows", widened):
        function: Ways = getattr(linear_cross_entropy, way)
        return *function(e, head, labels, scale=SCALE, dhead_PVD=dhead), dhead


def assert_near(got: Tensor, wanted: Tensor, tolerance: str, what: str) -> None:
    error = (got.double() - wanted).norm() / wanted.norm()
    assert error <= TOLERANCE[tolerance], f"{what}, {tolerance}: {error:.3g}"


def losses_and_gradients_are_those_of_the_reference() -> None:
    from regmix_kernels import launches

    ways = (
        ("chunked", ("float32", "float16", "bfloat16"), launches.HOPPER),
        ("fused", ("float32", "bfloat16"), launches.HOPPER),
        ("fused", ("bfloat16",), launches.AMPERE),
    )
    for way, dtypes, gpu in ways:
        for name in dtypes:
            for shape in SHAPES:
                e, head, labels = inputs(shape, getattr(torch, name))
                # Small, so that adding to it rounds less than the products do.
                start = 0.01 * normal(*head.shape, seed=9)
                with mock.patch.object(launches, "capability", return_value=gpu):
                    nats, de, dhead = computed(way, e, head, labels, start)
                wanted = expected(e, head, labels)
                case = f"{way} {shape} sm{gpu}"
                assert_near(nats, wanted[0], name, f"nats, {case}")
                assert_near(de, wanted[1], name, f"de, {case}")
                assert_near(dhead.double() - start, wanted[2], name, f"dhead, {case}")
                assert nats.dtype == torch.float32
                assert de.dtype == e.dtype


def the_loss_alone_is_the_reference_for_any_width() -> None:
    from regmix_kernels import linear_cross_entropy

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape in (*SHAPES, (2, 9, 320, 150)):
            e, head, labels = inputs(shape, dtype)
            nats = linear_cross_entropy.loss(e, head, labels)
            # Logits are never rounded, whatever the inputs' type.
            assert_near(nats, expected(e, head, labels)[0], "float32", f"{shape} {dtype}")


def extreme_logits_neither_overflow_nor_vanish() -> None:
    from regmix_kernels import linear_cross_entropy

    shape = (1, 40, 32, 123)
    for size in (76.0, 300.0, -300.0, -76.0):
        e, head, labels = inputs(shape, torch.float32)
        # A common direction gives every token's logits one level; rows differ in it by their sign.
        e[..., 0], head[..., 0] = size / 8, 8.0
        e[:, ::4, 0] = 0.0
        wanted = expected(e, head, labels)
        for way in ("chunked", "fused"):
            results = computed(way, e, head, labels)
            case = f"{way}, logits near {size}"
            assert (results[0].double() - wanted[0]).abs().max() <= TOLERANCE["nats"], case
            for got, want in zip(results[1:], wanted[1:], strict=True):
                assert_near(got, want, "float32, logits of 300", case)
        nats = linear_cross_entropy.loss(e, head, labels)
        assert (nats.double() - wanted[0]).abs().max() <= TOLERANCE["nats"], size
        e, head = e.bfloat16(), head.bfloat16()
        wanted = expected(e, head, labels)
        for got, want in zip(computed("fused", e, head, labels), wanted, strict=True):
            assert_near(got, want, "bfloat16, logits of 300", f"fused, logits near {size}")


def ignored_labels_leave_no_trace() -> None:
    for way in ("chunked", "fused"):
        e, head, labels = inputs((2, 21, 32, 90), torch.float32)
        labels[0] = -100
        start = normal(*head.shape, seed=9)
        nats, de, dhead = computed(way, e, head, labels, start)
        assert not nats[0].any()
        assert not de[0].any()
        assert torch.equal(dhead[0], start[0])
        assert not de[1, 1].any()
        assert de[1, 2].all()


def the_gradient_of_the_head_can_be_left_out() -> None:
    from regmix_kernels import linear_cross_entropy

    e, head, labels = inputs((2, 21, 32, 90), torch.float32)
    for way in ("chunked", "fused"):
        alone = getattr(linear_cross_entropy, way)(e, head, labels, scale=SCALE)
        for got, want in zip(alone, computed(way, e, head, labels), strict=False):
            assert_same_bits(got, want, way)


def chunks_add_up() -> None:
    from regmix_kernels import launches

    e, head, labels = inputs((2, 37, 32, 123), torch.float32)
    with mock.patch.object(launches, "head_chunk", return_value=16):
        results = computed("chunked", e, head, labels)
    for got, want in zip(results, expected(e, head, labels), strict=True):
        assert_near(got, want, "float32", "chunks of 16 tokens")


def a_stack_equals_single_proxies() -> None:
    from regmix_kernels import linear_cross_entropy

    for dtype in (torch.float32, torch.bfloat16):
        e, head, labels = inputs((3, 33, 32, 70), dtype)
        # One proxy needs the rescue, its neighbours do not.
        head[1] *= 100
        for way in ("chunked", "fused"):
            stack = computed(way, e, head, labels)
            for proxy in range(3):
                own = slice(proxy, proxy + 1)
                single = computed(way, e[own].clone(), head[own].clone(), labels[own].clone())
                for got, want in zip(stack, single, strict=True):
                    assert_same_bits(got[own], want, f"{way}, proxy {proxy}, {dtype}")
        stack_nats = linear_cross_entropy.loss(e, head, labels)
        single_nats = linear_cross_entropy.loss(e[1:2].clone(), head[1:2].clone(), labels[1:2])
        assert_same_bits(stack_nats[1:2], single_nats, "loss")


def a_proxy_that_is_nan_spoils_no_other() -> None:
    from regmix_kernels import linear_cross_entropy

    e, head, labels = inputs((3, 33, 32, 80), torch.float32)
    ways: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "chunked": lambda: computed("chunked", e, head, labels),
        "fused": lambda: computed("fused", e, head, labels),
        "loss": lambda: (linear_cross_entropy.loss(e, head, labels),),
    }
    healthy = {way: function() for way, function in ways.items()}
    head[1, 7, 3] = float("nan")
    for way, function in ways.items():
        for got, want in zip(function(), healthy[way], strict=True):
            for other in (0, 2):
                assert_same_bits(got[other], want[other], f"{way}, proxy {other}")
            assert got[1].isnan().any(), way


def what_cannot_be_fused_is_refused() -> None:
    from regmix_kernels import linear_cross_entropy

    for shape, dtype in (((1, 5, 32, 40), torch.float16), ((1, 5, 320, 40), torch.float32)):
        e, head, labels = inputs(shape, dtype)
        with pytest.raises(ValueError, match="use chunked"):
            linear_cross_entropy.fused(e, head, labels, scale=SCALE)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_products_of_a_tile_run_as_one_asynchronous_group(width: int) -> None:
    from regmix_kernels import linear_cross_entropy

    (case,) = [
        case
        for case in linear_cross_entropy.cases(90)
        if case.name.startswith(f"head.stream D{width} V") and "8192" not in case.name
        if "rescue" not in case.name
    ]
    opcodes = compile_case(case, 90).opcodes
    # ptxas fences every single product where registers run short: two fences for each of two
    # groups is what a tile needs.
    assert opcodes["HGMMA"] >= 8
    assert opcodes["WARPGROUP"] <= 4


@pytest.mark.parametrize(("spread", "common"), [(1.1, 1.0), (2.5, 3.0), (4.6, 0.0)])
def test_streamed_arithmetic_in_bfloat16_is_within_acceptance(spread: float, common: float) -> None:
    """Both ways' roundings in plain PyTorch: bounds 1 of a loss kernel, at labels by Zipf's law.

    The head's rows have a vector in common, `common` times as long as what tells them apart.
    """
    num_tokens, vocab_size, width = 512, 8192, 256
    e = normal(num_tokens, width, seed=0).bfloat16()
    rows = normal(vocab_size, width, seed=1) + common * normal(width, seed=3)
    head = (rows * spread * width**-0.5).bfloat16()
    frequency = 1.0 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    labels = torch.multinomial(frequency, num_tokens, replacement=True, generator=generator)

    logits = e.double() @ head.double().T
    hot = torch.nn.functional.one_hot(labels, vocab_size).double()
    softmax = logits.softmax(dim=-1)
    nats = logits.logsumexp(dim=-1) - (logits * hot).sum(dim=-1)
    de, dhead = (softmax - hot) @ head.double(), (softmax - hot).T @ e.double()

    p = (e.float() @ head.float().T).exp()
    total = p.sum(dim=-1, keepdim=True)
    our_de = (p.bfloat16().float() @ head.float() / total - head.float()[labels]).bfloat16()
    weighted = (e.float() / total).bfloat16()
    our_dhead = p.bfloat16().float().T @ weighted.float() - hot.float().T @ e.float()
    our_nats = total[:, 0].log() - (e.float() * head.float()[labels]).sum(dim=-1)

    rounded = (e.float() @ head.float().T).bfloat16().float()
    dlogits = (rounded.softmax(dim=-1) - hot.float()).bfloat16().float()
    chunked_de, chunked_dhead = (dlogits @ head.float()).bfloat16(), dlogits.T @ e.float()

    def error(got: Tensor, wanted: Tensor) -> float:
        return float((got.double() - wanted).norm() / wanted.norm())

    assert abs(float((our_nats.double() - nats).mean())) <= 2e-4
    for ours, chunked, wanted in ((our_de, chunked_de, de), (our_dhead, chunked_dhead, dhead)):
        assert error(ours, wanted) <= min(5e-3, 1.5 * error(chunked, wanted))
    for tokens in (our_dhead.double() - dhead).tensor_split(10):
        assert abs(float(tokens.sum())) <= 1e-3 * float(dhead.norm())
