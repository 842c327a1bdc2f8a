"""transformers' Llama as a peer: the same shape, a plain loss.

Enters: a shape. Leaves: a model with the weights of seed 0, and the mean loss of tokens. Needs
transformers; trains nothing.

B sequences, T tokens of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from regmix.model.presets import ModelShape


def make_peer(
    shape: ModelShape, *, attention: str = "sdpa"
) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """Return `LlamaForCausalLM` in training mode, and the function from tokens to its mean loss.

    attention: "sdpa" or "eager". Tokens are [B, T+1]. Raises `ImportError` without transformers.
    """
    import torch
    from torch.nn import functional
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {"attn_implementation": attention}
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        max_position_embeddings=shape.seq_len,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=False,
        use_cache=False,
        **settings,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).train()

    def loss_of(tokens: Tensor) -> Tensor:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        return functional.cross_entropy(
            logits.view(-1, shape.vocab_size), tokens[:, 1:].reshape(-1)
        )

    return model, loss_of
