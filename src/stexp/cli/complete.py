"""``stexp-complete data=her2st known=spots share=0.1``: the rest of a section that is measured in part."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from stexp.arguments import Between, Seed, Whole, check
from stexp.config import build, command, to_plain
from stexp.config.compose import entry
from stexp.errors import InputError, did_you_mean, listed
from stexp.protocol import Protocol

if TYPE_CHECKING:  # which --help does without, here and in functions: pandas, anndata, torch
    import numpy as np

    from stexp.completion.problem import Problem
    from stexp.data.dataset import DataSet
    from stexp.data.section import Section
    from stexp.runs.provenance import Stages
    from stexp.training.machine import Machine

log = logging.getLogger(__name__)


@entry("complete")
def main(cfg: DictConfig) -> None:
    with command():
        if OmegaConf.is_missing(cfg, "known"):
            raise InputError(
                "known is not given: known=spots or known=genes, as in stexp-complete known=spots share=0.1"
            )
        config: dict[str, Any] = to_plain(cfg)
        check_options(config)  # which is said before seconds of imports
        from stexp.completion.problem import check_scale
        from stexp.data.dataset import DataSet
        from stexp.errors import UnknownName

        protocol, dataset = build(cfg.protocol), DataSet(config["data"])
        check_scale(protocol)
        dataset.panel(protocol)  # a file that is not there is said before sections are read
        sections = dataset.read_sections(protocol)
        names = [section.name for section in sections if section.slide is not None] or [s.name for s in sections]
        fold = names[0] if config["fold"] is None else str(config["fold"])
        if config["fold"] is None:
            log.info("fold=%s: the first of %s", fold, ", ".join(names))
        every = {section.name: section for section in sections}
        if fold != "all" and fold not in every:
            raise UnknownName(
                f"fold={fold} is no section of {dataset.name}; there are {', '.join(every)}{did_you_mean(fold, every)}",
                [fold],
                every,
                typed="fold={}",
            )
        for name in names if fold == "all" else [fold]:
            complete_section(every[name], sections, protocol, dataset, config, several=fold == "all")


def check_options(config: dict[str, Any]) -> None:
    """What would else be refused after the sections are read."""
    from stexp.completion.shown import Known, Pattern

    check("known", config["known"], Known)
    check("pattern", config["pattern"], Pattern)
    check("share", config["share"], Between | None)
    check("seed", config["seed"], Seed)
    check("dense", config["dense"], Whole)
    from stexp.completion.methods import FLOORS, METHODS
    from stexp.completion.problem import OTHERS

    known, choices = config["known"], METHODS[config["known"]]
    if isinstance(config["methods"], str):
        config["methods"] = [config["methods"]]
    check("methods", config["methods"], list[str] | None)
    for name in config["methods"] or ():
        if name not in choices:
            raise InputError(
                f"methods={name}: none that completes {known}; choose {', '.join(choices)}{did_you_mean(name, choices)}"
            )
    everything = FLOORS[known] | choices
    if config["show"] is not None and config["show"] not in everything:
        meant = did_you_mean(str(config["show"]), everything)
        raise InputError(f"show={config['show']}: choose {', '.join(everything)}{meant}")
    if known == "genes" and config["pattern"] != "random":
        raise InputError(f"pattern={config['pattern']}: shows spots; known=spots, or pattern=random would fit")
    if config["pattern"] == "grid" and config["share"] is not None:
        raise InputError(f"share={config['share']}: pattern=grid shows every second row and column; leave share out")
    reference = str(config["reference"])
    is_file = reference.endswith(".h5ad")
    if reference not in OTHERS and not is_file:
        fitting = [*OTHERS, "FILE.h5ad"]
        raise InputError(f"reference={reference}: choose {', '.join(fitting)}{did_you_mean(reference, fitting)}")
    if is_file and known == "spots":
        raise InputError(f"reference={reference}: a file teaches genes; known=genes, or {', '.join(OTHERS)} would fit")
    if is_file and not Path(reference).is_file():
        raise InputError(f"reference={reference} is no file; an h5ad of raw counts would fit")
    if known == "genes" and reference == "none":
        raise InputError("reference=none: genes need one to learn from; patients, sections or FILE.h5ad would fit")
    if config["data"].get("stain") is not None:
        raise InputError(f"data.stain={config['data']['stain']}: completion reads tiles as they are; null would fit")


def complete_section(
    section: Section,
    sections: list[Section],
    protocol: Protocol,
    dataset: DataSet,
    config: dict[str, Any],
    *,
    several: bool,
) -> None:
    """Complete one section into its folder, and say how well; a folder that is finished is left as it is."""
    from stexp.completion.result import read_result
    from stexp.completion.run import claim, complete_into, summary
    from stexp.files import alone_in
    from stexp.reporting.report import write_report
    from stexp.runs.provenance import Stages
    from stexp.training.machine import Machine

    folder = folder_of(config, section.name, several)
    config = {**config, "fold": section.name, "output_dir": str(folder)}
    machine = Machine({"accelerator": config["device"], "devices": 1}, config["precision"])
    with alone_in(folder):
        if claim(folder, config, bool(config["overwrite"])):
            log.info("%s is finished", folder)
            result = read_result(folder)
            refuse_other_data(folder, result["provenance"]["data_manifest"], sections)
            print(summary(result))
            return
        machine.set_threads()
        stages = Stages(None)
        problem, read = pose(section, sections, protocol, dataset, config, machine, stages)
        log.info("%s", problem.statement())
        result = complete_into(
            problem,
            protocol,
            config,
            read,
            methods=config["methods"],
            show=config["show"],
            dense=config["dense"],
            device=machine.device.type,
            precision=machine.chosen_precision,
            stages=stages,
        )
        report = write_report(folder)
    print(f"wrote {folder}; look at {report}")
    print(summary(result))


def refuse_other_data(folder: Path, recorded: dict[str, Any], sections: list[Section]) -> None:
    """InputError where files of the sections that a completion read are others than they were."""
    from stexp.runs.provenance import manifest

    now = manifest([section for section in sections if section.name in recorded])
    changed = [name for name, files in now.items() if files != recorded[name]]
    if changed:
        raise InputError(f"{folder}: the data of {listed(changed)} changed since; overwrite=true would start anew")


def folder_of(config: dict[str, Any], section: str, several: bool) -> Path:
    """Where the completion of a section goes."""
    if config["output_dir"] is not None:
        return Path(config["output_dir"]) / section if several else Path(config["output_dir"])
    from stexp.completion.shown import SHARE

    share = SHARE if config["share"] is None else config["share"]
    which = {"random": f"{share:g}", "grid": "grid"}.get(config["pattern"], f"{config['pattern']}-{share:g}")
    return Path("runs") / f"{config['data']['name']}-{config['known']}-{which}-{section}-s{config['seed']}"


def pose(
    section: Section,
    sections: list[Section],
    protocol: Protocol,
    dataset: DataSet,
    config: dict[str, Any],
    machine: Machine,
    stages: Stages,
) -> tuple[Problem, list[Section]]:
    """Divide a section into what is shown and what is asked for; and the sections that were read for it."""
    from stexp.completion.problem import gene_problem, other_sections, spot_problem

    reference, panel = str(config["reference"]), dataset.panel(protocol)
    options = {"share": config["share"], "seed": config["seed"]}
    others = other_sections(section, sections, reference)
    if config["known"] == "genes":
        from_file = reference.endswith(".h5ad")
        problem = gene_problem(section, Path(reference) if from_file else others, protocol, panel, **options)
    else:
        if config["images"] and section.slide is None:
            log.warning("section %s has no image: it is completed by place alone", section.name)
        with stages("features"):
            of_image = config["images"] and section.slide is not None
            features = features_of([section, *others], config, machine) if of_image else {}
        problem = spot_problem(
            section, others, protocol, panel, features=features, pattern=config["pattern"], **options
        )
    return problem, [section, *(other for other in others if other.name in problem.references)]


def features_of(sections: list[Section], config: dict[str, Any], machine: Machine) -> dict[str, np.ndarray]:
    """Frozen features (n_spots, F) of the tiles of those sections that have an image, computed or from the cache."""
    from stexp.api.features import frozen_encoder
    from stexp.data.slides.tiles import TileSpec, open_tiles

    data = config["data"]
    spec, cache = TileSpec(data["tile_px"], data["tile_um"]), (data["cache_dir"], data["tile_store"])
    with frozen_encoder(config, machine) as encoder:
        return {
            section.name: encoder.of_tiles(section, open_tiles(section, spec, *cache))
            for section in sections
            if section.slide is not None
        }


if __name__ == "__main__":
    main()
