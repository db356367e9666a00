"""What a run sends to its logger: the same scalars to each, and to Weights & Biases tables, maps and files besides.

Nothing reads a logger: tables and reports are made of the run folder.
"""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import requests
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from PIL import Image
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment

from stexp.arguments import NotNegative, Whole, checked
from stexp.errors import InputError
from stexp.evaluation.metrics import pearson_per_gene
from stexp.evaluation.predictions import read, spacing
from stexp.evaluation.verdict import best_floor

log = logging.getLogger(__name__)

ANSWER_SECONDS, START_SECONDS = 5, 30  # to wait for W&B's server, and for it to begin a run
REFERENCE_SCORES = ("pearson_acg", "pearson_heg50", "mse")
"""Scores of floors and ceiling that are logged."""


class WandbRun(WandbLogger):
    """A W&B run that never stands in the way of the training: without a key, or without network, it is offline.

    Parameters
    ----------
    save_dir
        Where W&B puts its folder ``wandb``; an offline run is brought up later with ``wandb sync``.
    project, entity, name, group, job_type, tags
        As :func:`wandb.init` has them.
    mode
        ``auto``: online where there is a key and the server answers, else offline; or ``online``, ``offline``. The
        variable ``WANDB_MODE`` goes before ``auto``. Online too, a run that cannot be begun goes on offline.
    checkpoint
        Upload the best checkpoint (the last, where nothing was validated).
    maps
        Genes that are drawn on each test section: those with the highest training mean, for all methods the same.
    finish_seconds
        To wait at the end for what was not yet uploaded; it stays on disk.

    Notes
    -----
    Offline, nothing is looked up on the network; W&B's reports of its own errors, which would be, are off unless
    ``WANDB_ERROR_REPORTING`` says otherwise.
    """

    @checked("logger")
    def __init__(
        self,
        save_dir: str | Path,
        project: str,
        name: str,
        *,
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
        mode: Literal["auto", "online", "offline"] = "auto",
        checkpoint: bool = False,
        maps: Whole = 6,
        finish_seconds: NotNegative = 300,
    ) -> None:
        # W&B's reports of its own errors look a server up, offline too
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        super().__init__(name=name, save_dir=save_dir, project=project)
        self.folder = Path(save_dir)
        self.about = {"entity": entity, "group": group, "job_type": job_type, "tags": tags}
        self.mode, self.checkpoint, self.maps, self.finish_seconds = mode, checkpoint, maps, finish_seconds

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The :class:`wandb.Run`, which the first use begins."""
        if self._experiment is None:
            self._experiment = self._begin()
            self._experiment.define_metric("trainer/global_step")
            self._experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return self._experiment

    def _begin(self) -> Any:
        import wandb

        self.folder.mkdir(parents=True, exist_ok=True)  # else W&B takes the temporary folder
        settings = wandb.Settings(
            init_timeout=START_SECONDS, finish_timeout=self.finish_seconds, console="off", quiet=True
        )
        given: dict[str, Any] = {"project": self._project, "name": self._name, "dir": self._save_dir, **self.about}
        mode = self._mode(wandb)
        if mode == "online":
            try:
                return wandb.init(**given, settings=settings, mode=mode)
            except wandb.Error as error:  # a key that is refused, a server that stalls
                log.warning("W&B: offline, for the run could not begin (%s)", " ".join(str(error).split())[:200])
                mode = "offline"
        return wandb.init(**given, settings=settings, mode=mode)

    def _mode(self, wandb: Any) -> Any:
        mode = os.environ.get("WANDB_MODE", "auto") if self.mode == "auto" else self.mode
        if mode == "offline":
            return mode
        server = os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url
        if not (os.environ.get("WANDB_API_KEY") or requests.utils.get_netrc_auth(server)):
            if mode == "online":
                raise InputError("logger.mode=online: W&B has no key here; `wandb login`, or take logger.mode=auto")
            return "offline" if mode == "auto" else mode
        if mode not in ("auto", "online"):
            return mode
        try:
            requests.head(server, timeout=ANSWER_SECONDS)
        except requests.RequestException as error:
            log.warning("W&B: offline, for %s does not answer (%s)", server, type(error).__name__)
            return "offline"
        return "online"


def begin(logger: Logger, config: dict) -> None:
    """Tell a logger that keeps them the settings of the run."""
    if isinstance(logger, WandbRun):
        run = logger.experiment
        run.config.update(config)
        log.info("W&B: %s", f"offline, in {Path(run.dir).parent}" if run.offline else run.url)


def results(logger: Logger, folder: Path, metrics: dict, step: int) -> None:
    """Log the scores, with floors and ceiling as constant curves from step 0 to the last, and what else W&B shows.

    Parameters
    ----------
    metrics
        ``metrics.json`` of the run in `folder`.
    """
    references = reference_scalars(metrics)
    if step > 0:
        logger.log_metrics(references, step=0)
    logger.log_metrics(references | test_scalars(metrics), step=step)
    if isinstance(logger, WandbRun):
        import wandb

        try:
            _tables_and_files(wandb, logger, folder)
        except (wandb.Error, OSError, requests.RequestException) as error:
            log.warning("W&B: tables and files are not all logged (%s)", " ".join(str(error).split())[:200])


def end(logger: Logger, status: str) -> None:
    """Close a logger; `status` is ``"success"`` or ``"failed"``."""
    if isinstance(logger, WandbRun):
        if logger._experiment is not None:
            logger._experiment.finish(exit_code=int(status != "success"))
    else:
        logger.finalize(status)


def test_scalars(metrics: dict) -> dict[str, float]:
    """Scores of the method as ``test/<score>``, and by how much its Pearson is above the best floor."""
    scores = {name: value for name, value in metrics["scores"].items() if value is not None}
    best = best_floor(metrics)
    if best and "pearson_acg" in scores:
        scores["above_best_floor"] = scores["pearson_acg"] - metrics["floors"][best]["pearson_acg"]
    return {f"test/{name}": value for name, value in scores.items()}


def reference_scalars(metrics: dict) -> dict[str, float]:
    """``floor/<name>/<score>`` and ``ceiling/<score>``."""
    rows = {f"floor/{name}": scores for name, scores in metrics["floors"].items()} | {"ceiling": metrics["ceiling"]}
    return {
        f"{row}/{name}": scores[name]
        for row, scores in rows.items()
        for name in REFERENCE_SCORES
        if scores.get(name) is not None
    }


def neighbour_table(obs: pd.DataFrame) -> pd.DataFrame:
    """Where predictions come from: for each test section and section retrieved from, how many spots had it first.

    Parameters
    ----------
    obs
        Of ``predictions.h5ad``; see :meth:`~stexp.models.retrieval.ReferenceIndex.provenance`.
    """
    of, weight = ["section", "neighbour_section", "neighbour_patient"], "neighbour_section_weight"
    grouped = obs[[*of, weight]].astype({name: str for name in of}).groupby(of, as_index=False)
    return grouped.agg(spots=(weight, "size"), mean_weight=(weight, "mean"))


def gene_map(predictions: ad.AnnData, section: str, gene: str) -> Image.Image:
    """One gene observed and predicted on the tissue of one section, in the same colours."""
    here = predictions[(predictions.obs["section"] == section).to_numpy()]
    xy, g = np.asarray(here.obsm["spatial"], dtype=float), predictions.var_names.get_loc(gene)
    values = {name: np.asarray(here.layers[name][:, g], dtype=float) for name in ("observed", "predicted")}
    pitch = spacing(xy)
    low, high = xy.min(axis=0) - pitch, xy.max(axis=0) + pitch
    figure = Figure(figsize=(8, 0.6 + 3.7 * float(np.clip((high - low)[1] / (high - low)[0], 0.3, 2))), dpi=80)
    axes = figure.subplots(1, 2)
    spatial = predictions.uns.get("spatial", {}).get(section)
    for ax, (name, value) in zip(axes, values.items(), strict=True):
        if spatial is not None:
            image, scale = spatial["images"]["hires"], float(spatial["scalefactors"]["tissue_hires_scalef"])
            ax.imshow(image, extent=(0, image.shape[1] / scale, image.shape[0] / scale, 0), alpha=0.5)
        size = np.full(len(xy), 0.8 * pitch)
        spots = EllipseCollection(
            size, size, np.zeros(len(xy)), units="xy", offsets=xy, offset_transform=ax.transData, array=value
        )
        spots.set_clim(np.nanmin(values["observed"]), np.nanmax(values["observed"]))
        ax.add_collection(spots)
        ax.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), aspect="equal", xticks=[], yticks=[], title=name)
    figure.colorbar(spots, ax=axes, shrink=0.7)
    figure.suptitle(f"{section}, {gene}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _tables_and_files(wandb: Any, logger: WandbRun, folder: Path) -> None:
    run, predictions = logger.experiment, read(folder / "predictions.h5ad")
    shown = {"genes": wandb.Table(dataframe=pd.read_csv(folder / "per_gene.csv"))}
    if "neighbour_section" in predictions.obs:
        shown["neighbours"] = wandb.Table(dataframe=neighbour_table(predictions.obs))
    maps = []
    for section in predictions.obs["section"].astype(str).unique():
        here = predictions[(predictions.obs["section"] == section).to_numpy()]
        pearson = pearson_per_gene(np.asarray(here.layers["observed"]), np.asarray(here.layers["predicted"]))
        for gene in predictions.var["mean_train"].nlargest(logger.maps).index:
            caption = f"{section}, {gene}: Pearson {pearson[predictions.var_names.get_loc(gene)]:.3f}"
            maps.append(wandb.Image(gene_map(predictions, section, gene), caption=caption))
    if maps:
        shown["gene_maps"] = maps
    run.log(shown)
    files = [("report", folder / "report.html")]
    if logger.checkpoint:
        best = folder / "checkpoints" / "best.ckpt"
        files.append(("model", best if best.exists() else best.with_name("last.ckpt")))
    for kind, path in files:
        artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
        artifact.add_file(str(path))
        run.log_artifact(artifact)
