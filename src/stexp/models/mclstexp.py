"""mclSTExp: contrastive image and spot encoders, expression by retrieval (arXiv 2407.08216)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from stexp.arguments import Count, NotNegative, OptionalDepth, Positive, Rate, Share, Weight, Whole, Width, checked
from stexp.data.batches import SpotBatch, nearest
from stexp.errors import InputError
from stexp.models.blocks import ProjectionHead
from stexp.models.contrastive_method import ContrastiveMethod
from stexp.models.encoders.image import ImageEncoder
from stexp.models.encoders.spot import Position, SpotEncoder
from stexp.models.encoders.weights import from_torchvision, load_tensors, one_line
from stexp.models.gather import gather
from stexp.models.objectives import Objective
from stexp.models.retrieval import Distance, Reference, Weighting


class MclSTExp(ContrastiveMethod):
    """Image encoder and spot encoder, trained to agree on the same spots.

    Parameters
    ----------
    image_encoder
        Tiles to features; all of it is trained unless it is frozen.
    n_genes, n_positions
        G, and the rows of a learned position table; they come from the data.
    embedding_dim
        D of the shared space.
    spot_context
        What a spot attends to. ``batch``: all spots given in one call, as published, so that an embedding
        depends on its company. ``neighbours``: itself and its `n_neighbours` nearest spots of the same
        section, which attend to each other and to nothing else, so that it does not.
    n_neighbours
        For ``neighbours``; batches of the data module carry as many.
    position, depth, heads, head_dim
        See :class:`~stexp.models.encoders.spot.SpotEncoder`.
    dropout
        In the projection heads and the spot encoder.
    temperature, learn_temperature
        Divides the logits; learned as its logarithm where asked.
    normalise
        L2-normalise embeddings for loss and retrieval (the published code does not).
    image_weight
        lambda, the weight of the image loss; see :func:`~stexp.models.losses.info_nce`.
    objective
        Published: ``infonce``; see :func:`~stexp.models.objectives.contrastive_loss`.
    negatives_memory, mask_within_um
        See :class:`~stexp.models.negatives.Negatives`; not published.
    k, distance, weighting, reference
        Retrieval; see :class:`~stexp.models.retrieval_method.RetrievalMethod`.
    correct
        Correct what is retrieved by a residual (not published); see :mod:`stexp.models.correction`.
    prototypes
        Learn as many prototypes, and search them instead of spots (not published); see :mod:`stexp.models.prototypes`.
    optimizer, lr, weight_decay
        ``adam`` (published code) or ``adamw`` (paper).

    Notes
    -----
    Where paper and published code differ, the defaults of ``conf/model/mclstexp.yaml`` follow the code and
    name the paper's value. The ReLU that the code leaves out is the image encoder's ``final_activation``.
    """

    @checked("model")
    def __init__(
        self,
        image_encoder: ImageEncoder,
        n_genes: int,
        n_positions: int,
        *,
        embedding_dim: Width = 256,
        spot_context: Literal["neighbours", "batch"] = "neighbours",
        n_neighbours: Whole = 6,
        position: Position = "learnable",
        depth: OptionalDepth = 2,
        heads: Width = 8,
        head_dim: Width = 64,
        dropout: Share = 0.0,
        temperature: Positive = 1.0,
        learn_temperature: bool = False,
        normalise: bool = False,
        image_weight: Share = 0.5,
        objective: Objective = "infonce",
        negatives_memory: Whole = 0,
        mask_within_um: NotNegative = 0.0,
        k: Count | Literal["auto"] = "auto",
        distance: Distance = "l2",
        weighting: Weighting = "inverse_square",
        reference: Reference = "image",
        correct: bool = False,
        prototypes: Count | None = None,
        optimizer: Literal["adam", "adamw"] = "adam",
        lr: Rate = 1e-4,
        weight_decay: Weight = 1e-3,
    ) -> None:
        super().__init__(
            *(k, distance, weighting, reference),
            n_dims=embedding_dim,
            objective=objective,
            negatives_memory=negatives_memory,
            mask_within_um=mask_within_um,
            normalise=normalise,
            temperature=temperature,
        )
        self.image_encoder = image_encoder
        self.spot_encoder = SpotEncoder(
            n_genes, n_positions, position=position, depth=depth, heads=heads, head_dim=head_dim, dropout=dropout
        )
        self.image_projection = ProjectionHead(image_encoder.num_features, embedding_dim, dropout)
        self.spot_projection = ProjectionHead(n_genes, embedding_dim, dropout)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)), requires_grad=learn_temperature)
        self.spot_context, self.n_neighbours = spot_context, n_neighbours
        self.image_weight = image_weight
        self.optimizer, self.lr, self.weight_decay = optimizer, lr, weight_decay
        if correct:
            self.correct(embedding_dim, n_genes)
        if prototypes is not None:
            self.learn_prototypes(prototypes, embedding_dim)
        if spot_context == "batch":
            self.reference_batch = 32  # as the published code embeds them

    # embeddings of spots

    def embed_spots(
        self, expression: torch.Tensor, array_xy: torch.Tensor, xy: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Spots of one section, or of one batch, to embeddings (B, D).

        Parameters
        ----------
        expression : (B, G)
            Normalised as in training.
        array_xy : (B, 2), integers
            Array coordinates.
        xy : (B, 2)
            Where the spots lie, in any unit; says which are near. None: on a square array, as `array_xy` has it.
            The data module measures in pixels, which differs where the array is hexagonal or was rounded.

        Notes
        -----
        With ``spot_context="batch"`` the B spots are one sequence. With ``"neighbours"`` they are taken for
        one whole section, and each attends to itself and the nearest `n_neighbours` among them.
        """
        if self.spot_context == "batch":
            tokens = self.spot_encoder(expression[None], array_xy[None])[0]
            return self._finish(self.spot_projection(tokens))
        place = (array_xy if xy is None else xy).cpu().numpy().astype(float)
        around = torch.from_numpy(nearest(place, self.n_neighbours)).to(array_xy.device)
        context = torch.cat([torch.arange(len(around), device=around.device)[:, None], around], dim=1)
        return self._embed_context(expression[context], array_xy[context], None)

    def embed_batch_spots(self, batch: SpotBatch) -> torch.Tensor:
        """Spots of a batch, each within the context that `spot_context` names, to embeddings (B, D)."""
        if self.spot_context == "batch":
            return self.embed_spots(batch.expression, batch.array_xy)
        return self._embed_context(batch.context_expression, batch.context_array_xy, batch.context_mask)

    def _embed_context(
        self, expression: torch.Tensor, array_xy: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        token = self.spot_encoder(expression, array_xy, mask, n_out=1)[:, 0]
        return self._finish(self.spot_projection(token))

    # training

    def training_step(self, batch: SpotBatch, batch_idx: int) -> torch.Tensor:
        # of several devices each has a part of the batch; the negatives are those of the whole batch
        n = batch.whole
        image = gather(self.embed_tiles(batch), n)
        if self.spot_context == "batch":  # every spot attends to the whole batch, so each device embeds all of it
            spot = self.embed_spots(gather(batch.expression, n), gather(batch.array_xy, n))
        else:
            spot = gather(self.embed_batch_spots(batch), n)
        temperature = self.log_temperature.exp().clamp(min=0.01)
        loss = self.contrast(image, spot, batch, temperature, self.image_weight)
        return self.with_prototypes(loss, image, spot, temperature)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optimizer]
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return kind(trained, lr=self.lr, weight_decay=self.weight_decay)

    # the authors' weights

    @classmethod
    def from_authors(cls, path: str | Path, heads: int = 8) -> MclSTExp:
        """Model with weights that the authors' code saved (``mclSTExp_Attention.state_dict()``).

        Parameters
        ----------
        path
            ``.pt``/``.pth`` of tensors only, or ``.safetensors``.
        heads
            Attention heads; the state dict holds only their total width.

        Notes
        -----
        Tiles go in as RGB in 0..1 without mean and std; spots of one call are one sequence. Sizes and the
        image encoder (DenseNet-121, ResNet-18/50/101, ViT-B/32) are read off the weights.
        """
        state = load_tensors(path)
        # prefixes of data-parallel training and of an older naming, as the authors' evaluation accepts them
        state = {key.replace("module.", "").replace("well", "spot"): value for key, value in state.items()}
        try:
            name, encoder_state = from_torchvision(state, "image_encoder.model.")
            n_positions, n_genes = state["x_embed.weight"].shape
            inner = state["spot_encoder.0.attn.fn.to_qkv.weight"].shape[0] // 3
            depth = len({key.split(".")[1] for key in state if key.startswith("spot_encoder.")})
            encoder = ImageEncoder(
                name,
                pretrained=False,
                mean=[0, 0, 0],
                std=[1, 1, 1],
                final_activation=name != "densenet121",
                model_args={"global_pool": "avg"} if name.startswith("vit") else None,
            )
            encoder.model.load_state_dict(encoder_state)
            model = cls(
                encoder,
                n_genes,
                n_positions,
                embedding_dim=state["spot_projection.fc.weight"].shape[0],
                spot_context="batch",
                depth=depth,
                heads=heads,
                head_dim=inner // heads,
                distance="l1",
                k=200,
            )
            names = {
                "attn.norm": "attn_norm",
                "attn.fn.to_qkv": "to_qkv",
                "attn.fn.to_out.0": "to_out",
                "ff.norm": "ff_norm",
                "ff.fn.net.0": "ff.0",
                "ff.fn.net.3": "ff.3",
            }
            renamed = {f"spot_encoder.{axis}.weight": state[f"{axis}.weight"] for axis in ("x_embed", "y_embed")}
            for key, value in state.items():
                if key.startswith("spot_encoder."):
                    _, block, rest = key.split(".", 2)
                    part, kind = rest.rsplit(".", 1)
                    renamed[f"spot_encoder.blocks.{block}.{names[part]}.{kind}"] = value
                elif key.startswith(("image_projection.", "spot_projection.")):
                    renamed[key] = value
            renamed |= {
                key: value
                for key, value in model.state_dict().items()
                if key.startswith("image_encoder.") or key == "log_temperature"
            }
            model.load_state_dict(renamed)
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"{path} is no state dict of mclSTExp_Attention: {one_line(error)}") from error
        return model.eval()
