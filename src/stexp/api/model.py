"""A trained model: what it predicts of slides and of held-out spots, where it is kept, and how good it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, Unpack

import anndata as ad
import numpy as np
import pandas as pd

from stexp.api.data import SpotDataModule
from stexp.api.score import Score
from stexp.api.typed import typed
from stexp.api.work_folder import WorkFolder
from stexp.data.genes import expression
from stexp.data.section import Section
from stexp.data.shown import facts_table, one_line
from stexp.data.slides.pictures import Sheet
from stexp.data.slides.slide import Slide
from stexp.errors import InputError
from stexp.evaluation import predictions
from stexp.evaluation.foreign import training
from stexp.evaluation.records import read_provenance
from stexp.inference import hub, model_folder, predictor
from stexp.inference.export import export
from stexp.inference.out_of_distribution import KnownTiles
from stexp.inference.prototype_bank import AnyBank
from stexp.inference.trained import TrainedMethod
from stexp.protocol import Protocol
from stexp.runs.plugins import load_plugins

OF_SLIDES = ("um_per_px", "grid", "spacing_um", "coordinates")
"""Options of a prediction that a section with spots has no use for."""


class SlideOptions(TypedDict, total=False):
    """Options of a prediction; see :meth:`stexp.inference.predictor.Model.predict`."""

    um_per_px: float | None
    grid: str
    spacing_um: float
    coordinates: str | Path | np.ndarray | None
    genes: str | Sequence[str]
    exclude_slide: bool
    device: str
    batch_size: int
    work_dir: str | Path | None
    progress: bool


@dataclass(frozen=True)
class Run:
    """The run that a model was trained by.

    Attributes
    ----------
    work
        Its folder.
    data
        What it was trained on.
    config
        ``config.yaml`` of the folder.
    """

    work: WorkFolder
    data: SpotDataModule
    config: Mapping[str, Any]


class Model:
    """A trained model, by :func:`stexp.fit` or from :func:`stexp.load_model`.

    Parameters
    ----------
    path
        Exported folder; or None of a model that was trained here.
    run
        That trained it here; or None.
    """

    def __init__(self, path: Path | None = None, run: Run | None = None) -> None:
        self._path, self._run = path, run
        if path is not None:
            _ = self.exported  # what does not fit is said at once

    @cached_property
    def exported(self) -> predictor.Model:
        """The part that predicts slides: bank, encoders and all that is known of it.

        Raises
        ------
        InputError
            Of a method that needs more than the tiles of a slide.
        """
        if self._path is None:
            self._path = self._fitted.work.path / "model.stexp"
            export(self._fitted.work.path, self._path, sections=self._fitted.data.every_section)
        return predictor.load_model(self._path)

    @property
    def facts(self) -> dict[str, Any]:
        """``model.json``: method, protocol, tile, provenance, licences."""
        return self.exported.facts

    @property
    def genes(self) -> pd.DataFrame:
        """Genes that can be predicted, with the accuracy to expect of each."""
        return self.exported.genes

    @cached_property
    def panel(self) -> list[str]:
        """Genes it was trained on."""
        return self.exported.panel if self._run is None else list(self._held_out.var_names)

    @property
    def bank(self) -> AnyBank | None:
        """Reference spots of a method that retrieves."""
        return self.exported.bank

    @property
    def known(self) -> KnownTiles | None:
        """What the tiles of training look like to a method that embeds tiles."""
        return self.exported.known

    @property
    def reference_tiles(self) -> Sheet | None:
        """Small tiles of reference spots."""
        return self.exported.reference_tiles

    @property
    def method(self) -> TrainedMethod:
        """Tiles to embeddings, embeddings to expression."""
        return self.exported.method

    def names(self, genes: str | Sequence[str]) -> list[str]:
        """Genes that ``panel``, ``all``, a name or a list of names stands for; InputError for what is not predicted."""
        return self.exported.names(genes)

    @property
    def folder(self) -> Path:
        """Of the run that trained it."""
        return self._fitted.work.path

    @cached_property
    def score(self) -> Score:
        """Of the held-out spots, of a model that was trained here."""
        return Score(self._fitted.work)

    @property
    def _fitted(self) -> Run:
        if self._run is None:
            raise InputError("this model was loaded: the run that trained it is elsewhere; stexp.evaluate scores it")
        return self._run

    @cached_property
    def _held_out(self) -> ad.AnnData:
        return predictions.read(self.folder / "predictions.h5ad", "uns/stexp/fold", "layers/predicted")

    def predict(
        self, slide: str | Path | Slide | Section | SpotDataModule, **options: Unpack[SlideOptions]
    ) -> ad.AnnData:
        """Predict the expression on a slide, of the spots of a section, or of those that data hold out.

        Parameters
        ----------
        slide
            An image, on whose tissue a grid of spots is laid; a section, at its spots; or data, at their held-out
            spots.
        options
            Of slides alone: ``um_per_px``, ``grid``, ``spacing_um``, ``coordinates``; of all: ``genes``,
            ``exclude_slide``, ``device``, ``batch_size``, ``work_dir``, ``progress``; see
            :meth:`stexp.inference.predictor.Model.predict`. The spots that held out the run of this model come as that
            run predicted them, unless an option asks for something else.

        Returns
        -------
        AnnData, N spots x G genes
            ``X`` and ``layers["predicted"]`` on the scale of the training; of sections and data also
            ``layers["observed"]``, on the same scale, NaN for genes that were not measured.

        Raises
        ------
        InputError
            A section or data with an option that is of slides, without an image, or what
            :meth:`stexp.inference.predictor.Model.predict` refuses.

        Examples
        --------
        >>> adata = model.predict("slide.svs", genes=["ERBB2", "KRT8"])
        >>> held_out = model.predict(data)
        """
        if not isinstance(slide, Section | SpotDataModule):
            return self.exported.predict(slide, **options)
        of_slides = [key for key in OF_SLIDES if key in options]
        if of_slides:
            raise InputError(
                f"{of_slides[0]} is of slides without spots: a section is predicted at its own, at its own scale; its "
                f"image, model.predict(section.slide, {of_slides[0]}=...), would fit"
            )
        if isinstance(slide, Section):
            return self._predict_spots(slide, np.ones(len(slide), bool), options)
        data = slide
        if not set(options) - {"progress"} and self._run is not None and data.digest == self._run.data.digest:
            adata = self._held_out.copy()
            adata.uns["stexp"][training.KEY] = self._training
            return adata
        parts, is_test = [], (data.spots["role"] == "test").to_numpy()
        for section in data.sections:
            test = is_test[data.rows_of(section)]
            if test.any():
                parts.append(self._predict_spots(section, test, options))
        return _joined(parts)

    def _predict_spots(self, section: Section, spots: np.ndarray, options: SlideOptions) -> ad.AnnData:
        """Those of a section's spots that a mask (n_spots,) names."""
        if section.slide is None:
            raise InputError(f"section {section.name} has no image; one that has would fit")
        own: SlideOptions = {"um_per_px": section.um_per_px, "coordinates": section.xy_px[spots], **options}
        adata = self.exported.predict(section.slide, **own)
        names = section.spots.obs_names[spots].astype(str)
        adata.obs_names = f"{section.name}:" + names
        adata.obs["section"], adata.obs["patient"], adata.obs["spot"] = section.name, section.patient, names
        adata.obs[["array_x", "array_y"]] = section.array_xy[spots]
        adata.obs["total_counts"] = section.total_counts[spots]
        adata.uns["spatial"] = {section.name: next(iter(adata.uns["spatial"].values()))}
        protocol = Protocol(**self.facts["protocol"])
        observed = expression(section, list(adata.var_names), protocol, self.panel)
        adata.layers["observed"] = observed[spots]
        adata.uns["stexp"][training.KEY] = self._training
        return adata

    @cached_property
    def _training(self) -> str:
        """What the model was trained on, as its predictions say it; JSON."""
        if self._run is None:
            return json.dumps(training.training_record(self.facts["trained"]))
        data, provenance = self._run.data, read_provenance(self.folder)
        roles = {role: data.names(role) for role in training.ROLES}
        return json.dumps(training.training_record({**provenance, "sections": roles}, data.digest))

    def save(
        self,
        path: str | Path,
        *,
        bank: str = "float32",
        prototypes: int | None = None,
        folds: Sequence[str | Path] = (),
        alpha: float | None = 0.1,
        overwrite: bool = False,
    ) -> Path:
        """Write the model to a folder that :func:`stexp.load_model` reads, without its data.

        Parameters
        ----------
        path
            A new folder, such as ``"mine.stexp"``.
        bank, prototypes, folds, alpha
            Of a model that was trained here; see :func:`stexp.inference.export.export`.
        overwrite
            Take the place of an exported model that is there, once the new one is whole.

        Raises
        ------
        InputError
            Something is there already, the method needs more than the tiles of a slide, or an option asks of a loaded
            model what is decided where it is exported.
        """
        path = Path(path).expanduser()
        if path.exists() and not (overwrite and (path / "model.json").is_file()):
            raise InputError(f"{path} exists; choose another, or overwrite=True where it is an exported model")
        if self._run is not None:
            others = [str(fold) for fold in folds]
            export(self.folder, path, bank, prototypes, others, alpha, self._run.data.every_section)
            return path
        asked = {"bank": bank != "float32", "prototypes": prototypes is not None, "folds": folds, "alpha": alpha != 0.1}
        key = next((key for key, is_asked in asked.items() if is_asked), None)
        if key is not None:
            raise InputError(
                f"{key}: this model was loaded, and is saved as it is; the model of stexp.fit, or stexp-export of its "
                f"run, takes {key}="
            )
        assert self._path is not None  # of a loaded model
        model_folder.copy(self._path, path)
        return path

    def push_to_hub(
        self, repository: str, *, private: bool = True, message: str | None = None, token: str | None = None
    ) -> str:
        """Upload the model with a card written from its own record; see :func:`stexp.inference.hub.push_to_hub`.

        Examples
        --------
        >>> model.push_to_hub("me/her2st-stnet")
        >>> stexp.load_model("me/her2st-stnet")
        """
        _ = self.exported  # of a model that was trained here: written to its folder first
        assert self._path is not None
        return hub.push_to_hub(self._path, repository, private=private, message=message, token=token)

    def __repr__(self) -> str:
        return one_line(self._facts())

    def _repr_html_(self) -> str:
        facts = self._facts()
        return facts_table(f"Model {facts['model']}", facts)

    def _facts(self) -> dict[str, str]:
        """What the model is, in words."""
        if self._run is None:
            facts = self.facts
            return {
                "model": facts["method"],
                "data": f"{facts['data']} (fold {facts['fold']})",
                "protocol": facts["protocol"]["name"],
                "panel": f"{len(self.panel)} of {len(self.genes)} genes",
                "folder": str(self._path),
            }
        config, data = self._run.config, self._run.data
        return {
            "model": config["model"]["name"],
            "data": f"{data.name} (fold {data.fold})",
            "protocol": data.protocol.name,
            "panel": f"{len(data.panel)} genes",
            **self.score.in_words(),
            "folder": str(self.folder),
        }


@typed
def load_model(path: str | Path, plugins: Sequence[str] = ()) -> Model:
    """A model that :meth:`Model.save` or ``stexp-export`` wrote, or that of a finished run.

    Parameters
    ----------
    path
        An exported folder; or a run folder whose data are still there, which is exported to ``<run>/model.stexp``
        first, once; or ``owner/name`` (``owner/name@revision``) of a model on the Hugging Face hub. A folder on disk
        goes before a repository of that name.
    plugins
        Modules or packages that the model may name, whose code then runs; a model that was made with one says so.

    Raises
    ------
    InputError
        None of them, or a file of it is missing, damaged or was changed; or a plug-in of it is not named.

    Examples
    --------
    >>> model = stexp.load_model("mine.stexp")
    >>> adata = model.predict("slide.svs")
    """
    load_plugins(plugins)
    return Model(predictor.exported_folder(path))


def _joined(parts: list[ad.AnnData]) -> ad.AnnData:
    """Predictions of several sections as one, which says of itself what holds for all of them.

    Who their neighbours are stays with the predictions of one section; the scale of each image stands in
    ``uns["spatial"]``.
    """
    if len(parts) == 1:
        return parts[0]
    joined = ad.concat(parts, merge="same")
    for key in ("neighbours", "neighbour_weights"):
        joined.obsm.pop(key, None)
    joined.uns["spatial"] = {name: entry for part in parts for name, entry in part.uns["spatial"].items()}
    abouts = [{key: str(value) for key, value in part.uns["stexp"].items()} for part in parts]  # NaN equals NaN so
    common = set.intersection(*(set(about.items()) for about in abouts))
    joined.uns["stexp"] = {key: parts[0].uns["stexp"][key] for key in abouts[0] if (key, abouts[0][key]) in common}
    return joined
