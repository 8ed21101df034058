"""A small transformer encoder that reads an image row by row."""

from torch import Tensor, nn


class RowTransformer(nn.Module):
    """A transformer encoder over the rows of an image, and a linear layer on the mean of its outputs.

    Args:
        sample_shape: ``(C, H, W)``; H rows are read, each a vector of C W values.
        num_classes: Number of outputs.
        width: Features of a row in the encoder.
        num_heads: Attention heads; they share the width.
        num_layers: Encoder layers, norm first.

    Example:
        >>> import torch
        >>> RowTransformer((1, 28, 28), 10)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        sample_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: int = 128,
        num_heads: int = 4,
        num_layers: int = 2,
    ) -> None:
        super().__init__()
        channels, rows, columns = sample_shape
        self.embed = nn.Linear(channels * columns, width)
        self.position = nn.Embedding(rows, width)
        layer = nn.TransformerEncoderLayer(
            width, num_heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[N, num_classes]`` of images ``[N, C, H, W]``."""
        rows = x.transpose(1, 2).flatten(2)
        encoded: Tensor = self.encoder(self.embed(rows) + self.position.weight)
        return self.head(encoded.mean(1))  # type: ignore[no-any-return]
