"""The command ``rules``."""

import json
from dataclasses import asdict
from typing import Annotated, Any

from cyclopts import Parameter

from feedbackpath.cli.exit_codes import DONE
from feedbackpath.cli.output import make_console

GROUPS = {
    "ruler": "B is W itself: backprop, which the other rules are measured against",
    "transports": "B is computed from W",
    "fixed": "B stays as it is drawn",
    "learned": "B learns without W, from the signals of training",
    "broadcast": "the output's error, or the target, goes straight to each layer",
    "targets": "layers get targets in place of errors",
    "mirrors": "noise, codes or spikes go through W, and B learns from the answers",
}


def rules(
    *, as_json: Annotated[bool, Parameter(name="--json", negative="", help="print JSON")] = False
) -> int:
    """List the rules by group, each with its paper, equation, needs, the audit's verdict and its cost.

    Example: feedbackpath rules
    """
    from feedbackpath.rules import RULES

    found = [_describe(name, RULES[name]) for name in RULES]
    console = make_console()
    if as_json:
        console.out(json.dumps(found, indent=2, ensure_ascii=False), highlight=False)
        return DONE
    for group in dict.fromkeys([*GROUPS, *(rule["group"] for rule in found)]):
        console.out(f"{group}: {GROUPS[group]}\n" if group in GROUPS else f"{group}\n", highlight=False)
        for rule in found:
            if rule["group"] == group:
                console.out(_to_text(rule), highlight=False)
    return DONE


def _describe(name: str, rule: Any) -> dict[str, Any]:
    from feedbackpath.rules.base import Facts, group_of
    from feedbackpath.rules.registry import what_of

    facts = vars(rule).get("facts", Facts())  # a rule derived from another has facts of its own, or none
    return {
        "rule": name,
        "class": rule.__name__,
        "group": group_of(rule),
        "what": what_of(rule),
        **asdict(facts),
    }


def _to_text(rule: dict[str, Any]) -> str:
    flops = rule["flops"]
    lines = {
        "paper": rule["paper"],
        "equation": rule["equation"],
        "needs": rule["needs"],
        "audit": rule["verdict"] or f"run feedbackpath audit --rule {rule['rule']}",
        "a step": f"{flops:.2f} of backprop's FLOPs" if flops is not None else "",
    }
    details = "".join(f"      {what:9}{text}\n" for what, text in lines.items() if text)
    return f"  {rule['rule']} ({rule['class']}): {rule['what']}\n{details}"
