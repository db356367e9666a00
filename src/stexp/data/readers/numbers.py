"""Numbers as programs of several countries write them: decimal sign, and signs between thousands."""

from __future__ import annotations

import logging
import re

import pandas as pd

from stexp.errors import InputError

log = logging.getLogger(__name__)

BLANKS = r"['’\u00a0\u2009\u202f ]"
"""Between thousands and nowhere else: apostrophe, no-break, thin and common space."""
BETWEEN_THOUSANDS = re.compile(rf"[+-]?\d{{1,3}}(?:{BLANKS}\d{{3}})+(?:\.\d+)?")
DECIMAL_COMMA = re.compile(rf"[+-]?\d+(?:{BLANKS}\d{{3}})*,\d+(?:[eE][+-]?\d+)?")
# either thousands or three decimals; three decimals, and nothing else; a whole number that has no thousands divided
EITHER = r"[+-]?[1-9]\d{{0,2}}(?:{0}\d{{3}})+"
THREE_DECIMALS = r"[+-]?(?:0|[1-9]\d{{3,}}){0}\d{{3}}"
UNDIVIDED = r"[+-]?[1-9]\d{3,}"
DECIMALS = r"[+-]?\d*{0}\d*(?:[eE][+-]?\d+)?"


def check_thousands(table: pd.DataFrame, where: str, signs: str = ".,") -> None:
    """Refuse cells such as ``1.800``, which may be 1800 and 1.8, unless others say which.

    A column says that the sign is decimal where one of its numbers can be nothing else (``2.5``), or is above 1000
    without a sign; the table does where one of it has three decimals for sure (``0.125``).
    """
    columns = {i: table.iloc[:, i].dropna().str.strip() for i in range(table.shape[1]) if _is_text(table.iloc[:, i])}
    for sign in signs:
        either, three, decimals = (form.format(re.escape(sign)) for form in (EITHER, THREE_DECIMALS, DECIMALS))
        both = {i: cells[cells.str.fullmatch(either)] for i, cells in columns.items()}
        if all(cells.empty for cells in both.values()) or any(
            cells.str.fullmatch(three).any() for cells in columns.values()
        ):
            continue
        for i, cells in columns.items():
            others = cells.drop(both[i].index)
            if len(both[i]) and not (others.str.fullmatch(decimals) | others.str.fullmatch(UNDIVIDED)).any():
                value = both[i].iloc[0]
                head = table.columns[i] if isinstance(table.columns[i], str) else table.iloc[0, i]
                raise InputError(
                    f"{where}: in {value} the {'comma' if sign == ',' else 'point'} may divide thousands or be a "
                    f"decimal sign (column {head}: {value.replace(sign, '')} or {value.replace(sign, '.', 1)}); "
                    f"numbers without it, or with other than three decimals, would fit"
                )


def decimal_points(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """The table with ``30.5`` for cells of text such as ``30,5``, which is said; `check_thousands` for commas."""
    check_thousands(table, where, ",")
    return _replaced(table, DECIMAL_COMMA, ",", ".", f"{where} has decimal commas")


def without_blanks(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """The table with ``1800`` for cells of text such as ``1 800`` and ``1'800``, which is said."""
    return _replaced(table, BETWEEN_THOUSANDS, BLANKS, "", f"{where} has thousands divided")


def _replaced(table: pd.DataFrame, form: re.Pattern, sign: str, by: str, what: str) -> pd.DataFrame:
    table, example = table.copy(), None
    for i in range(table.shape[1]):
        column = table.iloc[:, i]
        if _is_text(column):
            fits = column.str.strip().str.fullmatch(form).fillna(False).astype(bool)
            if fits.any():
                example = example or column[fits].iloc[0].strip()
                table.isetitem(i, column.where(~fits, column.str.replace(sign, by, regex=True)))
    if example:
        log.warning("%s (%s); read so", what, example)
    return table


def _is_text(column: pd.Series) -> bool:
    if pd.api.types.is_string_dtype(column.dtype):
        return True
    return pd.api.types.is_object_dtype(column.dtype) and pd.api.types.infer_dtype(column, skipna=True) == "string"
