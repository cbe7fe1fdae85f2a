"""Pickles whose code does not run.

A pickle (https://docs.python.org/3/library/pickletools.html) is a program: it names functions of any module, calls
them, and sets attributes of what they give. Here it gets at nothing but a table of functions that the caller wrote for
it, and has no more of pickle's instructions than data needs. What it asks for beside these is refused by name.
"""

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

KEYS = (str, int, float, bool, type(None))
"""Of dictionaries. The hash of a tuple whose parts share their parts can take longer than a life."""
PLAIN = ("PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE "
         "SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT "
         "BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE GLOBAL STACK_GLOBAL BINPERSID")  # fmt: skip
"""Instructions that do here what they do in pickle. Such as take memory by a number in the file are not among them."""


class RefusedError(Exception):
    """A pickle asks for what it does not get; the message says for what, without the path."""


class Inert:
    """Stands for an object that nobody needs: it takes what a pickle puts in it, and keeps nothing."""

    __slots__ = ()

    def append(self, _: object) -> None: ...

    def extend(self, _: object) -> None: ...


INERT = Inert()


def inert(*_: object) -> Inert:
    """Stands for a class or a function that nobody needs."""
    return INERT


@dataclass(frozen=True, slots=True)
class Named:
    """What a pickle has in its hands of a function or class: a name, and what is called in its place."""

    name: str
    make: Callable[..., object]


def load(content: bytes, makers: Mapping[str, Callable[..., object]], persistent: Callable[[Any], object]) -> object:
    """What a pickle describes.

    Args:
        makers: by the full names of the functions and classes that the pickle may name, what is called instead.
        persistent: gives the objects that are kept outside of the pickle, by what the pickle says of them.

    Raises:
        RefusedError: it names another function, or has another instruction.
        Exception: of any kind: it is damaged, or is made to be.
    """
    return _Unpickler(content, makers, persistent).load()


def shown(text: str) -> str:
    """Text of a file as a message can hold it: in one line, not too long."""
    return text if text.isprintable() and len(text) <= 100 else ascii(text[:100])


class _Instructions(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        known = pickletools.code2op.get(chr(code))  # type: ignore[attr-defined]
        raise RefusedError(f"has pickle's instruction {known.name if known else code}")


class _Unpickler(pickle._Unpickler):
    """Python's own, in Python: that in C takes gigabytes for a file of some bytes, and has no table to choose from."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = _Instructions()

    def __init__(
        self, content: bytes, makers: Mapping[str, Callable[..., object]], persistent: Callable[[Any], object]
    ) -> None:
        super().__init__(io.BytesIO(content))
        self._makers, self._persistent = makers, persistent

    def find_class(self, module: str, name: str) -> Named:
        full = f"{module}.{name}"
        if full not in self._makers:
            raise RefusedError(f"asks for {shown(full)}")
        return Named(full, self._makers[full])

    def persistent_load(self, pid: Any) -> object:
        return self._persistent(pid)

    def call(self) -> None:
        """REDUCE and NEWOBJ."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Named or type(arguments) is not tuple:
            raise TypeError("calls what is no function")
        self.stack.append(function.make(*arguments))

    def drop_state(self) -> None:
        """BUILD: no object here has any."""
        self.stack.pop()

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def set_items(self) -> None:
        self._fill(self.pop_mark())

    def _fill(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if target is INERT:
            return
        if type(target) is not dict:
            raise TypeError("fills what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in KEYS:
                raise TypeError("has a key that is no string or number")
            target[key] = value

    for _name in PLAIN.split():
        dispatch[getattr(pickle, _name)[0]] = pickle._Unpickler.dispatch[getattr(pickle, _name)[0]]
    dispatch |= {
        pickle.REDUCE[0]: call,
        pickle.NEWOBJ[0]: call,
        pickle.BUILD[0]: drop_state,
        pickle.SETITEM[0]: set_item,
        pickle.SETITEMS[0]: set_items,
    }
