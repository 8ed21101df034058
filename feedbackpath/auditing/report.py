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
        layer: The layer whose weight it is, or whose delta or B differs without W.
        what: ``"weight"``, or ``"sign"`` where only the signs of W go over.
        sink: What differs: ``"delta"``, ``"feedback weight"``, an optimizer's state of B, a declared scale,
            ``"update"`` where a layer's own parameters are updated otherwise without the W of other
            layers, or ``"calls"`` where the step takes another course without W.
        operation: The operator by which it got there, as PyTorch calls it; empty where none shows.
        where: File and line of the call; empty where none shows.
        method: ``"absence"``: it differs while W is absent; ``"provenance"``: W was followed there as well;
            ``"storage"``: B is W, or lies in its memory.
        values: How many values crossed.
    """

    layer: str
    what: Literal["weight", "sign"]
    sink: str
    operation: str
    where: str
    method: Literal["provenance", "absence", "storage"]
    values: int

    def __str__(self) -> str:
        """Return one line."""
        made_of = "signs of W (1 bit per weight)" if self.what == "sign" else "W"
        place = "another layer's update" if self.sink == "update" else f"a {self.sink}"
        if self.method != "absence":
            return (
                f"{self.layer}: {made_of} in {place}, {self.values} values, by {self.operation} at "
                f"{self.where} [{self.method}]"
            )
        exit = f"; W leaves PyTorch by {self.operation} at {self.where}" if self.operation else ""
        if self.sink == "calls":
            return f"{self.layer}: the step takes another course without W, 1 bit or more{exit} [absence]"
        without = "the W of other layers" if self.sink == "update" else "W"
        return f"{self.layer}: {self.sink} is another without {without}, {self.values} values{exit} [absence]"


@dataclass(frozen=True)
class Crossing:
    """What a layer's two paths exchange in one step, in values.

    Attributes:
        activities: Outputs of the layer.
        deltas: Errors that arrive at its output.
        answers: Answers of the layer to a mirror's noise; a code and its negative count once.
        probes: Signals that were sent through the layer to read it.
    """

    activities: int
    deltas: int
    answers: int = 0
    probes: int = 0

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
        unsettled: Why the audit could not settle it, and what to do; empty: it could.
        since: From when on W was absent.
    """

    findings: tuple[Finding, ...]
    declared: dict[str, int]
    crossings: dict[str, Crossing]
    locality: dict[str, str]
    notes: tuple[str, ...] = field(default=())
    steps: int = 1
    unsettled: str = ""
    since: Literal["now", "untie"] = "now"

    @property
    def transport_free(self) -> bool | None:
        """Whether the steps went through without W: True, False, or None where that is not settled."""
        if self.findings:
            return False
        return None if self.unsettled else True

    @property
    def verdict(self) -> str:
        """The verdict, as one line."""
        if self.findings:
            is_signs = all(finding.what == "sign" for finding in self.findings)
            return "transports weights: their signs, 1 bit each" if is_signs else "transports weights"
        if self.unsettled:
            return f"not settled: {self.unsettled}"
        told = f"transport-free in the {self.steps} step{'s' * (self.steps > 1)} watched"
        if self.declared:
            kinds = ", ".join(f"{kind} ({count} scalars)" for kind, count in self.declared.items())
            told = f"{told}, except: {kinds}"
        probes = max((crossing.probes for crossing in self.crossings.values()), default=0)
        return f"{told}; W read by {probes} noise probes a step" if probes else told

    def __str__(self) -> str:
        """Return the verdict, the findings, what crosses and what each update takes, line by line."""
        since = (
            "from the making of the model on"
            if self.since == "untie"
            else "from now on (what it made before is not covered)"
        )
        lines = [self.verdict, *(f"  {finding}" for finding in self.findings), f"  W was absent {since}"]
        lines += [f"  note: {note}" for note in self.notes]
        for layer, crossing in self.crossings.items():
            local = f"; B's update: {self.locality[layer]}" if layer in self.locality else ""
            lines.append(f"  {layer}: {crossing}{local}")
        return "\n".join(lines)
