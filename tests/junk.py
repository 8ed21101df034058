"""What users pass by mistake: Hypothesis strategies for every boundary's fuzz test."""

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from feedbackpath.errors import UserError

BOUNDED = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,  # the same cases on every machine: what it finds, it finds for all
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -1, 0, 2**31, 2**63, 1e300, 1e-300, float("nan"), float("inf"), True]),
)
texts = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", "kp", "..", "a/b", "\x1b[31m", "\udce9", "1e-2", "nan", "x" * 300, "all", "*"]),
)
plain = st.recursive(
    st.one_of(st.none(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
"""Whatever a YAML or JSON file may hold."""

objects = st.one_of(
    plain,
    st.sampled_from(
        [
            object(),
            torch.zeros(2),
            torch.tensor(float("nan")),
            np.zeros(2),
            b"a",
            {1},
            int,
            (lambda *_, **__: None),
            Ellipsis,
            1j,
        ]
    ),
)
"""Whatever a call may be given."""


def refused_in_a_line(call) -> bool:
    """Whether a call is refused; it may do as it was asked, but not fail otherwise, nor in several lines."""
    try:
        call()
    except UserError as error:
        told = str(error)
    else:
        return False
    assert len(told.splitlines()) == 1, told
    assert len(told) < 2500, told
    return True
