"""One array of cells, as a chip has it."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.hardware.cells import Cells, Counted, Device
from feedbackpath.hardware.wiring import Line

if TYPE_CHECKING:
    from feedbackpath.hardware.chip import Chip


@dataclass
class Array:
    """One array of cells.

    Attributes:
        weight: Whose it is.
        side: ``"forward"``: it holds W; ``"feedback"``: B.
        device: What its cells are.
        cells: What was drawn for them.
        line: What brings updates to it.
        before: Its values before the write that is going on.
        gradient: That of B, while the optimizer has what has arrived of it.
        idle: Updates since each cell was written, where that counts.
        signals: Pairs of x and delta of this step, where single samples are written.
    """

    weight: UntiedWeight
    side: str
    device: Device
    cells: Cells
    line: Line | None = None
    before: Tensor | None = None
    gradient: Tensor | None = None
    idle: Tensor | None = None
    signals: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def values(self) -> nn.Parameter:
        """The weights that it holds."""
        return self.weight.weight if self.side == "forward" else self.weight.feedback

    def count_for(self, chip: "Chip") -> None:
        """Let a chip's counter hear of pulses, while there is one."""

        def tell(pulses: Tensor) -> None:
            if chip.counter is not None:
                chip.counter.pulsed(self, pulses)

        self.cells = self.cells._replace(counted=Counted(tell))
