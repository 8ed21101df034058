"""The one net under what users call: an argument that is not what its annotation says is refused in a line.

Without it a wrong value goes in and fails later, somewhere else, in an error of Python's; or does not fail.
"""

import functools
import inspect
import math
import numbers
import os
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import GenericAlias, NoneType, UnionType
from typing import Any, Literal, Self, SupportsFloat, TypeVar, Union, cast, get_args, get_origin

from feedbackpath.errors import RuleError, UserError

Function = TypeVar("Function", bound=Callable[..., Any])
Kind = TypeVar("Kind", bound=type)
_IN_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", Path: "a path"}


class CheckedArguments:
    """Base of classes whose objects are settings: what they are made with has to fit the annotations.

    Raises:
        RuleError: A setting does not exist, is of another type, or is a number that is not finite.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Check before anything is made; copies and pickles are made without arguments."""
        if args or kwargs:
            if cls.__init__ is object.__init__:
                raise RuleError(f"{cls.__name__} takes no settings")
            _refuse_misfits(cls.__init__, (None, *args), kwargs, cls.__name__, RuleError, is_finite=True)
        return super().__new__(cls)


def checked(error: type[UserError], *, but: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Return a decorator that checks a function's arguments against their annotations.

    Args:
        error: What is raised.
        but: Parameters that the function looks at itself.

    Example:
        >>> @checked(UserError)
        ... def half(number: float) -> float:
        ...     return number / 2
        >>> half("a")
        Traceback (most recent call last):
        feedbackpath.errors.UserError: half: number must be a number, not 'a'
    """

    def wrap(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            name = function.__qualname__.removesuffix(".__init__")
            _refuse_misfits(function, args, kwargs, name, error, but)
            return function(*args, **kwargs)

        return cast(Function, call)

    return wrap


def checked_methods(error: type[UserError]) -> Callable[[Kind], Kind]:
    """Return a decorator that checks what a class's public methods are called with."""

    def wrap(kind: Kind) -> Kind:
        for name, function in list(vars(kind).items()):
            if inspect.isfunction(function) and not name.startswith("_"):
                setattr(kind, name, checked(error)(function))
        return kind

    return wrap


def _is_one_number(value: Any) -> bool:
    """Whether a value, such as a tensor, can be taken as one number."""
    is_object = isinstance(value, SupportsFloat) and not isinstance(value, type)
    return is_object and getattr(value, "shape", ()) == ()


def fits(value: object, hint: Any, *, is_finite: bool = False) -> bool:
    """Whether a value is what an annotation says; a whole number will do for a float, but no bool for either.

    Example:
        >>> fits(3, float), fits(True, int), fits("a", Literal["a", "b"]), fits([1, "a"], Sequence[int])
        (True, False, True, False)
    """
    if hint is Any:
        return True
    origin, inner = get_origin(hint), get_args(hint)
    same = functools.partial(fits, is_finite=is_finite)
    if origin is Literal:
        return any(type(value) is type(known) and value == known for known in inner)
    if origin in (Union, UnionType):
        return any(same(value, one) for one in inner)
    if hint is None or hint is NoneType:
        return value is None
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        is_like_one = hint is float and not is_finite and _is_one_number(value)
        is_number = (isinstance(value, kind) or is_like_one) and not isinstance(value, bool)
        return is_number and not (is_finite and isinstance(value, float) and not math.isfinite(value))
    if origin is type:
        return isinstance(value, type) and (not isinstance(inner[0], type) or issubclass(value, inner[0]))
    if origin is tuple and isinstance(value, tuple):
        each = inner[:1] * len(value) if inner[1:] == (...,) else inner
        return len(each) == len(value) and all(map(same, value, each))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            same(key, inner[0]) and same(item, inner[1]) for key, item in value.items()
        )
    if isinstance(origin, type) and issubclass(origin, Sequence):
        is_list = isinstance(value, origin) and not isinstance(value, str)
        return is_list and all(same(item, inner[0]) for item in cast(Sequence[Any], value))
    kind = origin or hint
    if getattr(kind, "_is_protocol", False):
        return all(hasattr(value, name) for name in vars(kind) if not name.startswith("_"))
    return not isinstance(kind, type) or isinstance(value, kind)


def in_words(hint: Any, *, is_finite: bool = False) -> str:
    """Return what an annotation asks for.

    Example:
        >>> in_words(int | None), in_words(Literal["a", "b"]), in_words(Callable[[int], int])
        ('a whole number', 'one of a, b', 'a function')
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (Union, UnionType):
        given = [one for one in inner if one is not NoneType]
        return " or ".join(dict.fromkeys(in_words(one, is_finite=is_finite) for one in given))
    if hint is float and is_finite:
        return "a finite number"
    kind = origin or hint
    if kind is Any:
        return "anything"
    if kind in _IN_WORDS:
        return _IN_WORDS[kind]
    if kind is Callable:
        return "a function"
    if isinstance(kind, type) and issubclass(kind, Iterable) and inner:
        each = " to ".join(in_words(one, is_finite=is_finite) for one in inner if one is not ...)
        return f"a {kind.__name__.lower()} of {each}"
    name = getattr(kind, "__name__", str(kind))
    return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}"


def two_gradients(rule: Any, weight: Any, product: Any, context: Any) -> Any:
    """Return what a rule's hook ``gradients`` makes of an outer product, for W and for B (None: nothing).

    Raises:
        RuleError: It is no pair of tensors of the product's shape.
    """
    found = rule.gradients(weight, product, context)
    pair = found if isinstance(found, tuple | list) else (found,)
    shapes = [one.shape for one in pair if hasattr(one, "shape")]
    if len(pair) == 2 and shapes and all(shape == product.shape for shape in shapes):
        return found
    given = " and ".join(str(list(shape)) for shape in shapes) or "no tensor"
    raise RuleError(
        f"the hook gradients of {type(rule).__name__} returned {given} for {weight.name!r}: return two "
        f"tensors of the product's shape {list(product.shape)}, for W and for B"
    )


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = 80
_SHORT.maxother = 160


def shown(value: object) -> str:
    """Return a value as a line shows it: what is long or deep is cut short."""
    return " ".join(_SHORT.repr(value).split())


@contextmanager
def refusing(error: type[UserError], message: str) -> Iterator[None]:
    """Turn what Python raises for a content of another form into an error of ours.

    Example:
        >>> with refusing(UserError, "no state of a path"):
        ...     {}["steps"]
        Traceback (most recent call last):
        feedbackpath.errors.UserError: no state of a path (KeyError: 'steps')
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as wrong:
        if isinstance(wrong, UserError):
            raise
        reason = " ".join(str(wrong).split())[:200]
        raise error(f"{message} ({type(wrong).__name__}: {reason})") from wrong


def refuse_name(name: str, what: str, error: type[UserError]) -> None:
    """Refuse a name that cannot be one of a file, nor one of several that commas part."""
    if not name or not name.isprintable() or {os.sep, ","} & set(name):
        raise error(f"{what} cannot be called {name!r}: files get this name, and commas separate names")


def _refuse_misfits(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    what: str,
    error: type[UserError],
    but: Sequence[str] = (),
    *,
    is_finite: bool = False,
) -> None:
    """Refuse arguments that do not fit; the first is named."""
    signature, hints = _signature_of(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError as wrong:
        raise error(f"{what}: {wrong}; it takes {', '.join(hints) or 'nothing'}") from None
    for name, value in given.items():
        hint = hints.get(name, Any)
        if name in but or hint is Any or fits(value, hint, is_finite=is_finite):
            continue
        if get_origin(hint) is Literal:
            raise error(f"{what}: {name}={shown(value)} is not {in_words(hint)}")
        raise error(f"{what}: {name} must be {in_words(hint, is_finite=is_finite)}, not {shown(value)}")


@functools.cache
def _signature_of(function: Callable[..., Any]) -> tuple[inspect.Signature, dict[str, Any]]:
    """Return a function's signature and its annotations, as far as they can be looked up."""
    signature, hints = inspect.signature(function), {}
    for name, parameter in signature.parameters.items():
        hint = parameter.annotation
        if isinstance(hint, str):
            hint = eval(hint, function.__globals__, _PublicNames())
        if hint is parameter.empty:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            hint = GenericAlias(tuple, (hint, ...))
        elif parameter.kind is parameter.VAR_KEYWORD:
            hint = GenericAlias(dict, (str, hint))
        hints[name] = hint
    return signature, hints


class _PublicNames(dict[str, Any]):
    """The names that a file imports for type checkers alone: they are the package's public ones."""

    def __missing__(self, name: str) -> Any:
        package = sys.modules["feedbackpath"]
        if name in package.__all__:
            return getattr(package, name)
        raise KeyError(name)
