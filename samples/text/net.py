"""A character-level decoder transformer."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

#: Every character of the book; a token is an index into this string.
VOCABULARY = "\n !\"$&'(),-.0123456789:;=?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]_abcdefghijklmnopqrstuvwxyz{}"


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Let each position of x (N, T, width) look at itself and at what came before."""
        heads = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))  # N, T, 3, heads, ...
        query, key, value = heads.movedim(-4, -2).unbind(-4)  # each N, heads, T, ...
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.mix(seen.transpose(-2, -3).flatten(-2))


class Block(nn.Module):
    """Attention, then a GELU perceptron, each on a normalised copy of the stream it adds to."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream (N, T, width) to the next one."""
        x = x + self.attention(self.norm1(x))
        return x + self.contract(gelu(self.expand(self.norm2(x))))


class CharTransformer(nn.Module):
    """Predicts each next character from at most `context` characters before it."""

    def __init__(self, width: int = 64, blocks: int = 2, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(VOCABULARY), width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens as stored, bytes (N, T), to logits (N, T, vocabulary)."""
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        x = self.characters(tokens.long()) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
