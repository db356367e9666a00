"""An exported model: a folder of tensors and plain data that is whole or refused.

``model.json``
    What the model is: method and arguments, panel, protocol, tile, stain, provenance, checksums (SHA-256) of the
    other files and of itself.
``model.safetensors``
    Weights of the method (``model.``) and, where it reads frozen features, of their encoder (``features.``).
``bank.safetensors``
    Of a method that retrieves: the reference spots.
``references.jpg``
    Small tiles of some of them, which reports show.
``known.safetensors``
    Of a method that embeds tiles: embeddings of the training's; see :mod:`stexp.inference.out_of_distribution`.
``genes.csv``
    Every gene that can be predicted, with the accuracy to expect and the width of its interval.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.numpy
import safetensors.torch
import scipy.sparse as sp
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from stexp.data.genes import normalise
from stexp.data.slides.pictures import Sheet
from stexp.errors import InputError
from stexp.inference.intervals import COLUMNS
from stexp.inference.out_of_distribution import KnownTiles
from stexp.protocol import Protocol

FORMAT = "stexp-model 2"
ACCURACY = ("expected_pearson", "expected_floor")
AGAIN = "export it again, or copy it again"


@dataclass(frozen=True)
class Bank:
    """The reference spots of a method that retrieves: N spots, G genes of the whole transcriptome.

    Parameters
    ----------
    embedding : (N, D) float32
    section, patient, spot : (N,) str
        Where they are from, and their ids there.
    counts : (N, G) CSR
        Raw.
    total_counts : (N,)
        Over all genes of the spot's section, those outside `genes` too.
    genes
        Measured in every section.
    rest : (S, G) CSR or None
        Per section, in the order they appear, the counts of its spots that are not references: what a truth that
        scales every gene by its total over the section needs.
    """

    embedding: np.ndarray
    section: np.ndarray
    patient: np.ndarray
    spot: np.ndarray
    counts: sp.csr_matrix
    total_counts: np.ndarray
    genes: list[str]
    rest: sp.csr_matrix | None = None

    def __len__(self) -> int:
        return len(self.embedding)

    def spots(self) -> pd.DataFrame:
        """Section, patient and spot of every reference, named by section and spot."""
        table = pd.DataFrame({"section": self.section, "patient": self.patient, "spot": self.spot})
        return table.set_index(table["section"] + ":" + table["spot"])

    def expression(self, genes: list[str], protocol: Protocol, panel: list[str]) -> np.ndarray:
        """Normalised as in training, (N, len(genes)) float32; where libraries are those of a panel, of `panel`."""
        columns = pd.Index(self.genes)
        where, total = columns.get_indexer(genes), self.total_counts
        if protocol.truth == "spot" and protocol.library == "panel":
            total = np.asarray(self.counts[:, columns.get_indexer(panel)].sum(axis=1), dtype=np.float64).ravel()
            protocol = replace(protocol, library="transcriptome")
        counts = self.counts[:, where].toarray()
        if self.rest is None:
            return normalise(counts, total, protocol)
        out = np.empty(counts.shape, dtype=np.float32)
        rest = self.rest[:, where].toarray()
        for i, name in enumerate(pd.unique(self.section)):
            here = self.section == name
            # one more row stands for all other spots of the section
            whole = np.concatenate([counts[here], rest[i : i + 1]])
            out[here] = normalise(whole, np.zeros(len(whole)), protocol)[:-1]
        return out

    def take(self, rows: np.ndarray) -> Bank:
        """The references `rows`, ascending; the others join the rest of their section."""
        rest = self.rest
        if rest is not None:
            names = pd.unique(self.section)
            if set(names) != set(self.section[rows]):
                raise InputError("a section would lose all its references; keep more of them")
            left = np.setdiff1d(np.arange(len(self)), rows)
            code = pd.Categorical(self.section[left], categories=names).codes
            gather = sp.csr_matrix((np.ones(len(left)), (code, np.arange(len(left)))), (len(names), len(left)))
            rest = sp.csr_matrix(rest + gather @ self.counts[left])
        return Bank(
            self.embedding[rows],
            self.section[rows],
            self.patient[rows],
            self.spot[rows],
            self.counts[rows],
            self.total_counts[rows],
            self.genes,
            rest,
        )


@dataclass(frozen=True)
class ExportedModel:
    """What an exported folder holds.

    Attributes
    ----------
    facts
        ``model.json``, with ``digest``, by which everything made with the model names it.
    genes
        Index gene; ``in_panel``, ``expected_pearson``, ``expected_floor``, ``expected_floor_name``,
        ``beats_floor``, ``n_held_out_sections``; with intervals ``interval_quantile``, ``interval_offset``,
        ``coverage_measured``.
    known
        Tiles of the training, of a method that embeds tiles.
    """

    facts: dict
    weights: dict[str, torch.Tensor]
    bank: Bank | None
    genes: pd.DataFrame
    tiles: Sheet | None = None
    known: KnownTiles | None = None

    @property
    def digest(self) -> str:
        return self.facts["digest"]


def write(
    folder: Path,
    facts: dict,
    weights: dict[str, torch.Tensor],
    bank: Bank | None,
    genes: pd.DataFrame,
    embedding_dtype: str = "float32",
    tiles: Sheet | None = None,
    known: KnownTiles | None = None,
) -> str:
    """Write a folder beside its place and rename it when whole, in place of one that is there; returns its digest."""
    if folder.exists() and not (folder / "model.json").is_file():
        raise InputError(f"{folder} is there and no exported model; choose another place")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            return _write(folder, facts, weights, bank, genes, embedding_dtype, tiles, known)
    except Timeout:
        raise InputError(f"another process writes {folder}; wait for it, or choose another output") from None
    except SafetensorError as error:  # a full disk, for one
        raise OSError(f"{folder}: {error}") from None


def _write(
    folder: Path,
    facts: dict,
    weights: dict[str, torch.Tensor],
    bank: Bank | None,
    genes: pd.DataFrame,
    embedding_dtype: str,
    tiles: Sheet | None,
    known: KnownTiles | None,
) -> str:
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    safetensors.torch.save_file(
        {key: value.detach().cpu().contiguous().clone() for key, value in weights.items()}, part / "model.safetensors"
    )
    if bank is not None:
        arrays, names = _pack(bank, embedding_dtype)
        safetensors.numpy.save_file(arrays, part / "bank.safetensors", metadata=names)
    if tiles is not None:
        (part / "references.jpg").write_bytes(tiles.jpeg)
        facts = {**facts, "reference_tiles": tiles.names}
    if known is not None:
        arrays = {"embedding": known.embedding, "distance": known.distance, "k": np.array(known.k)}
        safetensors.numpy.save_file(arrays, part / "known.safetensors")
    for path in part.iterdir():
        path.chmod(0o644)  # safetensors lets no one else read
    genes.to_csv(part / "genes.csv", index_label="gene", float_format="%.6g", lineterminator="\n")
    facts = {"format": FORMAT, **facts, "files": {path.name: _sha256(path) for path in sorted(part.iterdir())}}
    facts["digest"] = _digest(facts)
    (part / "model.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(part, folder)
        shutil.rmtree(old)
    else:
        os.replace(part, folder)
    return facts["digest"]


def read(folder: str | Path) -> ExportedModel:
    """Read a folder that `write` made.

    Raises
    ------
    InputError
        No exported model, one of another format, or a file that is missing, damaged or was changed.
    """
    folder = Path(folder)
    path = folder / "model.json"
    if not path.is_file():
        raise InputError(f"{folder} is no exported model: it has no model.json")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        known = facts["format"]
        intact = facts["digest"] == _digest(facts)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}); {AGAIN}") from None
    if known != FORMAT:
        raise InputError(f"{path} is of format {known!r}, this stexp reads {FORMAT!r}; {AGAIN} with this stexp")
    if not intact:
        raise InputError(f"{path} was changed or damaged: its checksum is another; {AGAIN}")
    if not {"model.safetensors", "genes.csv"} <= {*facts["files"]}:
        raise InputError(f"{path} does not name all its files; {AGAIN}")
    for name, checksum in facts["files"].items():
        if not (folder / name).is_file():
            raise InputError(f"{folder} lacks {name}; {AGAIN}")
        if _sha256(folder / name) != checksum:
            raise InputError(f"{folder / name} was changed or damaged: its checksum is another; {AGAIN}")
    try:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        bank = _unpack(folder / "bank.safetensors") if "bank.safetensors" in facts["files"] else None
        known = _known(folder / "known.safetensors") if "known.safetensors" in facts["files"] else None
        genes = pd.read_csv(
            folder / "genes.csv",
            dtype={"gene": str, "expected_floor_name": str},
            keep_default_na=False,  # NA may be a gene
            na_values={key: [""] for key in (*ACCURACY, *COLUMNS)},
        ).set_index("gene")
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{folder} cannot be read ({' '.join(str(error).split())[:200]}); {AGAIN}") from error
    tiles = None
    if "references.jpg" in facts["files"]:
        tiles = Sheet(facts["reference_tiles"], (folder / "references.jpg").read_bytes())
    return ExportedModel(facts, weights, bank, genes, tiles, known)


def _known(path: Path) -> KnownTiles:
    arrays = safetensors.numpy.load_file(path)
    return KnownTiles(arrays["embedding"], arrays["distance"], int(arrays["k"]))


def _digest(facts: dict) -> str:
    rest = {key: value for key, value in facts.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pack(bank: Bank, embedding_dtype: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays of the smallest type that holds them, and the names they need."""
    with np.errstate(over="ignore"):
        embedding = bank.embedding.astype(embedding_dtype)
    if not np.isfinite(embedding).all():
        raise InputError(f"embeddings go beyond what {embedding_dtype} holds; take bank=float32")
    arrays = {"embedding": embedding, "total_counts": bank.total_counts.astype(np.float64)}
    names = {"genes": bank.genes, "spot": bank.spot.tolist()}
    for key, values in (("section", bank.section), ("patient", bank.patient)):
        codes, names[key] = pd.factorize(values)
        arrays[key], names[key] = codes.astype(np.int32), [str(name) for name in names[key]]
    for key, matrix in (("counts", bank.counts), ("rest", bank.rest)):
        if matrix is not None:
            matrix = sp.csr_matrix(matrix)
            for part in ("data", "indices", "indptr"):
                values = getattr(matrix, part)
                arrays[f"{key}.{part}"] = values.astype(np.min_scalar_type(int(values.max(initial=0))))
    return arrays, {key: json.dumps(value) for key, value in names.items()}


def _unpack(path: Path) -> Bank:
    arrays = safetensors.numpy.load_file(path)
    with safe_open(path, "np") as file:
        names = {key: json.loads(value) for key, value in file.metadata().items()}
    n_genes = len(names["genes"])

    def matrix(key: str) -> sp.csr_matrix:
        data, indices, indptr = (arrays[f"{key}.{part}"] for part in ("data", "indices", "indptr"))
        indptr = indptr.astype(np.int64)
        return sp.csr_matrix((data.astype(np.float32), indices.astype(np.int64), indptr), (len(indptr) - 1, n_genes))

    return Bank(
        embedding=arrays["embedding"].astype(np.float32),
        section=np.array(names["section"])[arrays["section"]],
        patient=np.array(names["patient"])[arrays["patient"]],
        spot=np.array(names["spot"]),
        counts=matrix("counts"),
        total_counts=arrays["total_counts"],
        genes=names["genes"],
        rest=matrix("rest") if "rest.data" in arrays else None,
    )
