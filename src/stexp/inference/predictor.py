"""A trained model, and what it says of a slide that has only H&E."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch

from stexp.arguments import Count, check
from stexp.data.digests import file_digest
from stexp.data.progress import progress as show_progress
from stexp.data.slides.formats import free_memory, qupath_origin
from stexp.data.slides.slide import Slide
from stexp.data.slides.stain import StainNormaliser
from stexp.data.slides.stream import tile_batches
from stexp.errors import InputError
from stexp.evaluation import predictions
from stexp.inference import confidence, hub, model_folder, slide_checks, training_slides
from stexp.inference.gene_choice import choose_genes
from stexp.inference.intervals import COLUMNS as CALIBRATED
from stexp.inference.layout import as_anndata
from stexp.inference.model_folder import ExportedModel
from stexp.inference.parts import Parts
from stexp.inference.places import Places, lay_out
from stexp.inference.prototype_bank import AnyBank
from stexp.inference.tensors import AGAIN
from stexp.inference.trained import TrainedMethod, device_of
from stexp.runs.plugins import load_plugins

log = logging.getLogger(__name__)


def load_model(path: str | Path, plugins: Sequence[str] = ()) -> Model:
    """What predicts slides of :func:`stexp.load_model`, which has the same arguments and errors."""
    load_plugins(plugins)
    return Model(model_folder.read(exported_folder(path)))


def exported_folder(path: str | Path) -> Path:
    """The exported folder that :func:`load_model` reads: fetched, or exported, where it is not there."""
    if hub.names_repository(path):
        return hub.fetch_model(str(path))
    path = Path(path).expanduser()
    if not path.is_dir():
        raise InputError(
            f"{path} is no folder; give a run, a model that stexp-export wrote, or owner/name of one on the hub"
        )
    if not (path / "config.yaml").is_file():
        return path
    from stexp.inference.export import exported_run  # brings all that trains, which exported models do without

    return exported_run(path)


class Model:
    """A trained method with what it needs to predict slides; see :func:`load_model`.

    Attributes
    ----------
    facts : dict
        ``model.json``: method, protocol, tile, provenance, licences.
    genes : DataFrame
        Genes that can be predicted, with the accuracy to expect; see
        :class:`~stexp.inference.model_folder.ExportedModel`.
    panel : list of str
        Those it was trained on.
    bank : Bank or None
        Reference spots of a method that retrieves.
    reference_tiles : Sheet or None
        Small tiles of reference spots.
    known : KnownTiles or None
        What the tiles of training look like to a method that embeds tiles.
    method : TrainedMethod
        Tiles to embeddings, embeddings to expression.

    Raises
    ------
    InputError
        Parts that do not fit each other.
    """

    def __init__(self, exported: ExportedModel) -> None:
        self.facts, self.genes, self.bank = exported.facts, exported.genes, exported.bank
        self.reference_tiles, self.known = exported.tiles, exported.known
        self.panel: list[str] = self.facts["panel"]
        self._check_genes()
        self.method = TrainedMethod(self.facts, exported.weights, self.bank)
        width = self.method.probe(self.facts["tile"]["px"])
        if (self.known is None) != (self.facts["known_tiles"] is None):
            raise InputError(f"model.json and known.safetensors do not fit; {AGAIN}")
        if self.known is not None and self.known.embedding.shape[1] != width:
            raise InputError(f"tiles are embedded in {width} numbers, known ones in {self.known.embedding.shape[1]}")

    def _check_genes(self) -> None:
        predicted = self.panel if self.bank is None else self.bank.genes
        absent = sorted({*self.panel, *self.genes.index} - {*predicted}) or sorted({*self.panel} - {*self.genes.index})
        if absent:
            raise InputError(f"{len(absent)} genes are named and not predicted, {absent[0]} for one; {AGAIN}")
        needed = set(CALIBRATED if self.facts["interval"] is not None else ())
        if not needed <= set(self.genes):
            raise InputError(f"genes.csv lacks {', '.join(sorted(needed - set(self.genes)))}; {AGAIN}")

    def __repr__(self) -> str:
        facts = self.facts
        genes = f"{len(self.panel)} of {len(self.genes)} genes trained"
        return f"<stexp model {facts['method']} of {facts['data']}, {genes}>"

    def predict(
        self,
        slide: str | Path | Slide,
        *,
        um_per_px: float | None = None,
        grid: str = "hexagonal",
        spacing_um: float = 100.0,
        coordinates: str | Path | np.ndarray | None = None,
        genes: str | Sequence[str] = "panel",
        exclude_slide: bool = False,
        device: str = "auto",
        batch_size: int = 256,
        work_dir: str | Path | None = None,
        progress: bool = True,
    ) -> ad.AnnData:
        """Predict the expression on a slide.

        Parameters
        ----------
        slide
            An image that :class:`~stexp.data.slides.slide.Slide` reads.
        um_per_px
            Micrometres per pixel; None: what the file says.
        grid, spacing_um
            ``hexagonal`` or ``square`` points on the tissue, centre to centre; see
            :func:`~stexp.data.slides.grid.make_grid`. Points nearer than a tile is wide have overlapping tiles.
        coordinates
            Instead of a grid: a file (see :func:`~stexp.data.slides.grid.read_coordinates`), or centres (N, 2)
            in pixels.
        genes
            ``panel``; ``all`` that the references measure; or names.
        exclude_slide
            Of a slide that is among the references: retrieve from those of other slides alone. What was trained or
            fitted has seen it all the same.
        device
            ``auto`` takes CUDA where there is a GPU; ``cpu``, ``gpu``, ``mps``, or as torch names it.
        batch_size
            Tiles encoded at once.
        work_dir
            What is finished is kept there, so that the same call goes on after a kill, to the same numbers.
        progress
            Show how far it is on the terminal.

        Returns
        -------
        AnnData, N spots x G genes
            ``X`` and ``layers["predicted"]``: expression on the scale the model was trained on;
            ``layers["uncertainty"]``: its standard deviation among the retrieved references, or among the members of
            ``consensus``, NaN for methods that have neither; ``layers["lower"]``, ``layers["upper"]``: its interval.
            ``obs``: position, of a method that retrieves where a prediction comes from (of ``consensus`` its part by
            neighbours), and of one that embeds tiles how unlike those of training a tile is. ``var``: accuracy to
            expect of each gene, and how often its interval held. ``uns["stexp"]``: ``verdict`` on the slide and the
            ``checks`` behind it, see :mod:`stexp.inference.slide_checks`.
            ``obsm["spatial"]`` in level-0 pixels, ``obsm["image_embedding"]``, ``obsm["neighbours"]``, see
            :func:`~stexp.evaluation.predictions.add_neighbours`, and the image in ``uns["spatial"]``, as scanpy
            and squidpy plot it.

        Raises
        ------
        InputError
            A slide without scale, without tissue or that cannot be read, unknown genes, or too little memory.
        """
        slide = slide if isinstance(slide, Slide) else Slide(slide)
        names, on = self.names(genes), device_of(device)
        check("batch_size", batch_size, Count)
        check("exclude_slide", exclude_slide, bool)
        trained_on = self._training_sections(slide)
        bank = self._bank_without(trained_on) if exclude_slide else self.bank
        places = lay_out(slide, self.facts["tile"], um_per_px, grid, spacing_um, coordinates)
        self._check_memory(len(places), len(names))

        sample = places.sample(batch_size)
        # what is kept of tiles depends on all this, and on nothing else
        depends_on = self.facts["digest"], file_digest(slide.path), batch_size, on.type, self.method.precision(on)
        parts = Parts(len(places), None if work_dir is None else Path(work_dir) / places.key(*depends_on))
        self._encode(places, sample, on, batch_size, parts, progress)
        arrays = self._finish(parts.arrays, places, names, on, bank)

        adata = as_anndata(places, arrays, self.genes.loc[names])
        if bank is not None and "neighbours" in arrays:
            predictions.add_neighbours(adata, bank.spots(), arrays["neighbours"], arrays["neighbour_weights"])
        adata.uns["stexp"] = self._record(places, on)
        left_out = None if bank is None or self.bank is None else len(self.bank) - len(bank)
        self._judge(adata, places, sample, trained_on, left_out)
        return adata

    # what was asked for, judged against what the model is

    def names(self, genes: str | Sequence[str]) -> list[str]:
        """Genes that ``panel``, ``all``, a name or a list of names stands for; InputError for what is not predicted."""
        return choose_genes(genes, self.panel, self.genes.index)

    def _training_sections(self, slide: Slide) -> dict[str, str]:
        """Sections of training that a slide is, and by what: its file or its look."""
        trained = self.facts["trained"]
        by_digest = training_slides.by_digest(
            file_digest(slide.path), trained["data_manifest"] or {}, trained["sections"]
        )
        images = {name: look["thumbnail"] for name, look in self.facts["looks"].items() if "thumbnail" in look}
        by_look = training_slides.by_look(training_slides.fingerprint(slide), images) if images else []
        return {**dict.fromkeys(by_look, "by its look"), **dict.fromkeys(by_digest, "by its file")}

    def _bank_without(self, sections: dict[str, str]) -> AnyBank:
        if self.bank is None:
            raise InputError(f"exclude_slide=true: {self.facts['method']} retrieves nothing that could be left out")
        if not set(sections) & set(self.bank.section):
            log.info("the slide is not among the references: nothing is left out")
            return self.bank
        return self.bank.without(set(sections))

    def _check_memory(self, n: int, n_genes: int) -> None:
        per_gene = 4 * n * (3 if self.facts["interval"] is None else 5)  # X and two layers, or four
        width = 0 if self.bank is None else 2 * self.bank.embedding.shape[1] + 2 * self.method.k
        rest = 4 * n * (width if self.bank is not None else 2 * len(self.panel))
        need, free = rest + per_gene * n_genes, free_memory()
        log.info("%d spots x %d genes: %.2g GB in memory", n, n_genes, need / 1e9)
        if free is not None and need > free:
            fit = max(0, int((0.9 * free - rest) / per_gene))
            raise InputError(
                f"{n} spots x {n_genes} genes need {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
                f"{fit} genes would fit, or a larger spacing_um"
            )

    # from tiles to expression

    def _encode(
        self,
        places: Places,
        sample: dict[int, np.ndarray],
        device: torch.device,
        batch_size: int,
        parts: Parts,
        progress: bool,
    ) -> None:
        """Encode the tiles that `parts` does not hold yet."""
        n, waiting, normaliser, slide, xy_px = len(places), None, None, places.slide, places.grid.xy_px
        if parts.done == n:
            return
        if self.facts["stain"] is not None:
            normaliser = StainNormaliser.towards(self.facts["stain"], slide.path.name, sample, n)
        self.method.to(device)
        array_xy = torch.from_numpy(places.grid.array_xy.astype(np.int64))
        batches = tile_batches(slide, xy_px, places.side_px, places.px, batch_size, start=parts.done)
        with show_progress(n, f"{slide.path.name}: tiles") if progress else nullcontext(lambda n: None) as advance:
            advance(parts.done)
            for rows, pixels in batches:
                tiles = torch.from_numpy(np.ascontiguousarray(pixels)).to(device, non_blocking=True)
                if normaliser is not None:
                    tiles = normaliser(tiles, torch.zeros(len(rows), dtype=torch.int64))
                arrays = self.method.encode(tiles, torch.from_numpy(places.xy_um[rows]), array_xy[rows])
                if waiting is not None:  # the GPU is at the next batch while this one is fetched
                    parts.add(*waiting)
                waiting = rows, arrays
                advance(len(rows))
            if waiting is not None:
                parts.add(*waiting)
        parts.save()

    def _finish(
        self, arrays: dict[str, Any], places: Places, names: list[str], device: torch.device, bank: AnyBank | None
    ) -> dict[str, Any]:
        """From what was encoded to the expression of some genes."""
        if self.method.together:
            made = {**arrays, **self.method.predict_together(arrays["image_embedding"], places.xy_um, names, bank=bank)}
        elif bank is not None:
            # retrieval on Apple's GPU would gain little, and differ in the last digits
            where = torch.device("cpu") if device.type == "mps" else device
            made = {**arrays, **self.method.retrieve(arrays["image_embedding"], names, where, bank=bank)}
        else:
            columns = pd.Index(self.panel).get_indexer(names)
            of_spots = {key: arrays[key] for key in ("image_embedding",) if key in arrays}
            made = {key: value[:, columns] for key, value in arrays.items() if key not in of_spots} | of_spots
        if not np.isfinite(made["predicted"]).all():
            raise InputError("the model predicts values that are no finite numbers: nothing of this slide is known")
        return made

    def _record(self, places: Places, device: torch.device) -> dict[str, Any]:
        """``uns["stexp"]`` but for the verdict."""
        facts, slide = self.facts, places.slide
        return {key: json.dumps(facts[key]) for key in ("protocol", "expected", "licences")} | {
            "kind": "prediction",
            "model": facts["method"],
            "model_digest": facts["digest"],
            "data": facts["data"],
            "fold": facts["fold"],
            "slide": slide.path.name,
            "slide_digest": file_digest(slide.path),
            "qupath_origin_px": qupath_origin(slide.path),
            "um_per_px": np.nan if places.um_per_px is None else places.um_per_px,
            "tile_px": places.px,
            "tile_side_px": places.side_px,
            "grid": places.grid.kind,
            "spacing_px": places.grid.spacing_px,
            "stain": (facts["stain"] or {}).get("method", "none"),
            "precision": self.method.precision(device),
        }

    def _judge(
        self,
        adata: ad.AnnData,
        places: Places,
        sample: dict[int, np.ndarray],
        trained_on: dict[str, str],
        n_excluded: int | None,
    ) -> None:
        """Add intervals, likeness to training, and the verdict with its checks."""
        facts = self.facts
        lowest = -np.inf if facts["protocol"].get("truth") == "residuals" else 0.0
        confidence.add_intervals(adata, self.genes.loc[adata.var_names], facts["interval"], lowest)
        checks = slide_checks.judge(
            slide_checks.look(np.stack(list(sample.values())), places.tile_um_per_px),
            list(facts["looks"].values()),
            um=places.um_per_px,
            stated=places.slide.um_per_px,
            side_px=places.side_px,
            tile=facts["tile"],
            normalised=facts["stain"] is not None,
        )
        same = 0.0
        if self.known is None:
            log.info("%s embeds no tiles: whether they are like those of training is not said", facts["method"])
        else:
            share = confidence.add_likeness(adata, self.known, facts["known_tiles"]["limit"])
            checks.append(slide_checks.strange(share, facts["known_tiles"]["held_out_share"]))
            same = self.known.share_of_same(adata.obsm["image_embedding"])
        checks.append(slide_checks.trained(trained_on, same, n_excluded))
        about = adata.uns["stexp"]
        verdict = f"{slide_checks.conclude(checks)} {confidence.worth(self.facts)}".rstrip()
        about["checks"], about["verdict"] = json.dumps(checks), verdict
