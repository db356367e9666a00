"""Genes that spreadsheets turned into dates (Ziemann et al. 2016, Genome Biology 17:177)."""

from __future__ import annotations

import re
from collections.abc import Iterable

MONTHS = {
    1: "jan janv ene gen",
    2: "feb fev févr fév",
    3: "mar mrz mär mars mrt marz",
    4: "apr avr abr",
    5: "may mai mag mei",
    6: "jun juin giu",
    7: "jul juil lug",
    8: "aug août aou ago",
    9: "sep sept set",
    10: "oct okt ott out",
    11: "nov",
    12: "dec dez déc dic",
}
"""How spreadsheets of several languages shorten months."""

_NUMBER_OF = {name: number for number, names in MONTHS.items() for name in names.split()}
_NAMES = "|".join(sorted(_NUMBER_OF, key=len, reverse=True))
_FORMS = (
    re.compile(
        rf"(?P<day>\d{{1,2}})[-. /]{{1,2}}(?P<name>{_NAMES})\.?(?:[-. /]+\d{{2,4}})?(?P<again>\.\d)?", re.IGNORECASE
    ),
    # a small first letter is a gene of the worm (sep-1, dec-2)
    re.compile(r"(?P<name>(?-i:[A-Z])\w+)\.?[- /](?P<day>\d{1,2})(?P<again>\.\d)?", re.IGNORECASE),
    re.compile(r"\d{4}-(?P<month>\d{2})-(?P<day>\d{2})(?:[ T]00:00:00)?(?P<again>\.\d)?"),
    re.compile(r"\d{1,2}[./]\d{1,2}[./](?:\d{4}|\d{2})(?P<again>)"),  # day or month first
)


def date_of(name: str) -> tuple[int, int] | None:
    """(month, day) where a name is a date; (0, 0) where it cannot be told which."""
    for form in _FORMS:
        match = form.fullmatch(name)
        if match is None:
            continue
        parts = match.groupdict()
        month = _NUMBER_OF.get(parts["name"].lower()) if parts.get("name") else int(parts.get("month") or 0)
        if month is None:
            continue  # HLA-2
        if parts["again"] or not parts.get("day"):
            return 0, 0
        return month, int(parts["day"])
    return None


def gene_of(name: str, others: Iterable[str]) -> str | None:
    """The gene that became this date, where only one can have; spelt as the species of the others spells genes.

    Notes
    -----
    SEPT1 to SEPT14 are SEPTIN1 to SEPTIN14 today, MARCH3 to MARCH11 are MARCHF3 to MARCHF11. The first two of March
    may have been MARCH1 or MARC1, MARCH2 or MARC2; 15-Sep was SEP15 (SELENOF), 1-Dec DEC1, a name of two genes.
    """
    month, day = date_of(name) or (0, 0)
    if month == 9 and 1 <= day <= 14:
        gene = f"SEPTIN{day}"
    elif month == 3 and 3 <= day <= 11:
        gene = f"MARCHF{day}"
    else:
        return None
    words = [other for other in others if other[:1].isalpha() and len(other) > 2 and date_of(other) is None]
    capitals = sum(word.upper() == word for word in words)
    return gene if 2 * capitals >= len(words) else gene.capitalize()
