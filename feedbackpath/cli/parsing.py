"""What is wrong with a command line, where, and what to write instead."""

from typing import get_origin

from cyclopts import CycloptsError
from cyclopts.exceptions import MissingArgumentError, UnusedCliTokensError


def describe_misuse(error: CycloptsError) -> str:
    """Say what a command line has too much, or lacks, and the next step."""
    command = " ".join(["feedbackpath", *(error.command_chain or ())])
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        word = error.unused_tokens[0]
        advice = _describe_list(error, word) or f"write a flag before it; {command} --help lists them"
        return f"{word!r} belongs to no flag: {advice}"
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        wanted = error.argument
        is_flag = wanted.field_info.is_keyword_only
        name = wanted.name if is_flag else wanted.name.removeprefix("--").upper()
        told = f": {wanted.parameter.help}" if wanted.parameter.help else ""
        return f"{command} needs {'a value after ' if is_flag else ''}{name}{told}"
    said = str(error).rstrip()
    return said if "?" in said else f"{said.removesuffix('.')}; {command} --help says what there is"


def _describe_list(error: CycloptsError, word: str) -> str | None:
    """Say that values of one flag are separated by commas, where the words before are such a flag's."""
    given = error.root_input_tokens or []
    before = given[: given.index(word)] if word in given else []
    flag = next((place for place in reversed(range(len(before))) if before[place].startswith("--")), None)
    if flag is None or error.app is None:
        return None
    name, _, first = before[flag].partition("=")
    known = next((known for known in error.app.assemble_argument_collection() if name in known.names), None)
    if known is None or not (get_origin(known.hint) is tuple or "comma" in (known.parameter.help or "")):
        return None
    values = [value.rstrip(",") for value in (first, *before[flag + 1 :], word) if value]
    return f"separate the values of {name} by commas, as in {name} {','.join(values)}"
