"""What a run was allowed to see that it should not have seen."""

from __future__ import annotations

from stexp.protocol import Protocol


def audit(protocol: Protocol, facts: dict) -> dict:
    """List every leak of a run by name.

    Parameters
    ----------
    facts
        ``patient_of``: section -> patient; ``train``, ``validation``, ``test``, ``reference``: sections in
        each role (reference: those retrieved from); ``began_at``: the model whose weights training began at, if any,
        which is refused where it saw what is held out; ``panel_saw_test``: test sections that chose the panel;
        ``checkpoint``: ``best`` (on validation) or ``last``; ``k_chosen_on``: ``validation``, ``given`` or
        ``after_scoring``;
        ``published_settings``: whether k is that of a publication, which chose it on its test folds;
        ``spot_context``: of the method, or None; ``copies``: sections across train and test that share spots, in words;
        ``cohorts``: of each of two cohorts, depth, detection and scale, in words.

    Returns
    -------
    dict
        ``protocol``, ``leaks`` (how many), ``items`` with ``name``, ``leak``, ``detail``, and the facts.
    """
    test = set(facts["test"])
    training, reference, validation = (_same_patient(facts, role) for role in ("train", "reference", "validation"))
    saw, watched = sorted(facts["panel_saw_test"]), sorted(test & set(facts["validation"]))
    shared = sorted(test & {*facts["train"], *facts["reference"], *facts["validation"]})
    if protocol.hold_out == "block":
        watched = []  # another block of the same section
    items = [
        _item(
            "same_section_in_training",
            bool(shared),
            f"other parts of the test section train, validate or are retrieved from: {', '.join(shared)}; scores say "
            "how well a section is filled in, not how well another one is predicted",
            "the test section is in no other role",
        ),
        _item(
            "same_patient_in_training",
            bool(training),
            f"training contains sections of the test patient: {', '.join(training)}",
            "no section of a test patient is in training",
        ),
        _item(
            "same_patient_in_reference",
            bool(reference),
            f"expression is retrieved from sections of the test patient: {', '.join(reference)}",
            "no section of a test patient is retrieved from",
        ),
        _item(
            "same_patient_in_validation",
            bool(validation),
            f"the checkpoint was chosen on sections of the test patient: {', '.join(validation)}",
            "no section of a test patient is in validation",
        ),
        _copies_in_training(facts.get("copies", [])),
        _panel(saw),
        *_of_protocol(protocol),
        _item(
            "spot_embedding_depends_on_batch",
            facts["spot_context"] == "batch",
            "a reference spot's embedding depends on which spots share its batch, other sections included",
            "a reference spot's embedding depends on its own section alone",
        ),
        _item(
            "checkpoint_chosen_on_test",
            facts["checkpoint"] == "best" and bool(watched),
            f"the checkpoint was chosen on the test section: {', '.join(watched)}",
            "the checkpoint was chosen on validation spots"
            if facts["checkpoint"] == "best"
            else "the last checkpoint was used, without a choice",
        ),
        _item(
            "settings_chosen_on_test",
            facts["k_chosen_on"] == "after_scoring"
            or (facts["k_chosen_on"] == "given" and facts["published_settings"]),
            "retrieval was changed after the test sections had been scored"
            if facts["k_chosen_on"] == "after_scoring"
            else "k and the other settings are the published ones, chosen on the test folds of the paper",
            _settings(facts),
        ),
    ]
    if facts.get("cohorts"):
        chooses = "trains or validates" if saw else "trains, validates or chooses genes"
        items.append(_another_cohort(facts, f"all that is tested is of another data set, and nothing of it {chooses}"))
    if facts.get("began_at") is not None:
        of_it = f"training began at {facts['began_at']}"
        items.append(_item("base_saw_test", False, of_it, f"{of_it}, which saw no file of what is held out"))
    return {"protocol": protocol.name, "leaks": sum(i["leak"] for i in items), "items": items, "facts": facts}


def audit_foreign(protocol: Protocol, facts: dict) -> dict:
    """List every leak of predictions that another tool made, as far as is stated, and what is not stated.

    Parameters
    ----------
    facts
        ``patient_of``: section -> patient, of the whole data set; ``test``: sections; ``panel_saw_test``: test sections
        that chose the panel; ``trained_on``: sections that the method was trained, validated or tuned on, or None where
        that is not stated; ``genes_by``: ``protocol``, or ``predictions`` where which genes are scored depends on what
        was predicted; ``genes_chosen_on``: sections that these were chosen on, or None; ``copies``: pairs of a held-out
        section and another one that share spots, ``sections`` and in ``words``; ``cohorts``: as there.

    Returns
    -------
    dict
        As :func:`audit`; besides ``unknown``: how many items cannot be judged, each of which has ``unknown``.
    """
    test, stated = set(facts["test"]), facts["trained_on"] is not None
    facts = facts | {"train": facts["trained_on"] or [], "validation": [], "reference": []}
    shared, training = sorted(test & set(facts["train"])), _same_patient(facts, "train")
    if stated:
        items = [
            _item(
                "same_section_in_training",
                bool(shared),
                f"by the statement of who predicted, training saw test sections: {', '.join(shared)}",
                "by the statement of who predicted, training saw no test section",
            ),
            _item(
                "same_patient_in_training",
                bool(training),
                f"by the statement of who predicted, training saw sections of the test patient: {', '.join(training)}",
                "by the statement of who predicted, training saw no section of a test patient",
            ),
        ]
    else:
        items = [
            _unknown(
                "training_sections_not_stated",
                "training sections not stated: whether training, or the choice of checkpoint and settings, saw the "
                "test sections or patients is not known (trained_on=[sections] states them)",
            )
        ]
    items += _copies(facts["copies"], set(facts["train"]) if stated else None)
    facts["copies"] = [pair["words"] for pair in facts["copies"]]
    chosen_on, saw = facts["genes_chosen_on"], set(facts["panel_saw_test"])
    if saw or facts["genes_by"] == "protocol" or chosen_on is not None:
        items.append(_panel(sorted(saw | (test & set(chosen_on or [])))))
    if facts["genes_by"] == "predictions" and chosen_on is None:
        items.append(
            _unknown(
                "choice_of_genes_not_stated",
                "which genes are scored was chosen by who predicted, on sections that are not stated "
                "(genes_chosen_on=[sections] states them)",
            )
        )
    items += _of_protocol(protocol)
    if facts.get("cohorts"):
        items.append(_another_cohort(facts, "the floors learn from another data set than what is tested is of"))
    return {
        "protocol": protocol.name,
        "leaks": sum(item["leak"] for item in items),
        "unknown": sum(item.get("unknown", False) for item in items),
        "items": items,
        "facts": facts,
    }


def _another_cohort(facts: dict, what: str) -> dict:
    differences = f"what differs between laboratories is part of the score: {'; '.join(facts['cohorts'])}"
    return _item("another_cohort", False, "", f"{what} ({', '.join(sorted(facts['test']))}); {differences}")


def _copies_in_training(copies: list[str]) -> dict:
    return _item(
        "copies_in_training",
        bool(copies),
        f"sections are held out and train under another name: {', '.join(copies)}",
        "no section of the test shares counts or tiles with one that trains",
    )


def _copies(pairs: list[dict], trained_on: set[str] | None) -> list[dict]:
    """Items on sections that are held out and lie in the data under another name, too."""
    if trained_on is not None:
        return [_copies_in_training([pair["words"] for pair in pairs if trained_on & set(pair["sections"])])]
    if not pairs:
        return []
    words = ", ".join(pair["words"] for pair in pairs)
    detail = f"sections are held out and lie in the data under another name, which may have trained: {words}"
    return [_unknown("copies_in_training", detail)]


def _settings(facts: dict) -> str:
    """Who chose the settings, where it was nobody who saw the test."""
    if facts["k_chosen_on"] == "validation":
        return "k was chosen on validation spots"
    if facts["reference"]:
        return "k was given by the user"
    return "settings were given by the user, or chosen by the method on the training side"


def _item(name: str, leak: bool, if_leak: str, if_clean: str) -> dict:
    return {"name": name, "leak": bool(leak), "detail": if_leak if leak else if_clean}


def _unknown(name: str, detail: str) -> dict:
    return {"name": name, "leak": False, "unknown": True, "detail": detail}


def _same_patient(facts: dict, role: str) -> list[str]:
    """Sections of a role that are of a test patient."""
    patient_of = facts["patient_of"]
    test_patients = {patient_of[name] for name in facts["test"]}
    return sorted(name for name in facts[role] if patient_of[name] in test_patients)


def _panel(saw: list[str]) -> dict:
    return _item(
        "panel_saw_test",
        bool(saw),
        f"the predicted genes were chosen with the test section: {', '.join(saw)}",
        "the predicted genes were chosen on training sections",
    )


def _of_protocol(protocol: Protocol) -> list[dict]:
    """What a protocol lets the truth and the highest genes depend on."""
    return [
        _item(
            "heg_saw_test",
            protocol.heg == "test",
            "the 50 highest genes are those of the test section itself",
            "the 50 highest genes are those of the training spots",
        ),
        _item(
            "truth_scaled_by_test_section",
            protocol.truth == "gene",
            "each gene of the truth is scaled by its total over the test section: sequencing depth stays in it",
            "the truth is how far a gene is from its share in the section: how high it is there is no part of it"
            if protocol.truth == "residuals"
            else "each spot of the truth is scaled by its own counts alone",
        ),
    ]
