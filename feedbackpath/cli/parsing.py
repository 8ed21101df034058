"""What is wrong with a command line, where, and what to write instead."""

from typing import get_origin

from cyclopts import CycloptsError
from cyclopts.exceptions import MissingArgumentError, UnknownOptionError, UnusedCliTokensError

_FOR_FILES = ("chip_settings", "overrides", "rule_settings", "by_rule")


def describe_misuse(error: CycloptsError) -> str:
    """Say what is too much or missing on a command line, and the next step."""
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
    if isinstance(error, UnknownOptionError):
        flag = (error.token.keyword or error.token.value or "").partition("=")[0]
        name = flag.lstrip("-").replace("-", "_")
        if name in _FOR_FILES:
            return f"{flag} is no flag: write {name} into a YAML file of settings, and give it by --config"
    said = str(error).rstrip()
    return said if "?" in said else f"{said.removesuffix('.')}; {command} --help says what there is"


def _describe_list(error: CycloptsError, word: str) -> str | None:
    """Say what is wrong with a word behind a flag: its values are separated by commas, or it has none."""
    given = error.root_input_tokens or []
    before = given[: given.index(word)] if word in given else []
    if before and before[-1] == "--resume":
        return f"--resume has no value here; name the folder by --out, as in --out {word} --resume"
    flag = next((place for place in reversed(range(len(before))) if before[place].startswith("--")), None)
    if flag is None or error.app is None:
        return None
    name, _, first = before[flag].partition("=")
    known = next((known for known in error.app.assemble_argument_collection() if name in known.names), None)
    if known is None or not (get_origin(known.hint) is tuple or "comma" in (known.parameter.help or "")):
        return None
    values = [value.rstrip(",") for value in (first, *before[flag + 1 :], word) if value]
    return f"separate the values of {name} by commas, as in {name} {','.join(values)}"
