"""Sign-concordant feedback (SC): B has the signs of W, and random sizes that stay.

Moskovitz, Litwin-Kumar & Abbott 2018 (frSF, "fixed random magnitude sign-concordant feedback")::

    B = |M| * sign(W)        M is drawn once; the signs follow W after every update

That is sign-symmetry with ``magnitude="fixed"``, by a name of its own: see ``SignSymmetry`` for all forms.

Differs from the paper: M has Glorot & Bengio's scale, as every random B here; B is not brought to W's norm
after each update (the paper's strict normalization), which would transport one more number a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from feedbackpath.rules.base import Facts
from feedbackpath.rules.sign_symmetry import SignSymmetry


@dataclass(frozen=True)
class SignConcordance(SignSymmetry):
    """Let each feedback weight have its forward weight's sign, and a random size of its own.

    Example:
        >>> import feedbackpath as fp
        >>> concordant, symmetric = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
        >>> _ = symmetric.load_state_dict(concordant.state_dict())
        >>> _ = fp.untie(concordant, "sc"), fp.untie(symmetric, fp.SignSymmetry(magnitude="fixed"))
        >>> bool((concordant.feedback == symmetric.feedback).all())
        True
    """

    name: ClassVar[str] = "sc"
    facts: ClassVar[Facts] = Facts(
        paper="Moskovitz, Litwin-Kumar & Abbott 2018",
        equation="B = |M| * sign(W), M random and fixed",
        needs="the sign of each weight after each update",
        verdict="transports weights: their signs",
        flops=1.0,
    )
    search_space: ClassVar[Mapping[str, Sequence[str]]] = {"scale": ("choice", "xavier", "he")}
    magnitude: Literal["uniform", "fixed", "batchwise"] = "fixed"
