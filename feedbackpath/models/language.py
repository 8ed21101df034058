"""Networks that read a sequence of tokens and say what may come next: a small GPT, and an LSTM."""

import torch
from torch import Tensor, nn


class GPT(nn.Module):
    """A transformer decoder: norm first, learned positions, causal attention (Radford et al. 2019).

    Args:
        context: Tokens that it sees at once.
        num_tokens: Size of the alphabet.
        width: Features of a token.
        num_heads: Attention heads; they share the width.
        num_layers: Layers.
        is_tied: Whether the head is the table of the embedding. A tied W gets gradients of both, and B those
            of the head alone: Kolen-Pollack then warns, for it does not bring the two together.

    Example:
        >>> GPT(64, 256)(torch.zeros(2, 64, dtype=torch.long)).shape
        torch.Size([2, 64, 256])
    """

    def __init__(
        self,
        context: int,
        num_tokens: int,
        *,
        width: int = 128,
        num_heads: int = 4,
        num_layers: int = 2,
        is_tied: bool = False,
    ) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(num_tokens, width), nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(
            width, num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_tokens, bias=False)
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("places", torch.arange(context), persistent=False)
        for embedding in (self.embed, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        if is_tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``[N, context]`` to logits ``[N, context, num_tokens]`` of what follows each."""
        x = self.embed(tokens) + self.position(self.places)
        x = self.layers(x, mask=self.mask, is_causal=True)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class TextLSTM(nn.Module):
    """An embedding, LSTM layers, and a linear layer on each of their outputs.

    Args:
        num_tokens: Size of the alphabet.
        width: Features of a token, and units of each layer.
        num_layers: Layers.
    """

    def __init__(self, num_tokens: int, *, width: int = 256, num_layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_tokens, width)
        self.lstm = nn.LSTM(width, width, num_layers, batch_first=True)
        self.head = nn.Linear(width, num_tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``[N, T]`` to logits ``[N, T, num_tokens]`` of the token that follows each."""
        return self.head(self.lstm(self.embed(tokens))[0])  # type: ignore[no-any-return]
