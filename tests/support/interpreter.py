"""Make Triton's interpreter quicker without a change in what it computes."""

from types import FunctionType, ModuleType

from triton.runtime import interpreter

exchange = interpreter._patch_lang
exchanged: set[frozenset[ModuleType]] = set()


def exchange_once(function: FunctionType) -> interpreter._LangPatchScope:
    """Leave the functions of Triton's language in the interpreter's form, once they are.

    Triton exchanges all of them, and back, at every call of every function of a kernel: a third of its time.
    """
    language = interpreter.tl, interpreter.tl.core
    seen = frozenset(module for module in language if any(value is module for value in function.__globals__.values()))
    if seen not in exchanged:
        exchanged.add(seen)
        exchange(function)
    return interpreter._LangPatchScope()  # of which nothing is to be taken back


def speed_up() -> None:
    """Do so from now on in this process."""
    interpreter._patch_lang = exchange_once
