"""A hook of a rule that is not quite one is named when the class is made."""

import warnings
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
def test_what_looks_like_a_hook_is_named(name, meant):
    with pytest.warns(UserWarning, match=rf"Mine\.{name} is no hook.*did you mean '{meant}'\?"):
        type("Mine", (fp.Rule,), {"name": "mine", name: True})


def test_a_class_attribute_with_a_type_is_looked_at_too():
    with pytest.warns(UserWarning, match="'is_tied'"):

        @dataclass(frozen=True)
        class Mine(fp.Rule):
            is_tide: ClassVar[bool] = True


@pytest.mark.parametrize("name", ["state", "stats", "stop", "restart", "_stpe", "mix", "update"])
def test_other_names_pass(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        type("Mine", (fp.KolenPollack,), {name: lambda self: None})


def test_settings_properties_and_names_beside_a_hook_pass():
    class Mixin:
        def step(self, weights, context):
            """The hook is there: the next is no slip."""

    with warnings.catch_warnings():
        warnings.simplefilter("error")

        @dataclass(frozen=True)
        class Mine(Mixin, fp.Rule):
            steps: int = 3

            @property
            def gradient(self):
                return 1

            def step_(self):
                """Beside the hook of the mixin."""

        class Heir(Mine):
            step_ = Mine.step_

    assert Heir().steps == 3
