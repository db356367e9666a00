"""Columns about spots that were left in a table of counts, by the words of their names."""

from __future__ import annotations

import re

# no gene is called so; IDS and SNN are genes
NOUNS = frozenset(
    """
    total totals sum sums count counts ncount umi umis numi read reads nreads feature features nfeature genes
    ngene ngenes library libsize depth complexity mito pct percent percentage frac fraction proportion log1p
    spot spots barcode barcodes cell cells cellid celltype nuclei nucleus cluster clusters leiden louvain batch
    sample samples sampleid section sections slide patient patientid donor subject condition treatment label
    labels annotation annotations pathology region domain tissue layer doublet doublets scrublet score scores
    row rows col cols column columns coord coords coordinate coordinates position positions index idx id ident
    pixel pixels pxl imagerow imagecol arrayrow arraycol umap tsne pca xcoord ycoord selected unnamed rownames
    newx newy array centroid sizefactor sizefactors numis rowname saturation diagnosis organ gender
    """.split()  # noqa: SIM905 - a list would be a line a word
)
# these go beside one of them
QUALIFIERS = frozenset(
    """
    n nr nb no num number of in on by per the a and or is gene mt mitochondrial ribo ribosomal rb hb hemo ercc
    size factor factors lib x y z ids image raw filtered orig original detected expressed unique mapped unmapped
    mean median max min std norm normalized normalised log log2 log10 ln ratio rna sct spatial xenium seurat
    fullres full res hires lowres px um new type class name names group key code predicted transcript
    transcripts molecules intergenic exonic intronic qc tot area diameter seq sequencing distance cell subtype
    major minor flag center centre left right top bottom
    """.split()  # noqa: SIM905 - a list would be a line a word
)
# a name that begins so goes on in any way
BEGINNINGS = re.compile(
    r"(?:total_counts|n_genes_by|n_?counts?|n_?features?|log1p|pct|percent|leiden|louvain|orig|scrublet|doublet|umap|"
    r"tsne|x_umap|x_pca|image|predicted|unnamed)[_. :].*|(?:rna|sct)_snn.*",
    re.IGNORECASE,
)
# Seurat's and R's; PC is pyruvate carboxylase
NUMBERED = re.compile(r"(?:V|PC|UMAP|TSNE|X[._]|level_)_?\d+", re.IGNORECASE)


def words_of(name: str) -> list[str]:
    """The words of a name in small letters: divided by signs, or by a capital after a small letter (``nFeature``)."""
    return re.sub(r"([a-z])(?=[A-Z])|[^A-Za-z0-9]+", r"\1 ", name).lower().split()


def is_about_spots(name: str) -> bool:
    """Whether a name is made of words for measures, groups and places of spots, and of nothing else."""
    if BEGINNINGS.fullmatch(name) or NUMBERED.fullmatch(name):
        return True
    words = words_of(name)
    is_noun = [word in NOUNS for word in (*words, "".join(words))]
    return is_noun[-1] or (any(is_noun) and all(word in NOUNS | QUALIFIERS or word.isdigit() for word in words))
