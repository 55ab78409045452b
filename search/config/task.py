"""The network and its data."""

from typing import Literal

from pydantic import Field, JsonValue, model_validator

from search.config.recipe import RecipeConfig
from search.config.section import Positive, Section

__all__ = ["DetectorConfig", "TaskConfig"]


class DetectorConfig(Section):
    """A detector of mmdetection 3.x, with data in COCO's format."""

    config: str = Field(
        description="mmdetection's config; mmdet::retinanet/NAME.py for one that comes with it."
    )
    root: str | None = Field(None, description="Takes the place of every data_root in it.")
    options: dict[str, JsonValue] = Field(
        {}, description="Dotted keys of the config to other values: model.bbox_head.num_classes."
    )
    smooth_l1_beta: float = Field(
        1 / 9,
        gt=0,
        description="In the curvature, smooth L1 with this β stands for boxes' L1 loss, which has "
        "none.",
    )


class TaskConfig(Section):
    """The network, its data and its splits."""

    data: Literal["digits", "cifar10"] | None = Field(None, description="A built-in image set.")
    root: str | None = Field(None, description="Folder of the image set's files.")
    network: str = Field(
        "resnet20",
        pattern=r"^resnet\d+$",
        description="resnet8, resnet14, resnet20, resnet32, resnet44, resnet56 (for small images).",
    )
    detector: DetectorConfig | None = Field(
        None, description="A detector with its data, instead of data."
    )
    factory: str | None = Field(
        None, description="package.module:callable that returns your own Task, instead of data."
    )
    arguments: dict[str, JsonValue] = Field({}, description="Keyword arguments of the factory.")
    checkpoint: str | None = Field(None, description="safetensors or torch file of weights.")
    pretrain: RecipeConfig | None = Field(
        None, description="Train the network first, where there is no checkpoint."
    )
    fold_batch_norm: bool = Field(
        False, description="Fold every batch-norm that follows a layer into it, before the search."
    )
    search_size: Positive = Field(5000, description="Training images held out to rank candidates.")
    search_indices: str | None = Field(
        None, description="JSON list of training images to rank on that the checkpoint never saw."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "TaskConfig":
        sources = (self.data, self.detector, self.factory)
        if sum(source is not None for source in sources) != 1:
            raise ValueError(
                "give one of data (digits, cifar10), detector (config: …) or factory "
                "(package.module:name)"
            )
        if self.factory is None and (self.checkpoint is None) == (self.pretrain is None):
            raise ValueError("give either checkpoint (a file of weights) or pretrain (a recipe)")
        if self.pretrain is not None and self.pretrain.distillation:
            raise ValueError(
                "pretrain.distillation must be 0, for there is no network to learn from yet, "
                f"got {self.pretrain.distillation:g}"
            )
        if self.pretrain is not None and self.fold_batch_norm:
            raise ValueError(
                "fold_batch_norm needs trained weights, for a network trains with its batch-norm, "
                "got pretrain: train first, then search again from checkpoint: "
                "RUN/model.safetensors"
            )
        depth = int(self.network.removeprefix("resnet"))
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"network must be resnet8, resnet14, resnet20 … (6n+2), got {depth}")
        return self
