"""The command ``rules``."""

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

from cyclopts import Parameter

from feedbackpath.cli.exit_codes import DONE

GROUPS = {
    "ruler": "B is W itself",
    "transports": "B is computed from W",
    "fixed": "B stays as it is drawn",
    "learned": "B learns without W",
    "broadcast": "the output's error goes straight to each layer",
    "mirrors": "noise shows B what W is",
}


def rules(
    *, as_json: Annotated[bool, Parameter(name="--json", negative="", help="print JSON")] = False
) -> int:
    """List the rules by group, each with its paper, equation, needs, the audit's verdict and its cost.

    Example: feedbackpath rules
    """
    from feedbackpath.rules import RULES

    found = [_describe(name, RULES[name]) for name in RULES]
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        return DONE
    for group in dict.fromkeys([*GROUPS, *(rule["group"] for rule in found)]):
        sys.stdout.write(f"{group}: {GROUPS[group]}\n\n" if group in GROUPS else f"{group}\n\n")
        for rule in found:
            if rule["group"] == group:
                sys.stdout.write(_to_text(rule))
    return DONE


def _describe(name: str, rule: Any) -> dict[str, Any]:
    from feedbackpath.rules.base import Facts, group_of

    facts = vars(rule).get("facts", Facts())  # a rule derived from another has facts of its own, or none
    summary = (rule.__doc__ or "").strip().splitlines()[:1]
    return {
        "rule": name,
        "class": rule.__name__,
        "group": group_of(rule),
        "what": " ".join(summary).replace("`", ""),
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
    return f"  {rule['rule']} ({rule['class']}): {rule['what']}\n{details}\n"
