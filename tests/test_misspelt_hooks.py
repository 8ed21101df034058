"""A hook of a rule that is not quite one is refused when the class is made."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

import feedbackpath as fp


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("stpe", "step"),
        ("strat", "start"),
        ("after_backwards", "after_backward"),
        ("check_optimiser", "check_optimizer"),
        ("detatch", "detach"),
        ("servers", "serves"),
        ("gradient", "gradients"),
        ("learn", "learns"),
        ("sendback", "send_back"),
        ("color", "colour"),
    ],
)
def test_what_looks_like_a_hook_is_refused(name, meant):
    with pytest.raises(fp.RuleError, match=rf"Mine\.{name} is no hook.*did you mean '{meant}'\?"):
        type("Mine", (fp.Rule,), {"name": "mine", name: True})


def test_a_class_attribute_with_a_type_is_looked_at_too():
    with pytest.raises(fp.RuleError, match="'is_tied'"):

        @dataclass(frozen=True)
        class Mine(fp.Rule):
            is_tide: ClassVar[bool] = True


def test_settings_and_names_of_ones_own_pass():
    @dataclass(frozen=True)
    class Mine(fp.KolenPollack):
        steps: int = 3
        rate: float = 0.1

        def _stpe(self):
            """An underscore: its own affair."""

        def restart(self):
            """It looks like no hook."""

        def step(self, weights, context):
            """The hook is there: the next is no slip."""

        def step_of(self, epoch):
            """A method beside it."""

    assert Mine().steps == 3
    assert type("Heir", (Mine,), {"step_of": Mine.step_of})().rate == 0.1
