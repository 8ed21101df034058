"""What an audit found, and how it says so."""

from dataclasses import dataclass, field
from typing import Literal

from feedbackpath.errors import UserError


class AuditError(UserError):
    """A step that cannot be audited as it stands."""


@dataclass(frozen=True)
class Finding:
    """A place where something made of a forward weight reaches the feedback path.

    Attributes:
        layer: The layer whose weight it is, or whose delta or B differs.
        what: ``"weight"``, or ``"sign"`` where only the signs of W go over.
        sink: ``"delta"``, or ``"feedback weight"``.
        operation: The operator by which it got there, as PyTorch calls it; empty where only replay saw it.
        where: File and line of the call; empty where only replay saw it.
        method: ``"provenance"``, ``"replay"`` or ``"storage"``.
        values: How many values crossed.
    """

    layer: str
    what: Literal["weight", "sign"]
    sink: Literal["delta", "feedback weight"]
    operation: str
    where: str
    method: Literal["provenance", "replay", "storage"]
    values: int

    def __str__(self) -> str:
        """Return one line."""
        made_of = "signs of W (1 bit a weight)" if self.what == "sign" else "W"
        if self.method == "replay":
            whose = "the delta that arrives" if self.sink == "delta" else "the new B"
            return f"{self.layer}: {whose} changes with W, by a way that no operator shows [replay]"
        return (
            f"{self.layer}: {made_of} in a {self.sink}, {self.values} values, by {self.operation} at "
            f"{self.where} [{self.method}]"
        )


@dataclass(frozen=True)
class Crossing:
    """What a layer's two paths exchange in one step, in values.

    Attributes:
        activities: Outputs of the layer.
        deltas: Errors that arrive at its output.
        answers: Answers of the layer to a mirror's noise; a code and its negative count once.
    """

    activities: int
    deltas: int
    answers: int = 0

    def __str__(self) -> str:
        """Return a phrase."""
        mirrored = f", {self.answers} answers to noise" if self.answers else ""
        return f"{self.activities} activities, {self.deltas} deltas{mirrored} a step"


@dataclass(frozen=True)
class Report:
    """The result of an audit.

    Attributes:
        findings: Where weights are transported; empty if nowhere.
        declared: What else the backward pass takes from forward parameters, in scalars: ``BatchNorm scale``.
        crossings: By layer, the activities and deltas that the paths exchange in a step.
        locality: By layer, whose signals the update of its B takes.
        notes: What a reader has to know.
        steps: Training steps that were watched and replayed.
    """

    findings: tuple[Finding, ...]
    declared: dict[str, int]
    crossings: dict[str, Crossing]
    locality: dict[str, str]
    notes: tuple[str, ...] = field(default=())
    steps: int = 1

    @property
    def transport_free(self) -> bool:
        """Whether no weight, and nothing made of weights alone, reaches a delta or a B."""
        return not self.findings

    @property
    def verdict(self) -> str:
        """The verdict, as one line."""
        if self.findings:
            if all(finding.what == "sign" for finding in self.findings):
                return "transports weights: their signs, 1 bit each"
            return "transports weights"
        if self.declared:
            kinds = ", ".join(f"{kind} ({count} scalars)" for kind, count in self.declared.items())
            return f"transport-free except: {kinds}"
        return "transport-free"

    def __str__(self) -> str:
        """Return the verdict, the findings, what crosses and what each update takes, line by line."""
        lines = [self.verdict, *(f"  {finding}" for finding in self.findings)]
        lines += [f"  note: {note}" for note in self.notes]
        for layer, crossing in self.crossings.items():
            local = f"; B's update: {self.locality[layer]}" if layer in self.locality else ""
            lines.append(f"  {layer}: {crossing}{local}")
        return "\n".join(lines)
