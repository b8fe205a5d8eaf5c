"""JSON schemas of Python functions beside those of transformers."""

from __future__ import annotations

import enum
import typing
from typing import Any, Literal

import numpy as np
import pytest
from chat_templates import weather
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException
from transformers.utils.chat_template_utils import get_json_schema as reference_schema

from jaxmodels.processing import get_json_schema
from jaxmodels.processing.schema import ToolSchemaError


class Color(enum.Enum):
    RED = "red"
    TWO = 2


class Box:
    def open(self, key: str, force: bool = False) -> Box:
        """Open the box.

        Args:
            key: The key
            force: Break it
        """

    @classmethod
    def make(cls, size: float):
        """Make one.

        Args:
            size: How large
        """


def several(
    a: int | str,
    b: list[int] | None,
    c: dict[str, list[float]],
    d: tuple[int, str],
    e: Any,
    f: Color,
    g: Literal["x", 1, None],
    h: list,
    i: dict,
    j: list[int] | dict[str, int] | None = None,
    k: float | int | str = 3,
    l: bool = True,
    m: tuple = (),
    n: list[str] | list[int] = (),
) -> tuple[int, str]:
    """Does several things: note this colon.

    More text, with an Example: here.

    Args:
        a: first: with a colon
        b: second

            after an empty line
        c: third
              deeper: still the third
        d (tuple): not matched
        d: fourth
        e: fifth
        f: sixth
        g: seventh
        h: eighth
        i: ninth
        j: tenth
        k: eleventh (Choices: [1, 2.5, " padded "])
        l: twelfth
        m: thirteenth
        n: last

    Returns:
        Two things:
            a number and a string

    Raises:
        ValueError: never
    """


def no_arguments():
    """Only a description."""


def raises_section(x: int) -> None:
    """Short.

    Args:
        x: number
    Raises:
        KeyError: if
    """


OLD = [typing.List, typing.Dict, typing.Tuple, typing.List[int], typing.Dict[str, typing.List[float]], typing.Tuple[int, str]]  # noqa: UP006
OLD += [typing.Optional[typing.List], typing.Optional[Literal["a", "b"]], typing.Union[int, str, None], typing.List[typing.Union[int, str]]]  # noqa: UP006, UP007, UP045


@pytest.mark.parametrize("hint", OLD, ids=str)
@pytest.mark.parametrize("default", [False, True])
def test_hints_as_they_were_written_before(hint, default):
    def tool(x=None): ...

    def needed(x): ...

    function = tool if default else needed
    function.__annotations__, function.__doc__ = {"x": hint, "return": hint}, "Use it.\n\nArgs:\n    x: what it takes\n\nReturns:\n    it"
    assert get_json_schema(function) == reference_schema(function)


@pytest.mark.parametrize("function", [weather, several, Box().open, Box.make, Box.open, no_arguments, raises_section])
def test_same_schema(function):
    assert get_json_schema(function) == reference_schema(function)


def test_schema_errors():
    def no_doc(x: int):
        pass

    def no_hint(x):
        """Doc.

        Args:
            x: it
        """

    def undescribed(x: int, y: int):
        """Doc.

        Args:
            x: it
        """

    def strange(x: np.ndarray):
        """Doc.

        Args:
            x: it
        """

    def one_tuple(x: tuple[int]):
        """Doc.

        Args:
            x: it
        """

    def forward(x: Nowhere):  # noqa: F821
        """Doc.

        Args:
            x: it
        """

    def choices(x: str):
        """Doc.

        Args:
            x: it (choices: tea, coffee)
        """

    for function, message in {
        forward: "forward: a type hint names .* 'Nowhere' is not defined",
        choices: r"choices: the choices of 'x' are tea, coffee; expected a JSON list",
    }.items():
        with pytest.raises(ToolSchemaError, match=message):
            get_json_schema(function)
        with pytest.raises((NameError, ValueError)):
            reference_schema(function)

    functions = {
        no_doc: "no docstring",
        no_hint: "'x' has no type hint",
        undescribed: "does not describe 'y'",
        strange: "has no JSON schema",
    }
    for function, message in {**functions, one_tuple: "has no JSON schema"}.items():
        with pytest.raises(ToolSchemaError, match=message):
            get_json_schema(function)
        with pytest.raises((DocstringParsingException, TypeHintParsingException)):
            reference_schema(function)
