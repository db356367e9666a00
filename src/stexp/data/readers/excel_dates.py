"""Genes that spreadsheets turned into dates (Ziemann et al. 2016, Genome Biology 17:177)."""

from __future__ import annotations

import re
from collections.abc import Iterable

MONTHS = (
    "january januar janvier enero gennaio janeiro januari január gener leden stycznia styczeń января січня ocak "
    "ιανουαρίου siječanj ianuarie tammikuu",
    "february februar février fevrier febrero febbraio fevereiro februari február febrer únor lutego luty февраля "
    "лютого şubat φεβρουαρίου veljača helmikuu",
    "march märz mrz maerz mars marzo março mrt maart març března březen marca marzec március марта березня mart "
    "μαρτίου ožujak martie maaliskuu",
    "april avril abril aprile április duben dubna kwietnia kwiecień апреля квітня nisan απριλίου travanj huhtikuu",
    "may mai mayo maggio maio mei maj maig május květen května мая май травня mayıs μαΐου svibanj toukokuu",
    "june juni juin junio giugno junho juny június červen června czerwca czerwiec июня червня haziran ιουνίου lipanj "
    "iunie kesäkuu",
    "july juli juillet julio luglio julho juliol július července červenec lipca lipiec июля липня temmuz ιουλίου iulie "
    "heinäkuu",
    "august août aout agosto augustus agost avgust srpen srpna sierpnia sierpień августа серпня ağustos αυγούστου "
    "kolovoz elokuu",
    "september septembre septiembre setiembre settembre setembro setembre szeptember września wrzesień zaří září "
    "сентября септември вересня eylül σεπτεμβρίου rujan septembrie syyskuu",
    "october oktober octobre octubre ottobre outubro október říjen října października październik октября жовтня ekim "
    "οκτωβρίου listopad lokakuu",
    "november novembre noviembre novembro listopadu ноября листопада kasım νοεμβρίου studeni noiembrie",
    "december dezember décembre decembre diciembre dicembre dezembro desember desembre prosinec prosince grudnia "
    "grudzień декабря грудня aralık δεκεμβρίου joulukuu",
)
"""How languages call the months, January first; spreadsheets write the names, or three letters or more of them."""

_DAY = r"(?P<day>\d{1,2})(?:\.|st|nd|rd|th|er|º)?"
_YEAR = r"(?:,?[-. /]+(?:de )?(?:\d{4}|\d{2})\.?)?"
_TIME = r"(?:[ T]\d{1,2}:\d{2}(?::\d{2})?(?:\.\d+)?Z?)?(?P<again>\.\d)?"  # pandas writes .1 after a name that is there
_FORMS = tuple(
    re.compile(form + _TIME, re.IGNORECASE)
    for form in (
        rf"{_DAY}[-. /]{{0,2}}(?<!\d)(?:de )?(?P<name>[^\W\d_]{{3,}})\.?{_YEAR}",
        # a small first letter is a gene of the worm (sep-1, dec-2)
        rf"(?P<name>(?-i:[A-Z]|[^\W\d_a-z])[^\W\d_]{{2,}})[-. /]{{1,2}}{_DAY}{_YEAR}",
        r"\d{4}[-./](?P<month>\d{1,2})[-./](?P<day>\d{1,2})",
        r"(?:\d{4}[年년] ?)?(?P<month>\d{1,2})[月월] ?(?P<day>\d{1,2})[日일]?",
        r"\d{1,2}[-./]\d{1,2}(?:[-./](?:\d{4}|\d{2}))?",  # day or month first
    )
)


def _months_of(word: str) -> set[int]:
    """The months that a word of three letters or more begins; several where languages differ (lis, listopad)."""
    word = word.lower()
    return {i + 1 for i, names in enumerate(MONTHS) if any(name.startswith(word) for name in names.split())}


def date_of(name: str) -> tuple[int, int] | None:
    """(month, day) where a name is a date; (0, 0) where it cannot be told which."""
    name = re.sub(r"^X(?=\d)", "", name)  # R writes X2.Sep
    for form in _FORMS:
        match = form.fullmatch(name)
        if match is None:
            continue
        parts = match.groupdict()
        months = _months_of(parts["name"]) if parts.get("name") else {int(parts.get("month") or 0)}
        if not months:
            continue  # HLA-2
        if parts["again"] or not parts.get("day") or len(months) > 1:
            return 0, 0
        return months.pop(), int(parts["day"])
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
