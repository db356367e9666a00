"""A trained model, and what it says of a slide that has only H&E."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from stexp.data.slides.formats import free_memory
from stexp.data.slides.grid import Grid, make_grid, read_coordinates
from stexp.data.slides.slide import Slide
from stexp.data.slides.stain import StainNormaliser, measured_tiles
from stexp.data.slides.stream import tile_batches
from stexp.data.slides.tiles import file_digest
from stexp.data.slides.tissue import tissue_mask
from stexp.errors import InputError
from stexp.evaluation import predictions
from stexp.inference import confidence, model_folder
from stexp.inference.model_folder import ExportedModel
from stexp.inference.parts import Parts
from stexp.inference.trained import TrainedMethod
from stexp.reporting.exports import qupath_origin

log = logging.getLogger(__name__)

NEEDED = ("method", "model", "sizes", "features_by", "k", "panel", "protocol", "data", "fold", "tile", "stain")
"""Keys of ``model.json`` without which nothing is predicted."""


def load_model(path: str | Path) -> Model:
    """A model that ``stexp-export`` wrote, or that of a finished run.

    Parameters
    ----------
    path
        An exported folder; or a run folder whose data are still there, which is exported to ``<run>/model.stexp``
        first, once.

    Raises
    ------
    InputError
        Neither of them, or a file of it is missing, damaged or was changed.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is no folder; give a run, or a model that stexp-export wrote")
    if (path / "config.yaml").is_file():
        from stexp.inference.export import exported_run  # needs Hydra, which exported models do not

        path = exported_run(path)
    return Model(model_folder.read(path))


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
    """

    def __init__(self, exported: ExportedModel) -> None:
        self.facts, self.genes, self.bank = exported.facts, exported.genes, exported.bank
        lacking = sorted({*NEEDED} - {*self.facts})
        if lacking:
            raise InputError(f"model.json does not say {', '.join(lacking)}; {model_folder.AGAIN}")
        self.reference_tiles, self.known = exported.tiles, exported.known
        self.panel: list[str] = self.facts["panel"]
        self.method = TrainedMethod(self.facts, exported.weights, self.bank)

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
        device
            ``auto`` takes a GPU where there is one; or as torch names it.
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
            ``layers["uncertainty"]``: its standard deviation among the retrieved references, NaN for methods that
            do not retrieve; ``layers["lower"]``, ``layers["upper"]``: its interval. ``obs``: position, of a method
            that retrieves where a prediction comes from, and of one that embeds tiles how unlike those of training a
            tile is. ``var``: accuracy to expect of each gene, and how often its interval held. ``uns["stexp"]``:
            ``verdict`` on the slide and the ``checks`` behind it, see :func:`stexp.inference.confidence.add`.
            ``obsm["spatial"]`` in level-0 pixels, ``obsm["image_embedding"]``, ``obsm["neighbours"]``, see
            :func:`~stexp.evaluation.predictions.add_neighbours`, and the image in ``uns["spatial"]``, as scanpy
            and squidpy plot it.

        Raises
        ------
        InputError
            A slide without scale, without tissue or that cannot be read, unknown genes, or too little memory.
        """
        slide = slide if isinstance(slide, Slide) else Slide(slide)
        names, device = self._names(genes), _device(device)
        if not (isinstance(batch_size, int) and batch_size >= 1):
            raise InputError(f"batch_size={batch_size}: a whole number of at least 1 would fit")
        um = self._scale(slide, um_per_px, coordinates is None)
        side = self._side_px(slide, um)
        where = _lay_out(slide, um, grid, spacing_um, coordinates)
        self._check_memory(len(where.xy_px), len(names))
        some = self._some_tiles(slide, where, side, batch_size)
        normaliser = None
        if self.facts["stain"] is not None:
            normaliser = StainNormaliser.towards(self.facts["stain"], slide.path.name, some, len(where.xy_px))
        # what is kept of tiles depends on all this, and on nothing else
        what = (
            self.facts["digest"],
            file_digest(slide.path),
            side,
            batch_size,
            device.type,
            self.method.precision(device),
        )
        key = hashlib.sha256(json.dumps([*what, um]).encode() + where.xy_px.tobytes() + where.array_xy.tobytes())
        parts = Parts(len(where.xy_px), None if work_dir is None else Path(work_dir) / key.hexdigest()[:24])
        self._encode(slide, where, side, um, normaliser, device, batch_size, parts, progress)
        made = self._finish(parts.arrays, names, device)
        adata = _lay_out_result(slide, where, um, made, names, self.genes)
        if self.bank is not None:
            predictions.add_neighbours(adata, self.bank.spots(), made["neighbours"], made["neighbour_weights"])
        held = {key: json.dumps(self.facts[key]) for key in ("protocol", "expected", "licences")}
        adata.uns["stexp"] = held | {
            "kind": "prediction",
            "model": self.facts["method"],
            "model_digest": self.facts["digest"],
            "data": self.facts["data"],
            "fold": self.facts["fold"],
            "slide": slide.path.name,
            "slide_digest": file_digest(slide.path),
            "qupath_origin_px": qupath_origin(slide.path),
            "um_per_px": np.nan if um is None else um,
            "tile_px": self.facts["tile"]["px"],
            "tile_side_px": side,
            "grid": where.kind,
            "spacing_px": where.spacing_px,
            "stain": (self.facts["stain"] or {}).get("method", "none"),
            "precision": self.method.precision(device),
        }
        confidence.add(adata, self.facts, self.genes, self.known, some, slide, um, side)
        return adata

    # what was asked for, judged against what the model is

    def _names(self, genes: str | Sequence[str]) -> list[str]:
        if isinstance(genes, str) and genes in ("panel", "all"):
            return self.panel if genes == "panel" else list(self.genes.index)
        if genes is None or isinstance(genes, int | float):
            raise InputError(f"genes={genes}: give panel, all, or a list of names")
        names = [genes] if isinstance(genes, str) else [str(name) for name in genes]
        if not names or len(set(names)) < len(names):
            raise InputError("genes names a gene twice, or none; give panel, all, or a list of different genes")
        unknown = [name for name in names if name not in self.genes.index]
        if unknown:
            raise InputError(
                f"{len(unknown)} of {len(names)} genes are not among the {len(self.genes)} that this model predicts: "
                f"{', '.join(unknown[:5])}"
            )
        return names

    def _scale(self, slide: Slide, um_per_px: float | None, needs_grid: bool) -> float | None:
        if um_per_px is not None and not (isinstance(um_per_px, int | float) and 0 < um_per_px < np.inf):
            raise InputError(f"um_per_px={um_per_px}: a number above 0 (0.5 for 20x, 0.25 for 40x) would fit")
        stated = slide.um_per_px
        um = um_per_px or stated
        tile = self.facts["tile"]
        if um is None and (needs_grid or tile["um"] is not None or tile["trained_um_per_px"] is not None):
            raise InputError(
                f"slide {slide.path.name} does not say how large its pixels are; give um_per_px= (about 0.5 for 20x, "
                f"0.25 for 40x)"
            )
        if um_per_px and stated and max(um, stated) > 1.1 * min(um, stated):
            log.warning(
                "slide %s: um_per_px %.4g was given, the file says %.4g; the given one counts",
                slide.path.name,
                um,
                stated,
            )
        return None if um is None else float(um)

    def _side_px(self, slide: Slide, um: float | None) -> int:
        """Side of a tile in level-0 pixels of the slide, so that it shows as much tissue as in training."""
        tile = self.facts["tile"]
        if tile["um"] is not None:
            side = round(tile["um"] / um)
        elif tile["trained_um_per_px"] is not None:
            side = round(tile["px"] * tile["trained_um_per_px"] / um)
        else:
            side = tile["px"]
            log.warning("nobody said the scale of the training sections: tiles are %d pixels of this slide", side)
        if side < 1 or side > max(slide.size):
            raise InputError(
                f"slide {slide.path.name}: a tile as in training is {side} px wide at {um:.4g} um/px, the image is "
                f"{slide.size[0]} x {slide.size[1]} px; is um_per_px right?"
            )
        return side

    def _some_tiles(self, slide: Slide, where: Grid, side: int, batch_size: int) -> dict[int, np.ndarray]:
        """Those by which a slide is judged, as they are."""
        rows = measured_tiles(len(where.xy_px))
        batches = tile_batches(slide, where.xy_px[rows], side, self.facts["tile"]["px"], batch_size)
        found = {int(rows[i]): tile for part, tiles in batches for i, tile in zip(part, tiles, strict=True)}
        return {row: found[row] for row in sorted(found)}

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
        slide: Slide,
        where: Grid,
        side: int,
        um: float | None,
        normaliser: StainNormaliser | None,
        device: torch.device,
        batch_size: int,
        parts: Parts,
        progress: bool,
    ) -> None:
        n, waiting, said = len(where.xy_px), None, time.monotonic()
        if parts.done == n:
            return
        self.method.to(device)
        um_xy = torch.from_numpy(where.xy_px * (np.nan if um is None else um)).float()
        array_xy = torch.from_numpy(where.array_xy.astype(np.int64))
        batches = tile_batches(
            slide, where.xy_px, side, self.facts["tile"]["px"], batch_size=batch_size, start=parts.done
        )
        console = Console(stderr=True)
        bar = Progress(
            *Progress.get_default_columns(),
            MofNCompleteColumn(),
            console=console,
            transient=True,
            disable=not (progress and console.is_terminal),
        )
        with bar:
            task = bar.add_task(f"{slide.path.name}: tiles", total=n, completed=parts.done)
            for rows, tiles in batches:
                tiles = torch.from_numpy(np.ascontiguousarray(tiles)).to(device, non_blocking=True)
                if normaliser is not None:
                    tiles = normaliser(tiles, torch.zeros(len(rows), dtype=torch.int64))
                made = self.method.encode(tiles, um_xy[rows], array_xy[rows])
                if waiting is not None:  # the GPU is at the next batch while this one is fetched
                    parts.add(*waiting)
                waiting = rows, made
                bar.update(task, advance=len(rows))
                if not console.is_terminal and progress and time.monotonic() - said > 15:
                    log.info("%s: %d of %d tiles", slide.path.name, parts.done, n)
                    said = time.monotonic()
            if waiting is not None:
                parts.add(*waiting)
        parts.save()

    def _finish(self, arrays: dict[str, np.ndarray], names: list[str], device: torch.device) -> dict[str, Any]:
        if self.bank is not None:
            return {**arrays, **self.method.retrieve(arrays["image_embedding"], names, device)}
        columns = pd.Index(self.panel).get_indexer(names)
        return {key: value if key == "image_embedding" else value[:, columns] for key, value in arrays.items()}


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device("cuda" if name == "gpu" else name)
    except RuntimeError:
        raise InputError(f"device={name}: choose auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device={name}: choose auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={name}: torch sees no GPU here; take cpu or auto")
    return device


def _lay_out(
    slide: Slide, um: float | None, kind: str, spacing_um: float, coordinates: str | Path | np.ndarray | None
) -> Grid:
    if coordinates is None:
        return make_grid(slide, um, kind, spacing_um, tissue_mask(slide, um))
    if isinstance(coordinates, str | Path):
        return read_coordinates(coordinates, slide)
    xy = np.asarray(coordinates, dtype=np.float64)
    if xy.ndim != 2 or xy.shape[1] != 2 or not len(xy) or not np.isfinite(xy).all():
        raise InputError(f"coordinates of shape {xy.shape}: rows of x and y in pixels would fit")
    if len(np.unique(xy, axis=0)) < len(xy):
        raise InputError("coordinates hold a place twice")
    pitch = predictions.spacing(xy)
    array_xy = np.round((xy - xy.min(axis=0)) / max(pitch, 1.0)).astype(np.int64)
    return Grid(xy, array_xy, None, pitch, "given")


def _lay_out_result(
    slide: Slide, where: Grid, um: float | None, made: dict[str, Any], names: list[str], genes: pd.DataFrame
) -> ad.AnnData:
    """Predictions as `Model.predict` returns them."""
    name = slide.path.stem.removesuffix(".ome")
    spots = where.names
    if spots is None:
        spots = [f"{x}x{y}" for x, y in where.array_xy]
        if len(set(spots)) < len(spots):  # given coordinates may share a place on the array
            spots = [str(i) for i in range(len(spots))]
    obs = pd.DataFrame(
        {
            "section": pd.Categorical([name] * len(spots)),
            "array_x": where.array_xy[:, 0],
            "array_y": where.array_xy[:, 1],
            "pixel_x": where.xy_px[:, 0],
            "pixel_y": where.xy_px[:, 1],
        },
        index=pd.Index(spots, name="spot"),
    )
    if "obs" in made:
        obs = pd.concat([obs, made["obs"].set_index(obs.index)], axis=1)
    predicted = made["predicted"]
    adata = ad.AnnData(predicted, obs=obs, var=genes.loc[names].copy())
    adata.layers["predicted"] = predicted.copy()  # X is what people transform
    spread = made.get("uncertainty")
    adata.layers["uncertainty"] = np.full(predicted.shape, np.nan, np.float32) if spread is None else spread
    adata.obsm["spatial"] = np.asarray(where.xy_px, dtype=np.float64)
    if "image_embedding" in made:
        adata.obsm["image_embedding"] = made["image_embedding"]
    # what add_images reads of a section
    drawn = SimpleNamespace(name=name, slide=slide, xy_px=adata.obsm["spatial"], um_per_px=um)
    predictions.add_images(adata, [drawn])
    return adata
