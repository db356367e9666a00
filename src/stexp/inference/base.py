"""A trained model that another training begins at, and what it may not have seen."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stexp import construct
from stexp.arguments import check_fields
from stexp.data.datamodule import SpotDataModule
from stexp.data.digests import file_digest
from stexp.data.duplicates import files_on_record, prints_of, spots_on_record
from stexp.data.section import Section
from stexp.errors import InputError
from stexp.evaluation.records import SpotHashes, Spots, read_audit, read_provenance
from stexp.inference import hub, model_facts, model_folder, training_slides
from stexp.inference.description import build_encoder, without_weights
from stexp.inference.rebuild import class_of_method
from stexp.protocol import Protocol
from stexp.runs.folder import RunFolder
from stexp.training.checkpoints import load_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """What a training needs of the model that it begins at.

    Attributes
    ----------
    source
        As it was named: a folder, or ``owner/name`` on the hub.
    node
        ``_target_`` and arguments of its method; its image encoder without weights of its own.
    panel, weights
        Genes, and tensors of the method.
    encoder
        That of the frozen features it reads, ``(node, weights)``; or ``(node, None)`` of a run, whose config names it.
    seed
        Of a run: that of random weights.
    tile, stain, protocol
        As it was trained.
    record
        What is kept of it beside the runs that it begins: digest, data, sections and content of their files, and the
        same of the model that it began at itself. Plain values.
    """

    source: str
    method: str
    node: dict[str, Any]
    panel: list[str]
    weights: dict[str, torch.Tensor] = field(repr=False)
    encoder: tuple[dict[str, Any], dict[str, torch.Tensor] | None] | None
    seed: int | None
    tile: tuple[int, float | None]
    stain: str | None
    protocol: Protocol
    record: dict[str, Any] = field(repr=False)

    @property
    def config(self) -> dict[str, Any]:
        """What the config of a run says of it."""
        return {"model": self.source, "digest": self.record["digest"]}

    def refuse(self, reason: str) -> InputError:
        return InputError(f"from={self.source}: {reason}")


def read_base(source: str | Path) -> Base:
    """A model to begin at: an exported folder, ``owner/name`` on the hub, or the folder of a finished run.

    Raises
    ------
    InputError
        None of them, or one that is damaged.
    """
    if hub.names_repository(source):
        return _of_model(hub.fetch_model(str(source)), str(source))
    path = Path(source).expanduser()
    if not path.is_dir():
        raise InputError(f"from={source}: no such folder; a model of stexp-export, a run, or owner/name would fit")
    return _of_run(path) if (path / "config.yaml").is_file() else _of_model(path, str(source))


def _of_model(folder: Path, source: str) -> Base:
    exported = model_folder.read(folder)
    facts = exported.facts
    model_facts.check(facts)
    weights = {key.removeprefix("model."): value for key, value in exported.weights.items() if key.startswith("model.")}
    looks = {name: look["thumbnail"] for name, look in facts["looks"].items() if "thumbnail" in look}
    record = _record(source, facts["digest"], facts["data"], facts["fold"], facts["trained"], looks)
    return Base(
        source,
        facts["method"],
        facts["model"],
        facts["panel"],
        weights,
        encoder=facts["features_by"] and (facts["features_by"], exported.weights),
        seed=None,
        tile=(facts["tile"]["px"], facts["tile"]["um"]),
        stain=(facts["stain"] or {}).get("method"),
        protocol=Protocol(**facts["protocol"]),
        record=record,
    )


def _of_run(path: Path) -> Base:
    folder = RunFolder(path)
    config, checkpoint = folder.config, load_checkpoint(folder.checkpoint)
    state, node = checkpoint["SpotDataModule"], dict(config["model"])
    if "image_encoder" in node:
        node["image_encoder"] = without_weights(node["image_encoder"], build_encoder(node["image_encoder"], bare=True))
    provenance = read_provenance(path)
    roles = read_audit(path)["facts"]
    sections = {role: roles[role] for role in ("train", "validation", "test", "reference")}
    trained = {**provenance, "sections": sections}
    digest = file_digest(folder.checkpoint)
    return Base(
        str(path),
        node.pop("name"),
        node,
        state["panel"],
        checkpoint["state_dict"],
        encoder=(config["image_encoder"], None),
        seed=config["seed"],
        tile=(state["tile_px"], state["tile_um"]),
        stain=(state["stain"] or {}).get("method"),
        protocol=folder.protocol,
        record=_record(str(path), digest, config["data"]["name"], str(config["fold"]), trained, {}),
    )


def _record(
    source: str, digest: str, data: str, fold: str, trained: Mapping[str, Any], looks: Mapping[str, str]
) -> dict[str, Any]:
    keys = ("sections", "data_manifest", "spots", "from")
    about = {"model": source, "digest": digest, "data": data, "fold": fold, "looks": dict(looks)}
    return about | {key: trained.get(key) for key in keys}


def check_method(base: Base, node: Mapping[str, Any]) -> None:
    """InputError unless a config's method is the base's, and one that goes on from weights."""
    own, other = (construct.MOVED.get(str(each["_target_"]), str(each["_target_"])) for each in (base.node, node))
    if own != other:
        raise base.refuse(f"its method is {base.method}, not {node.get('name', other)}; model={base.method} would fit")
    if not class_of_method(node).fine_tunes:
        raise base.refuse(f"{base.method} is fitted anew to all its data; without from= it is trained on these")


def check_data(base: Base, data: SpotDataModule) -> None:
    """Refuse a model that has seen what is held out, and say what differs between its data and these.

    Raises
    ------
    InputError
        A section that is held out, or with whole patients held out one of their sections, trained it or one of the
        models that it began at: by the content of its files, the counts of its spots, or the look of its slide.
    """
    seen = _seen(base, data.sections)
    _refuse_held_out(base, data, seen)
    validated = sorted(set(seen) & set(data.names("validation")))
    if validated:
        log.warning("from=%s was trained on %s, which now validate: validation flatters", base.source, validated)
    for what, before, now in (
        ("tiles (px, um)", base.tile, (data.tile.px, data.tile.um)),
        ("stain", base.stain, data.stain),
        ("scale of the expression", base.protocol.scale, data.protocol.scale),
    ):
        if before != now:
            log.warning("from=%s: its %s was %s, here it is %s", base.source, what, before, now)


def check_tiles(base: Base, data: SpotDataModule, tiles: Mapping[str, np.ndarray]) -> None:
    """`check_data` by the `tile_prints` of sections, which are there once their tiles are cut."""
    prints = {section.name: prints_of(section) for section in data.sections if section.name in tiles}
    records = [spots for record in _lineage(base.record) for spots in _spots_of(base, record)]
    seen = {
        name: "by its tiles"
        for name, counts in prints.items()
        if any(spots_on_record(spots, counts, tiles[name]) for spots in records)
    }
    _refuse_held_out(base, data, seen)


def _refuse_held_out(base: Base, data: SpotDataModule, seen: Mapping[str, str]) -> None:
    test = set(data.names("test"))
    of_patient = {section.name: section.patient for section in data.sections}
    whole_patients = data.protocol.hold_out in ("patient", "cohort")
    if whole_patients:
        held_out = {of_patient[name] for name in test}
        leaks = sorted(name for name in seen if of_patient[name] in held_out)
    else:
        leaks = sorted(set(seen) & test)
    if leaks:
        raise base.refuse(
            f"it was trained on {', '.join(leaks[:5])} ({seen[leaks[0]]}), and fold={data.fold} holds out "
            f"{'a patient of them' if whole_patients else 'that'}: no score would mean anything; "
            f"a fold, or a model, of other patients would fit"
        )


def _seen(base: Base, sections: Sequence[Section]) -> dict[str, str]:
    """Sections that are known to have trained the base or a model before it -> how."""
    seen: dict[str, str] = {}
    counts = {section.name: prints_of(section) for section in sections}
    for record in _lineage(base.record):
        spots, looks = _spots_of(base, record), record.get("looks")
        texts = {name: text for name, text in looks.items() if isinstance(text, str)} if isinstance(looks, dict) else {}
        trained = _trained(record)
        for name, others in files_on_record(_files_of(record), sections).items():
            if not others.isdisjoint(trained):
                seen.setdefault(name, "by its files")
        for section in sections:
            if any(spots_on_record(of_section, counts[section.name]) for of_section in spots):
                seen.setdefault(section.name, "by the counts of its spots")
            elif section.name not in seen and _looks_alike(section, texts):
                seen[section.name] = "by the look of its slide"
    return seen


def _looks_alike(section: Section, looks: Mapping[str, str]) -> bool:
    if section.slide is None or not looks:
        return False
    return bool(training_slides.by_look(training_slides.fingerprint(section.slide), looks))


def _files_of(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Section -> file -> digest, of all sections that were read; nothing of models of earlier versions."""
    manifest = record.get("data_manifest")
    if not isinstance(manifest, dict):
        return {}
    return {name: files for name, files in manifest.items() if isinstance(files, dict)}


def _trained(record: Mapping[str, Any]) -> set[str]:
    """Sections that trained, validated or were retrieved from."""
    roles = record.get("sections")
    lists = [roles.get(role) for role in training_slides.ROLES] if isinstance(roles, dict) else []
    return {name for names in lists if isinstance(names, list) for name in names}


def _spots_of(base: Base, record: Mapping[str, Any]) -> list[SpotHashes]:
    """What is on record of the spots of each section; nothing of models of earlier versions."""
    spots = record.get("spots") or {}
    check_fields(f"from={base.source}: its record of spots", spots, Spots, "train or export it again")
    return list(spots.values())


def _lineage(record: Any) -> Iterator[dict[str, Any]]:
    while isinstance(record, dict):
        yield record
        record = record.get("from")
