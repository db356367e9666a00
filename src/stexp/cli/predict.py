"""``stexp-predict run=model.stexp slide=slide.svs``: the expression on slides that have only H&E."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from stexp.config import command, to_plain
from stexp.config.compose import entry
from stexp.errors import InputError


@entry("predict")
def main(cfg: DictConfig) -> None:
    with command():
        for key, example in (("run", "runs/x or a model of stexp-export"), ("slide", "an image or a folder of them")):
            if OmegaConf.is_missing(cfg, key):
                raise InputError(f"{key} is not given: {key}= names {example}")
        # anndata and scikit-learn, which --help does without
        from stexp.cli.prediction import check_settings, predict, slides_of

        plain = to_plain(cfg)
        plain["coordinates"] = None if cfg.coordinates is None else str(cfg.coordinates)
        slides, scales = slides_of(plain["slide"])
        if cfg.coordinates is not None and len(slides) > 1:
            raise InputError(f"coordinates are of one slide, and slide= names {len(slides)}")
        check_settings(plain)
        predict(plain, slides, scales)


if __name__ == "__main__":
    main()
