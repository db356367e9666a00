"""Image encoders: timm models and published pathology encoders, with the input that their weights need."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from stexp.arguments import Colour, ColourSpread, Depth, Pixels, Positive, Width, check_keys, checked
from stexp.errors import InputError, did_you_mean
from stexp.models.blocks import central
from stexp.models.encoders.tuning import add_lora, train_last, trained_parts
from stexp.models.encoders.weights import Card, Weights, create_model

log = logging.getLogger(__name__)

MODEL_ARGS = frozenset(
    [
        *(
            "act_layer",
            "attn_drop_rate",
            "block_config",
            "channels",
            "class_token",
            "cls_embed",
            "depth",
            "depths",
            "dims",
        ),
        *("drop_path_rate", "drop_rate", "dynamic_img_pad", "dynamic_img_size", "embed_dim", "fc_norm", "final_norm"),
        *("global_pool", "growth_rate", "img_size", "init_values", "layers", "mlp_layer", "mlp_ratio"),
        *("no_embed_class", "norm_layer", "num_heads", "output_stride", "pad_type", "patch_drop_rate", "patch_size"),
        *("pos_drop_rate", "pos_embed", "pre_norm", "proj_drop_rate", "qk_norm", "qkv_bias", "reg_tokens"),
        *("stem_type", "stem_width", "strict_img_size", "window_size"),
    ]
)
"""What `model_args` may say: the shape of a network and its regularisation, nothing that reads a file or the net."""


class ImageEncoder(nn.Module):
    """A model without its classifier: images in 0..1 to features.

    Parameters
    ----------
    name
        What it is called; timm's name of the architecture, unless `architecture` says that.
    architecture
        timm's name, ``ctranspath`` or ``conch_v1_5``.
    pretrained
        Load weights: from `checkpoint` where given, else from `hub`, else those of timm. False: random weights.
    hub, hub_file
        Repository on the Hugging Face hub, and the file in it where it has another name than timm looks for.
    checkpoint
        Local file (``.safetensors``, or ``.pth`` holding tensors only), in timm's naming or one that
        :func:`~stexp.models.encoders.pathology.timm_names` translates.
    frozen
        No gradient, and evaluation mode throughout.
    tuning
        What trains where it is not frozen: ``all`` of it, its ``last`` blocks with what follows them, or ``lora``,
        updates of low rank in the attention. Parts that do not train stay in evaluation mode.
    last_blocks
        Of ``tuning="last"``: how many, as timm counts blocks.
    lora_rank, lora_alpha
        Of ``tuning="lora"``, see :class:`~stexp.models.encoders.tuning.LoRALinear`.
    frozen_norm
        Batch normalisation stays in evaluation mode while the rest trains, for weights whose stored
        statistics are not those of tissue.
    input_size
        Pixels a side that images are resized to (bilinear, antialiased); None: they go in as they are.
    output
        ``pooled`` as the model itself pools; of a transformer also its class token (``cls``), the ``mean`` of its
        patch tokens, or both one after the other (``cls+mean``), after the last norm. ``levels``: means and standard
        deviations of every channel over the tile, level by level of the whole network (frozen alone: its last layers
        may have no part in them).
    scales
        Sides of views from the middle of an image, as multiples of a tile's, the widest of which is the whole image;
        their features stand one after another. A view has as many pixels as it shows, at most those of a tile.
        None: the image itself.
    turns
        Each view is also seen turned by 90 degrees (4: by 180 and 270, too), and features are averaged.
    mean, std
        Input normalisation of RGB in 0..1; None: timm's for these weights.
    final_activation
        False leaves out the ReLU between the last batch norm and the pooling of a DenseNet, as the published
        code of mclSTExp does (it pools ``densenet121().features``).
    model_args
        Further arguments of ``timm.create_model``, e.g. ``{"pad_type": "same"}``: those of `MODEL_ARGS`.
    card
        Arguments of :class:`~stexp.models.encoders.weights.Card`.

    Attributes
    ----------
    model
        The timm model.
    num_features
        F.

    Raises
    ------
    InputError
        Unknown architecture, or weights that are not to be had or do not fit.
    """

    mean: torch.Tensor  # (1, 3, 1, 1)
    std: torch.Tensor

    @checked("image_encoder")
    def __init__(
        self,
        name: str,
        *,
        architecture: str | None = None,
        pretrained: bool = True,
        hub: str | None = None,
        hub_file: str | None = None,
        checkpoint: str | None = None,
        frozen: bool = False,
        tuning: Literal["all", "last", "lora"] = "all",
        last_blocks: Depth = 2,
        lora_rank: Width = 8,
        lora_alpha: Positive = 16,
        frozen_norm: bool = False,
        input_size: Pixels | None = None,
        output: Literal["pooled", "cls", "mean", "cls+mean", "levels"] = "pooled",
        scales: list[Positive] | None = None,
        turns: Literal[1, 2, 4] = 1,
        mean: Colour | None = None,
        std: ColourSpread | None = None,
        final_activation: bool = True,
        model_args: dict | None = None,
        card: dict | None = None,
    ) -> None:
        super().__init__()
        self.model: Any  # of timm, or like one: they have much in common, but no class
        if frozen and tuning != "all":
            raise InputError(
                f"image_encoder.frozen=true trains nothing; tuning={tuning} needs image_encoder.frozen=false"
            )
        self.name, self.frozen, self.frozen_norm = name, frozen, frozen_norm
        self.input_size, self.output, self.scales, self.turns = input_size, output, scales, turns
        if card is not None:
            check_keys(Card, card, "image_encoder.card")
        self.card = None if card is None else Card(**card)
        args = {"num_classes": 0, **_checked_model_args(model_args or {})}
        if output == "levels" and not frozen:
            raise InputError("image_encoder.output=levels is of a frozen network; image_encoder.frozen=true would fit")
        if output not in ("pooled", "levels"):
            args["global_pool"] = ""  # all tokens, normalised
        # part of the feature cache's key: neither weights nor printed layers hold all of it
        self.built_as = f"{architecture or name} {sorted(args.items())} {final_activation}"
        if scales is not None or turns > 1:
            self.built_as += f" {scales} {turns}"
        weights = Weights(name, hub, hub_file, checkpoint, self.card) if pretrained else None
        self.model = self.create(architecture or name, weights, args)
        if not final_activation:
            last = getattr(getattr(self.model, "features", None), "norm5", None)
            if last is None or not hasattr(last, "act"):
                raise InputError(f"image_encoder.final_activation=false: {name} has no activation after its last norm")
            last.act = nn.Identity()
        if output == "levels" and not hasattr(self.model, "forward_intermediates"):
            raise InputError(f"image_encoder.output=levels: {name} does not give its levels; pooled would fit")
        self.num_features = self._width() * len(scales or [1])
        if output not in ("pooled", "levels") and not getattr(self.model, "num_prefix_tokens", 0):
            raise InputError(f"image_encoder.output={output}: {name} has no class token; pooled would fit")
        config = {"mean": mean, "std": std} if mean and std else self.model.pretrained_cfg
        for key, value in (("mean", mean or config["mean"]), ("std", std or config["std"])):
            self.register_buffer(key, torch.tensor(value, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        if frozen:
            self.requires_grad_(False)
        elif tuning == "last":
            train_last(self.model, last_blocks)
        elif tuning == "lora":
            add_lora(self.model, lora_rank, lora_alpha)
        self.train(self.training)

    def create(self, architecture: str, weights: Weights | None, model_args: dict) -> nn.Module:
        """The model: images to features (B, F), with F as ``num_features``; what an encoder of one's own overrides."""
        return create_model(architecture, weights, model_args)

    def train(self, mode: bool = True) -> ImageEncoder:
        super().train(mode and not self.frozen)
        if self.training and not all(parameter.requires_grad for parameter in self.parameters()):
            self.model.eval()
            for part in trained_parts(self.model):
                part.train()
        if self.frozen_norm:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def prepare(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in 0..1 as `model` takes them: resized and normalised."""
        if self.input_size is not None and image.shape[-2:] != (self.input_size, self.input_size):
            _log_resizing(self.name, image.shape[-1], self.input_size)
            image = F.interpolate(image, size=(self.input_size, self.input_size), mode="bilinear", antialias=True)
        return (image - self.mean) / self.std

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in 0..1 to features (B, F)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = []
            for view in [image] if self.scales is None else at_scales(image, self.scales):
                turned = [self._pooled(torch.rot90(view, number, (2, 3))) for number in range(self.turns)]
                features.append(turned[0] if self.turns == 1 else torch.stack(turned).mean(dim=0))
            return features[0] if len(features) == 1 else torch.cat(features, dim=1)

    def _width(self) -> int:
        """Features of one view."""
        if self.output == "levels":
            return 2 * sum(level["num_chs"] for level in self.model.feature_info)
        return self.model.num_features * (2 if self.output == "cls+mean" else 1)

    def _pooled(self, image: torch.Tensor) -> torch.Tensor:
        if self.output == "levels":
            levels = self.model.forward_intermediates(self.prepare(image), intermediates_only=True)
            moments = [torch.var_mean(level.float(), dim=(2, 3), correction=0) for level in levels]
            return torch.cat([part for variance, mean in moments for part in (mean, variance.sqrt())], dim=1)
        features = self.model(self.prepare(image))
        if self.output == "pooled":
            return features
        parts = {"cls": features[:, 0], "mean": features[:, self.model.num_prefix_tokens :].mean(dim=1)}
        return torch.cat([parts[part] for part in self.output.split("+")], dim=1)


def at_scales(image: torch.Tensor, scales: Sequence[float]) -> list[torch.Tensor]:
    """Views from the middle of images (B, 3, H, H), one for each scale; see :class:`ImageEncoder`."""
    reach = max(1.0, *scales)
    return [central(image, scale / reach, round(min(scale, 1.0) * image.shape[-1] / reach)) for scale in scales]


def _checked_model_args(model_args: dict) -> dict:
    for key, value in model_args.items():
        if key not in MODEL_ARGS:
            raise InputError(
                f"image_encoder.model_args.{key} is not taken; {', '.join(sorted(MODEL_ARGS))} are"
                + did_you_mean(str(key), MODEL_ARGS)
            )
        several = value if isinstance(value, list | tuple) else [value]
        if not all(each is None or isinstance(each, str | int | float) for each in several):
            raise InputError(f"image_encoder.model_args.{key}={value}: a number, a word or a list of them would fit")
    return model_args


@functools.cache  # once for each pair of sizes
def _log_resizing(name: str, px: int, input_size: int) -> None:
    log.info("tiles of %d px are resized to the %d px that %s takes", px, input_size, name)
