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
        ``spot_context``: of the method, or None.

    Returns
    -------
    dict
        ``protocol``, ``leaks`` (how many), ``items`` with ``name``, ``leak``, ``detail``, and the facts.
    """
    patient_of = facts["patient_of"]
    test = set(facts["test"])
    test_patients = {patient_of[name] for name in test}

    def same_patient(role: str) -> list[str]:
        return sorted(name for name in facts[role] if patient_of[name] in test_patients)

    def item(name: str, leak: bool, if_leak: str, if_clean: str) -> dict:
        return {"name": name, "leak": bool(leak), "detail": if_leak if leak else if_clean}

    training, reference, validation = (same_patient(role) for role in ("train", "reference", "validation"))
    saw, watched = sorted(facts["panel_saw_test"]), sorted(test & set(facts["validation"]))
    shared = sorted(test & {*facts["train"], *facts["reference"], *facts["validation"]})
    if protocol.hold_out == "block":
        watched = []  # another block of the same section
    items = [
        item(
            "same_section_in_training",
            bool(shared),
            f"other parts of the test section train, validate or are retrieved from: {', '.join(shared)}; scores say "
            "how well a section is filled in, not how well another one is predicted",
            "the test section is in no other role",
        ),
        item(
            "same_patient_in_training",
            bool(training),
            f"training contains sections of the test patient: {', '.join(training)}",
            "no section of a test patient is in training",
        ),
        item(
            "same_patient_in_reference",
            bool(reference),
            f"expression is retrieved from sections of the test patient: {', '.join(reference)}",
            "no section of a test patient is retrieved from",
        ),
        item(
            "same_patient_in_validation",
            bool(validation),
            f"the checkpoint was chosen on sections of the test patient: {', '.join(validation)}",
            "no section of a test patient is in validation",
        ),
        item(
            "panel_saw_test",
            bool(saw),
            f"the predicted genes were chosen with the test section: {', '.join(saw)}",
            "the predicted genes were chosen on training sections",
        ),
        item(
            "heg_saw_test",
            protocol.heg == "test",
            "the 50 highest genes are those of the test section itself",
            "the 50 highest genes are those of the training spots",
        ),
        item(
            "truth_scaled_by_test_section",
            protocol.truth == "gene",
            "each gene of the truth is scaled by its total over the test section: sequencing depth stays in it",
            "each spot of the truth is scaled by its own counts alone",
        ),
        item(
            "spot_embedding_depends_on_batch",
            facts["spot_context"] == "batch",
            "a reference spot's embedding depends on which spots share its batch, other sections included",
            "a reference spot's embedding depends on its own section alone",
        ),
        item(
            "checkpoint_chosen_on_test",
            facts["checkpoint"] == "best" and bool(watched),
            f"the checkpoint was chosen on the test section: {', '.join(watched)}",
            "the checkpoint was chosen on validation spots"
            if facts["checkpoint"] == "best"
            else "the last checkpoint was used, without a choice",
        ),
        item(
            "settings_chosen_on_test",
            facts["k_chosen_on"] == "after_scoring"
            or (facts["k_chosen_on"] == "given" and facts["published_settings"]),
            "retrieval was changed after the test sections had been scored"
            if facts["k_chosen_on"] == "after_scoring"
            else "k and the other settings are the published ones, chosen on the test folds of the paper",
            f"k was {'chosen on validation spots' if facts['k_chosen_on'] == 'validation' else 'given by the user'}",
        ),
    ]
    if facts.get("began_at") is not None:
        of_it = f"training began at {facts['began_at']}"
        items.append(item("base_saw_test", False, of_it, f"{of_it}, which saw no file of what is held out"))
    return {"protocol": protocol.name, "leaks": sum(i["leak"] for i in items), "items": items, "facts": facts}
