"""The large model's module is the stack's model and transformers': logits, loss, gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from regmix.large.distributed import operations
from regmix.large.distributed.module import LargeLlama
from regmix.model.llama import StackedLlama
from regmix.model.parameters import init_parameters, transformers_state
from regmix.model.presets import ModelShape, make_shape

PRESET = make_shape("cpu-64", vocab_size=256, seq_len=32)
ODD = ModelShape(
    num_layers=2, width=30, num_heads=3, hidden=37, vocab_size=123, seq_len=19, rope_base=500.0
)
GROUPED = dataclasses.replace(ODD, width=24, num_heads=4, num_kv_heads=2)
TIED = dataclasses.replace(ODD, num_layers=1, tied=True)
SHAPES = {"preset": PRESET, "odd": ODD, "grouped": GROUPED, "tied": TIED}
# Relative Frobenius error in float32: two ways to sum the same products.
TOLERANCE = 3e-6


def busy_parameters(shape: ModelShape) -> dict[str, Tensor]:
    """Parameters in which no norm is all ones and logits are far from uniform."""
    generator = torch.Generator().manual_seed(1)
    params = init_parameters(shape, [0])
    for name, value in params.items():
        value.mul_(1.0 + 0.3 * torch.randn(value.shape, generator=generator))
        if name in ("head", "embedding"):
            value.mul_(3.0)
    return params


def module_of(shape: ModelShape, params: dict[str, Tensor], **options: Any) -> LargeLlama:
    module = LargeLlama(shape, **options)
    module.load_state_dict(params)
    return module


def tokens_of(shape: ModelShape, *size: int) -> Tensor:
    return torch.randint(0, shape.vocab_size, size, generator=torch.Generator().manual_seed(0))


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def loss_and_grads(module: LargeLlama, tokens_BT1: Tensor) -> tuple[float, dict[str, Tensor]]:
    module.zero_grad()
    loss = module(tokens_BT1) / tokens_BT1[:, 1:].numel()
    loss.backward()
    grads = {name: value.grad for name, value in module.named_parameters()}
    return float(loss.detach()), {name: grad for name, grad in grads.items() if grad is not None}


@pytest.mark.parametrize("name", SHAPES)
def test_logits_loss_and_gradients_are_those_of_the_stack(name: str) -> None:
    shape = SHAPES[name]
    params, tokens = busy_parameters(shape), tokens_of(shape, 3, shape.seq_len + 1)
    module, stack = module_of(shape, params), StackedLlama(shape)
    expected = {key: torch.empty_like(value) for key, value in params.items()}
    losses = stack.loss_and_grads(params, expected, tokens[None])
    loss, grads = loss_and_grads(module, tokens)
    assert loss == pytest.approx(float(losses[0]), abs=2e-6)
    assert set(grads) == set(expected)
    errors = {key: relative(grads[key], expected[key]) for key in expected}
    worst = max(errors, key=lambda key: errors[key])
    assert errors[worst] < TOLERANCE, f"{worst}: {errors[worst]:.2e}"
    logits = module.logits(tokens[:, :-1]).detach()
    assert relative(logits, stack.logits(params, tokens[None, :, :-1])[0]) < TOLERANCE


@pytest.mark.parametrize("name", SHAPES)
def test_logits_loss_and_gradients_are_those_of_transformers(name: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[name]
    params, tokens = busy_parameters(shape), tokens_of(shape, 2, shape.seq_len + 1)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.width,
            intermediate_size=shape.hidden,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.kv_heads,
            rms_norm_eps=shape.norm_eps,
            tie_word_embeddings=shape.tied,
            max_position_embeddings=shape.seq_len,
            rope_theta=shape.rope_base,
        )
    )
    theirs.load_state_dict(transformers_state(params, 0, shape))
    expected = theirs(input_ids=tokens[:, :-1]).logits
    functional.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    module = module_of(shape, params)
    _, grads = loss_and_grads(module, tokens)
    ours = transformers_state(grads, 0, shape)
    errors = {n: relative(ours[n], p.grad) for n, p in theirs.named_parameters()}
    worst = max(errors, key=lambda key: errors[key])
    assert errors[worst] < TOLERANCE, f"{worst}: {errors[worst]:.2e}"
    assert relative(module.logits(tokens[:, :-1]).detach(), expected.detach()) < TOLERANCE


def test_recomputed_activations_give_the_same_bits() -> None:
    params, tokens = busy_parameters(GROUPED), tokens_of(GROUPED, 2, 20)
    kept = loss_and_grads(module_of(GROUPED, params), tokens)
    again = loss_and_grads(module_of(GROUPED, params, recompute=True), tokens)
    assert kept[0] == again[0]
    assert all(torch.equal(kept[1][name], again[1][name]) for name in kept[1])


def test_chunks_of_the_head_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    params, tokens = busy_parameters(TIED), tokens_of(TIED, 3, 20)
    whole = loss_and_grads(module_of(TIED, params), tokens)
    monkeypatch.setattr(operations, "_LOGITS", 7 * TIED.vocab_size)
    parts = loss_and_grads(module_of(TIED, params), tokens)
    assert parts[0] == pytest.approx(whole[0], abs=1e-6)
    assert all(relative(parts[1][name], whole[1][name]) < TOLERANCE for name in whole[1])


def test_a_masked_prediction_counts_neither_loss_nor_gradient() -> None:
    params, tokens = busy_parameters(ODD), tokens_of(ODD, 2, 20)
    module, kept = module_of(ODD, params), torch.zeros(2, 19, dtype=torch.bool)
    kept[0, :4] = True
    masked = module(tokens, kept)
    masked.backward()
    head = module.head
    assert head is not None
    assert head.grad is not None
    grad = head.grad.clone()
    module.zero_grad()
    short = module(tokens[:1, :5])
    short.backward()
    assert masked.item() == pytest.approx(short.item(), rel=1e-6)
    assert relative(grad, head.grad) < TOLERANCE


def test_within_documents_a_token_sees_its_own_document_only() -> None:
    separator = 5
    params = busy_parameters(GROUPED)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(6, GROUPED.vocab_size, (1, 18), generator=generator)
    tokens[0, 7] = separator
    masked = module_of(GROUPED, params, separator=separator).logits(tokens)
    across = module_of(GROUPED, params).logits(tokens)
    alone = module_of(GROUPED, params).logits(tokens[:, 8:])
    # The rotary embedding knows distances only, so a document alone is the same document.
    assert relative(masked[:, 8:].detach(), alone.detach()) < 1e-5
    assert relative(masked[:, :8].detach(), across[:, :8].detach()) < 1e-5
    assert relative(masked[:, 8:].detach(), across[:, 8:].detach()) > 1e-2


def test_bfloat16_products_leave_float32_gradients_near_the_exact_ones() -> None:
    params, tokens = busy_parameters(PRESET), tokens_of(PRESET, 4, 33)
    exact = loss_and_grads(module_of(PRESET, params), tokens)
    rough = loss_and_grads(module_of(PRESET, params, dtype=torch.bfloat16), tokens)
    assert rough[0] == pytest.approx(exact[0], rel=1e-2)
    for name, grad in rough[1].items():
        assert grad.dtype == torch.float32
        # bfloat16 keeps 8 bits; the error grows with the depth and stays a few per cent.
        assert relative(grad, exact[1][name]) < 0.1, name
