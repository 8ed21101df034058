"""What is wrong with a setting, in our own words: a line that names it."""

from pydantic import ValidationError

from feedbackpath.arguments import shown

_IN_WORDS = {
    "greater_than_equal": "it must be at least {ge}",
    "greater_than": "it must be more than {gt}",
    "less_than_equal": "it must be at most {le}",
    "less_than": "it must be less than {lt}",
    "literal_error": "choose {expected}",
    "extra_forbidden": "there is no such setting",
    "int_from_float": "it must be a whole number",
    **dict.fromkeys(("int_parsing", "int_type", "int_parsing_size"), "it must be a whole number"),
    **dict.fromkeys(("float_parsing", "float_type", "finite_number"), "it must be a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "it must be true or false"),
    **dict.fromkeys(("string_type", "path_type"), "it must be text"),
    "tuple_type": "it must be a list",
    "dict_type": "it must map names to values",
}


def first_fault(error: ValidationError) -> str:
    """Return what was found wrong first, as one line that names the setting."""
    fault = error.errors(include_url=False)[0]
    setting = ".".join(str(part) for part in fault["loc"]).replace("_", "-")
    words = fault["msg"].removeprefix("Value error, ")
    if fault["type"] in _IN_WORDS:
        words = _IN_WORDS[fault["type"]].format(**fault.get("ctx", {}))
    return f"{setting} is {shown(_as_typed(fault['input']))}: {words}" if setting else words


def _as_typed(value: object) -> object:
    """Return a list of names as it is typed on a command line: with commas."""
    if not isinstance(value, list | tuple) or not value:
        return value
    names = [name for name in value if isinstance(name, str)]
    return ",".join(names) if len(names) == len(value) else value
