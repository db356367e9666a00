"""What an annotation lets through, against obvious ranges; the line that is said of the rest."""

from __future__ import annotations

import inspect
import math
import sys
from dataclasses import dataclass, replace
from typing import Literal, NotRequired

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import TypedDict

from stexp import arguments
from stexp.arguments import (
    Colour,
    Count,
    Depth,
    Odd,
    Positive,
    Rate,
    Share,
    Whole,
    check,
    check_fields,
    check_keys,
    checked,
)
from stexp.errors import InputError


def fits(value, annotation) -> bool:
    try:
        check("model.x", value, annotation)
    except InputError as error:
        assert str(error).startswith("model.x=") and "\n" not in str(error) and len(str(error)) < 300
        return False
    return True


def is_number(value) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


OBVIOUS = {
    "Count": lambda x: type(x) is int and 1 <= x < 2**31,
    "Whole": lambda x: type(x) is int and 0 <= x < 2**31,
    "Seed": lambda x: type(x) is int and 0 <= x < 2**32,
    "Pixels": lambda x: type(x) is int and 1 <= x <= 16384,
    "Width": lambda x: type(x) is int and 1 <= x <= 65536,
    "Depth": lambda x: type(x) is int and 1 <= x <= 1000,
    "OptionalDepth": lambda x: type(x) is int and 0 <= x <= 1000,
    "Odd": lambda x: type(x) is int and 1 <= x <= 999 and x % 2 == 1,
    "Share": lambda x: is_number(x) and 0 <= x <= 1,
    "OpenShare": lambda x: is_number(x) and 0 <= x < 1,
    "Between": lambda x: is_number(x) and 0 < x < 1,
    "Rate": lambda x: is_number(x) and 0 < x <= 1,
    "Positive": lambda x: is_number(x) and 0 < x <= 1e12,
    "NotNegative": lambda x: is_number(x) and 0 <= x <= 1e12,
    "Weight": lambda x: is_number(x) and 0 <= x <= 1e6,
}
EDGES = [-1, 0, 1, 2, 999, 1000, 1001, 16384, 16385, 65536, 65537, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 10**400]
EDGES += [0.0, -0.0, 0.5, 1.0, 3.0, 1e6, 1e12, 1e300, math.inf, -math.inf, math.nan, -1e-9, 1e-9, 1 - 1e-9, 1 + 1e-9]
EDGES += [True, False, None, "", "1", "0.5", "auto", [], [1], (1,), {}, {"a": 1}, 1j, b"1"]
ANYTHING = st.one_of(
    st.sampled_from(EDGES),
    st.integers(-5, 2000),
    st.integers(),
    st.floats(),
    st.floats(-1, 2),
    st.text(max_size=5),
    st.none() | st.booleans() | st.binary(max_size=3) | st.lists(st.integers(), max_size=3),
)


@pytest.mark.parametrize("name", OBVIOUS)
def test_ranges_are_what_their_names_say(name):
    annotation, obvious = getattr(arguments, name), OBVIOUS[name]
    for value in EDGES:
        assert fits(value, annotation) == obvious(value), value

    @given(ANYTHING)
    def agree(value):
        assert fits(value, annotation) == obvious(value)
        assert fits(value, annotation | None) == (value is None or obvious(value))
        assert fits([value], list[annotation]) == obvious(value)
        assert fits(value, annotation | Literal["auto"]) == (obvious(value) or value == "auto")

    agree()


@given(ANYTHING)
def test_builtins_are_not_coerced(value):
    assert fits(value, bool) == (type(value) is bool)
    assert fits(value, str) == (type(value) is str)
    assert fits(value, int) == (type(value) is int)
    assert fits(value, float) == (is_number(value) and abs(value) <= sys.float_info.max)
    assert fits(value, Literal["auto", "none"]) == (value in ("auto", "none"))
    assert fits(value, dict) == (type(value) is dict)


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        (0, Count, "0: a whole number of at least 1 would fit"),
        ("3", Count, "'3': a whole number of at least 1 would fit"),
        (True, Count, "true: a whole number of at least 1 would fit"),
        (10**9, Depth, "1000000000: a whole number from 1 to 1000 would fit"),
        (None, Count | Literal["auto"], "null: a whole number of at least 1 or auto would fit"),
        ("autp", Count | Literal["auto"], "autp: a whole number of at least 1 or auto would fit; did you mean auto?"),
        ("coosine", Literal["cosine", "l1", "l2"], "coosine: choose cosine, l1 or l2; did you mean cosine?"),
        ("x", Literal["a", "b"] | None, "x: choose a, b or null"),
        (0.0, Rate, "0.0: a number above 0, up to 1 would fit"),
        (1.5, Share, "1.5: a number from 0 to 1 would fit"),
        (math.nan, Positive, "nan: a number above 0 would fit"),
        (-1, Whole, "-1: a whole number of at least 0 would fit"),
        (4, Odd | None, "4: an odd whole number from 1 to 999 or null would fit"),
        ([1, 0], list[Count] | tuple[Count, ...], "[1, 0]: a list, each a whole number of at least 1, would fit"),
        ([0.5, 0.5], Colour, "[0.5, 0.5]: three numbers, of red, green and blue, would fit"),
        ("yes", bool, "yes: true or false would fit"),
    ],
)
def test_the_line_names_the_value_and_what_would_fit(value, annotation, message):
    with pytest.raises(InputError) as caught:
        check("model.x", value, annotation)
    assert str(caught.value) == f"model.x={message}"


def test_a_long_value_stays_one_short_line():
    with pytest.raises(InputError, match=r"^x=\[0, 0") as caught:
        check("x", [0] * 10_000 + ["\n"], list[int])
    assert len(str(caught.value)) < 200


class Method:
    """A method like any."""

    @checked("model")
    def __init__(
        self, encoder: torch.nn.Module, n: Count, *, kind: Literal["a", "b"] = "a", share: Share = 0, bias=True, **more
    ) -> None:
        self.all = (encoder, n, kind, share, bias, more)


def test_what_fits_arrives_as_it_was_given():
    for plain in ("no module", None, torch.nn.Identity()):  # its annotation is not plain
        assert Method(plain, 3, kind="b", share=1, bias="any", other=-1).all == (
            *(plain, 3, "b", 1, "any"),
            {"other": -1},
        )
    assert type(Method(None, 1, share=1).all[3]) is int
    assert Method(None, n=2).all[1:4] == (2, "a", 0)


def test_the_first_argument_that_does_not_fit_is_said_and_nothing_is_made():
    with pytest.raises(InputError, match=r"^model\.n=0: "):
        Method(None, 0, kind="c")
    with pytest.raises(InputError, match=r"^model\.kind=c: choose a or b"):
        Method(None, 1, kind="c")


def test_a_call_that_python_refuses_is_a_type_error():
    for args, kwargs in (((), {}), ((1, 2, 3), {}), ((1, 2), {"n": 3})):
        with pytest.raises(TypeError):
            Method(*args, **kwargs)


def test_the_signature_is_that_of_what_is_decorated():
    assert list(inspect.signature(Method).parameters) == ["encoder", "n", "kind", "share", "bias", "more"]
    assert Method.__init__.__qualname__ == "Method.__init__"


@checked("part")
@dataclass(frozen=True)
class Part:
    size: Count
    share: Share | None = None


def test_a_dataclass_is_checked_when_it_is_made_and_when_it_is_replaced():
    part = Part(2, share=0.5)
    assert part == Part(size=2, share=0.5) and hash(part) == hash(Part(2, 0.5))
    with pytest.raises(InputError, match=r"^part\.size=0: "):
        replace(part, size=0)
    with pytest.raises(InputError, match=r"^part\.share=nan: "):
        replace(part, share=math.nan)


def test_functions_and_arrays():
    @checked()
    def scale(values: np.ndarray, by: Positive) -> np.ndarray:
        return values * by

    np.testing.assert_array_equal(scale(np.arange(3), 2), [0, 2, 4])
    with pytest.raises(InputError, match=r"^by=-1: "):
        scale(np.arange(3), -1)


def test_keys_that_a_function_does_not_take_or_lacks():
    check_keys(Part, ["size"], "part")
    check_keys(Method, ["encoder", "n", "whatever"], "method")
    with pytest.raises(InputError, match=r"^part takes no key 'sice'; did you mean size\?$"):
        check_keys(Part, ["sice"], "part")
    with pytest.raises(InputError, match=r"^part lacks the key 'size'$"):
        check_keys(Part, ["share"], "part")


def test_every_default_of_a_checked_class_fits_its_own_range():
    from stexp.data.datamodule import SpotDataModule
    from stexp.models import (
        bleep,
        deepspot,
        egn,
        heclip,
        hest_ridge,
        hist2st,
        histogene,
        m2ort,
        mclstexp,
        sepal,
        stflow,
        stgchb,
        stnet,
        thitogene,
        triplex,
    )
    from stexp.models.encoders.image import ImageEncoder
    from stexp.protocol import Protocol
    from stexp.training.loggers import WandbRun

    methods = (bleep.BLEEP, egn.EGN, hest_ridge.HestRidge, hist2st.Hist2ST, histogene.HisToGene, mclstexp.MclSTExp)
    methods += (deepspot.DeepSpot, m2ort.M2ORT, sepal.SEPAL, stflow.STFlow, stnet.STNet, thitogene.THItoGene)
    methods += (triplex.Triplex,)
    methods += (heclip.HECLIP, stgchb.STGCHB)
    for checked_class in (*methods, SpotDataModule, ImageEncoder, Protocol, WandbRun):
        init = inspect.unwrap(checked_class.__init__)
        hints = inspect.get_annotations(init, eval_str=True)
        assert checked_class.__init__ is not init, checked_class
        for name, parameter in inspect.signature(init).parameters.items():
            if parameter.default is not parameter.empty and arguments._is_plain(hints[name]):
                check(name, parameter.default, hints[name])


class Inner(TypedDict):
    n: Count
    share: NotRequired[Share | None]


class Outer(TypedDict):
    name: str
    parts: dict[str, list[Inner]]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"name": "x", "parts": {"a": [{"n": 1, "share": None, "more": object()}]}}, None),
        ([], r"x.json: \[\]: input should be a valid dictionary; again"),
        ({"parts": {"a": [{}]}}, "x.json has no name, parts.a.0.n; again"),
        ({"name": "x", "parts": {"a": [{"n": True}]}}, "x.json: parts.a.0.n=true: input should be a valid integer"),
        (
            {"name": "x", "parts": {"a\n": [{"n": 0}]}},
            r"parts\.a\\n\.0\.n=0: input should be greater than or equal to 1",
        ),
        ({"name": "x", "parts": {"a": [{"n": 1, "share": math.nan}]}}, r"parts\.a\.0\.share=NaN: "),
        ({"name": "x" * 999, "parts": "y" * 999}, "parts="),
    ],
)
def test_documents_are_held_against_their_fields(content, says):
    if says is None:
        check_fields("x.json", content, Outer, "again")
        return
    with pytest.raises(InputError, match=says) as caught:
        check_fields("x.json", content, Outer, "again")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
