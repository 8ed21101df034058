"""A task of one's own: digits read row by row by an LSTM.

feedbackpath compare --import examples/digits_by_row.py --data digit-rows --model row-lstm --rules bp,fa,kp
"""

from torch import Tensor, nn

import feedbackpath as fp
from feedbackpath.data import load_dataset


class RowLSTM(nn.Module):
    """An LSTM over the rows of an image, and a linear layer on its last output."""

    def __init__(self, columns: int, classes: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(columns, 64, batch_first=True), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, 1, H, W]`` to logits."""
        return self.head(self.lstm(x.squeeze(1))[0][:, -1])


fp.register_task("digit-rows", lambda seed: load_dataset("digits", seed=seed))
fp.register_model("row-lstm", lambda sample_shape, num_classes: RowLSTM(sample_shape[-1], num_classes))
