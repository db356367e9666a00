"""The audit: strict facts have no leak, and each fact that changes shows as the leak it is."""

from __future__ import annotations

import json

import pytest

from stexp.evaluation.audit import audit, audit_foreign
from stexp.protocol import Protocol, protocol_named

STRICT = Protocol("strict")
FACTS = {
    "patient_of": {"A1": "A", "A2": "A", "B1": "B", "C1": "C", "D1": "D"},
    "train": ["B1", "C1"],
    "validation": ["D1"],
    "test": ["A1"],
    "reference": ["B1", "C1", "D1"],
    "panel_saw_test": [],
    "checkpoint": "best",
    "k_chosen_on": "validation",
    "published_settings": False,
    "spot_context": "neighbours",
}


def leaks(protocol: Protocol = STRICT, **changed) -> list[str]:
    found = audit(protocol, FACTS | changed)
    names = [item["name"] for item in found["items"] if item["leak"]]
    assert found["leaks"] == len(names)
    return names


def test_strict_has_no_leak():
    found = audit(STRICT, FACTS)
    assert found["leaks"] == 0 and found["protocol"] == "strict" and found["facts"] == FACTS
    assert len({item["name"] for item in found["items"]}) == len(found["items"]) == 11
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("changed", "leak"),
    [
        ({"train": ["A2", "B1"]}, "same_patient_in_training"),
        ({"reference": ["B1", "A2"]}, "same_patient_in_reference"),
        ({"validation": ["A2"]}, "same_patient_in_validation"),
        ({"panel_saw_test": ["A1"]}, "panel_saw_test"),
        ({"spot_context": "batch"}, "spot_embedding_depends_on_batch"),
        ({"k_chosen_on": "given", "published_settings": True}, "settings_chosen_on_test"),
    ],
)
def test_each_fact_gives_its_leak_alone(changed, leak):
    assert leaks(**changed) == [leak]


@pytest.mark.parametrize(
    ("protocol", "leak"),
    [
        (Protocol("x", heg="test"), "heg_saw_test"),
        (Protocol("x", truth="gene"), "truth_scaled_by_test_section"),
    ],
)
def test_each_switch_of_a_protocol_gives_its_leak_alone(protocol, leak):
    assert leaks(protocol) == [leak]


def test_a_checkpoint_chosen_on_the_test_section_is_two_leaks_and_a_last_one_is_no_choice():
    assert leaks(validation=["A1"]) == [
        "same_section_in_training",
        "same_patient_in_validation",
        "checkpoint_chosen_on_test",
    ]
    assert "checkpoint_chosen_on_test" not in leaks(validation=["A1"], checkpoint="last")


@pytest.mark.parametrize(
    "changed",
    [
        {"checkpoint": "last", "validation": []},
        {"k_chosen_on": "given"},  # by the user, of whom nothing is known
        {"published_settings": True},  # but k was chosen on validation spots
        {"panel_saw_test": []},
        {"spot_context": None},
        {"reference": []},
    ],
)
def test_what_is_no_leak_is_not_called_one(changed):
    assert leaks(**changed) == []


def test_each_detail_names_the_sections_and_says_the_state_it_is_in():
    clean = {item["name"]: item["detail"] for item in audit(STRICT, FACTS)["items"]}
    found = audit(STRICT, FACTS | {"train": ["B1", "A2"], "reference": ["A2", "A1"], "panel_saw_test": ["A1"]})
    leaky = {item["name"]: item["detail"] for item in found["items"]}
    assert leaky["same_patient_in_training"].endswith("test patient: A2")
    assert leaky["same_patient_in_reference"].endswith("test patient: A1, A2")
    assert leaky["panel_saw_test"].endswith("test section: A1")
    assert {name for name in clean if clean[name] != leaky[name]} == {
        "same_section_in_training",
        "same_patient_in_training",
        "same_patient_in_reference",
        "panel_saw_test",
    }
    last = {item["name"]: item["detail"] for item in audit(STRICT, FACTS | {"checkpoint": "last"})["items"]}
    assert "last checkpoint" in last["checkpoint_chosen_on_test"]


def test_of_another_cohort_no_more_is_said_than_holds():
    for saw, chooses in (([], True), (["A1"], False)):
        items = audit(STRICT, FACTS | {"cohorts": ["deep", "shallow"], "panel_saw_test": saw})["items"]
        detail = next(item["detail"] for item in items if item["name"] == "another_cohort")
        assert ("chooses genes" in detail) == chooses and detail.endswith("deep; shallow")


def test_every_section_of_a_held_out_patient_counts():
    assert leaks(test=["A1", "A2"]) == []
    assert leaks(test=["A1", "B1"], train=["C1"], reference=["C1", "D1"], panel_saw_test=[]) == []
    assert leaks(test=["A1", "B1"], panel_saw_test=["B1"], train=["C1"], reference=["C1"]) == ["panel_saw_test"]


def test_a_held_out_block_says_that_its_section_trains():
    blocks = protocol_named("blocks")
    facts = {"patient_of": {"A1": "A"}} | {role: ["A1"] for role in ("train", "validation", "test", "reference")}
    assert leaks(blocks, **facts) == [
        "same_section_in_training",
        "same_patient_in_training",
        "same_patient_in_reference",
        "same_patient_in_validation",
    ]


def test_the_papers_protocol_shows_what_the_paper_did():
    paper = protocol_named("paper")
    facts = {
        "train": ["A2", "B1", "C1", "D1"],
        "reference": ["A2", "B1", "C1", "D1"],
        "validation": [],
        "panel_saw_test": ["A1"],
        "checkpoint": "last",
        "k_chosen_on": "given",
        "published_settings": True,
        "spot_context": paper.spot_context,
    }
    assert leaks(paper, **facts) == [
        "same_patient_in_training",
        "same_patient_in_reference",
        "panel_saw_test",
        "heg_saw_test",
        "truth_scaled_by_test_section",
        "spot_embedding_depends_on_batch",
        "settings_chosen_on_test",
    ]


ELSEWHERE = {
    "patient_of": FACTS["patient_of"],
    "test": ["A1"],
    "panel_saw_test": [],
    "genes_by": "protocol",
    "genes_chosen_on": None,
    "copies": [{"sections": ["A1", "C1"], "words": "A1 and C1 (90% of the spots, by counts)"}],
}


@pytest.mark.parametrize(
    ("trained_on", "leak", "unknown"), [(["C1"], True, False), (["B1"], False, False), (None, False, True)]
)
def test_a_copy_of_the_test_is_a_leak_of_whoever_trained_on_it(trained_on, leak, unknown):
    judged = audit_foreign(STRICT, ELSEWHERE | {"trained_on": trained_on})
    (item,) = [item for item in judged["items"] if item["name"] == "copies_in_training"]
    assert (item["leak"], item.get("unknown", False)) == (leak, unknown)
    assert ("A1 and C1" in item["detail"]) == (leak or unknown)
    assert judged["leaks"] == leak and judged["unknown"] == (2 if unknown else 0)
