"""The command ``rules``."""

from rich.console import Console

from feedbackpath.cli.exit_codes import DONE

GROUPS = {
    "ruler": "B is W itself",
    "transports": "B is computed from W",
    "fixed": "B stays as it is drawn",
    "learned": "B learns without W",
    "broadcast": "the output's error goes straight to each layer",
    "targets": "layers get targets in place of errors",
    "mirrors": "noise shows B what W is",
}


def rules() -> int:
    """List the rules by group: what B comes from, and what carries the error."""
    from rich.table import Table

    from feedbackpath.rules import RULES
    from feedbackpath.rules.base import group_of

    groups = {name: group_of(rule) for name, rule in RULES.items()}
    console = Console()
    for group in dict.fromkeys([*GROUPS, *groups.values()]):
        table = Table("rule", "class", "what it does", title=group, caption=GROUPS.get(group))
        for name in [name for name, own in groups.items() if own == group]:
            rule = RULES[name]
            table.add_row(name, rule.__name__, (rule.__doc__ or "").strip().splitlines()[0])
        console.print(table)
    return DONE
