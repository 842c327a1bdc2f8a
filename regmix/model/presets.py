"""Shapes of models: what a proxy or a large model is made of.

Enters: a preset's name, or the numbers themselves. Leaves: a validated `ModelShape` that counts
its parameters and its FLOPs. Holds no tensor and does not know how a model is trained.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from regmix.errors import ModelError, nearest

NEOX_VOCAB_SIZE = 50432
# No model comes near these; a file with larger numbers would cost time and memory to refuse later.
_MOST_LAYERS, _LARGEST = 10_000, 1 << 31


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A Llama's shape: SwiGLU, RMSNorm, full rotary embedding, causal attention.

    num_layers: transformer blocks.
    width: size of the residual stream.
    num_heads: query heads; they divide `width` and leave an even head size.
    hidden: size inside the SwiGLU.
    vocab_size: rows of the embedding and of the head.
    seq_len: tokens of a training sequence.
    rope_base: base of the rotary embedding's frequencies.
    norm_eps: added to the mean square inside RMSNorm.
    num_kv_heads: key and value heads; None means as many as query heads.
    tied: whether the head is the embedding.
    """

    num_layers: int
    width: int
    num_heads: int
    hidden: int
    vocab_size: int
    seq_len: int
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    num_kv_heads: int | None = None
    tied: bool = False

    def __post_init__(self) -> None:
        for name in ("num_layers", "width", "num_heads", "hidden", "vocab_size", "seq_len"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
            most = _MOST_LAYERS if name == "num_layers" else _LARGEST
            shown = min(getattr(self, name), 10**18)  # Python writes no number of many digits
            _require(getattr(self, name) <= most, name, shown, f"at most {most:,}")
        _require(1.0 < self.rope_base < math.inf, "rope_base", self.rope_base, "above 1")
        _require(0.0 < self.norm_eps < 1.0, "norm_eps", self.norm_eps, "between 0 and 1")
        _require(
            self.width % (2 * self.num_heads) == 0,
            "width",
            self.width,
            f"a multiple of 2 x num_heads = {2 * self.num_heads}",
        )
        if self.num_kv_heads is not None:
            _require(
                self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads == 0,
                "num_kv_heads",
                self.num_kv_heads,
                f"a divisor of num_heads = {self.num_heads}",
            )

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def num_body_parameters(self) -> int:
        """Parameters outside the embedding and the head."""
        qkv = (self.num_heads + 2 * self.kv_heads) * self.head_dim * self.width
        block = qkv + self.width * self.width + 3 * self.width * self.hidden + 2 * self.width
        return self.num_layers * block + self.width

    @property
    def num_parameters(self) -> int:
        """All parameters; a tied embedding counts once."""
        tables = 1 if self.tied else 2
        return self.num_body_parameters + tables * self.vocab_size * self.width

    def flops_per_token(self, seq_len: int | None = None) -> float:
        """Return the FLOPs of forward and backward per token, attention counted as causal.

        Matrix products only: 6 per weight that multiplies, and 6 x width per attended position.
        """
        seq_len = self.seq_len if seq_len is None else seq_len
        norms = (2 * self.num_layers + 1) * self.width
        weights = self.num_body_parameters - norms + self.vocab_size * self.width
        attention = self.num_layers * self.width * (seq_len + 1)
        return 6.0 * (weights + attention)


def _require(fine: bool, name: str, value: object, wanted: str) -> None:
    if not fine:
        raise ModelError(f"{name} = {value} of a model's shape", cure=f"Make it {wanted}")


PRESETS: dict[str, ModelShape] = {
    # The paper's proxy and large models (sail-sg/regmix, tinyllama_1M, _60M, _1B).
    "1m": ModelShape(
        num_layers=2, width=256, num_heads=8, hidden=512, vocab_size=NEOX_VOCAB_SIZE, seq_len=2048
    ),
    "60m": ModelShape(
        num_layers=10, width=768, num_heads=8, hidden=1536, vocab_size=NEOX_VOCAB_SIZE, seq_len=2048
    ),
    "1b": ModelShape(
        num_layers=22,
        width=2048,
        num_heads=16,
        hidden=5632,
        vocab_size=NEOX_VOCAB_SIZE,
        seq_len=2048,
    ),
    # Llama 2 7B (arXiv:2307.09288), but for the vocabulary and the sequence length.
    "7b": ModelShape(
        num_layers=32,
        width=4096,
        num_heads=32,
        hidden=11008,
        vocab_size=NEOX_VOCAB_SIZE,
        seq_len=2048,
    ),
    # For a CPU: proxies of 32 and 64, and a final model of 128.
    "cpu-32": ModelShape(
        num_layers=2, width=32, num_heads=2, hidden=64, vocab_size=4096, seq_len=128
    ),
    "cpu-64": ModelShape(
        num_layers=2, width=64, num_heads=4, hidden=128, vocab_size=4096, seq_len=128
    ),
    "cpu-128": ModelShape(
        num_layers=4, width=128, num_heads=4, hidden=384, vocab_size=4096, seq_len=256
    ),
}


def make_shape(name: str, vocab_size: int | None = None, seq_len: int | None = None) -> ModelShape:
    """Return a preset, with another vocabulary or sequence length where one is given."""
    if name not in PRESETS:
        raise ModelError(f"No model preset is called '{name}'", cure=nearest(name, PRESETS))
    shape = PRESETS[name]
    return dataclasses.replace(
        shape,
        vocab_size=shape.vocab_size if vocab_size is None else vocab_size,
        seq_len=shape.seq_len if seq_len is None else seq_len,
    )
