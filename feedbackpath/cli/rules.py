"""The command ``rules``."""

from rich.console import Console

from feedbackpath.cli.exit_codes import DONE


def rules() -> int:
    """List the rules."""
    from rich.table import Table

    from feedbackpath.rules import RULES

    table = Table("rule", "class", "what it does")
    for name, rule in RULES.items():
        table.add_row(name, rule.__name__, (rule.__doc__ or "").strip().splitlines()[0])
    Console().print(table)
    return DONE
