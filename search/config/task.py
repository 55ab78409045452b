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

    data: Literal["digits", "cifar10", "imagenet"] | None = Field(
        None, description="An image set: built-in, or photographs in a folder a class."
    )
    root: str | None = Field(
        None, description="Folder of the image set's files; of imagenet, it holds train and val."
    )
    network: str = Field(
        "resnet20",
        pattern=r"^(resnet\d+|(pytorchcv|timm|torchvision):[\w./-]+)$",
        description="resnet8, resnet14, resnet20, resnet32, resnet44, resnet56 (for small images); "
        "or a published one: pytorchcv:resnet50, timm:NAME, torchvision:NAME.",
    )
    pretrained: bool = Field(
        False, description="The library of a published network loads its weights."
    )
    model: str | None = Field(
        None, description="package.module:callable that returns your own nn.Module."
    )
    batches: str | None = Field(
        None,
        description="package.module:callable that returns your own examples for model, instead of "
        "data: {train: (inputs, targets), test: …}.",
    )
    loss: str | None = Field(
        None,
        description="With batches: package.module:callable of outputs and targets, one value an "
        "example; null: cross-entropy.",
    )
    metric: str | None = Field(
        None, description="With batches: likewise, higher is better; null: accuracy."
    )
    detector: DetectorConfig | None = Field(
        None, description="A detector with its data, instead of data."
    )
    factory: str | None = Field(
        None, description="package.module:callable that returns your own Task, instead of data."
    )
    arguments: dict[str, JsonValue] = Field(
        {}, description="Keyword arguments of the factory, the model or the published network."
    )
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
    train_size: Positive | None = Field(
        None, description="Of imagenet: training images, drawn by the seed; null: all."
    )
    test_size: Positive | None = Field(
        None, description="Of imagenet: images of val, drawn by the seed; null: all."
    )
    resolution: Positive | None = Field(
        None, description="Of imagenet: pixels of a side; null: as the network wants them."
    )
    cache: str | None = Field(
        None, description="Of imagenet: folder for decoded images, which all workers share."
    )

    @property
    def is_published(self) -> bool:
        """Whether the network is one that a library knows by name."""
        return ":" in self.network

    @model_validator(mode="after")
    def _consistent(self) -> "TaskConfig":
        sources = (self.data, self.detector, self.factory, self.batches)
        if sum(source is not None for source in sources) != 1:
            raise ValueError(
                "give one of data (digits, cifar10, imagenet), detector (config: …), factory "
                "(package.module:name) or batches (package.module:name)"
            )
        self._keys_of_their_data()
        self._weights_from_one_place()
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
        depth = 8 if self.is_published else int(self.network.removeprefix("resnet"))
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"network must be resnet8, resnet14, resnet20 … (6n+2), got {depth}")
        return self

    def _weights_from_one_place(self) -> None:
        given = [
            key
            for key in ("checkpoint", "pretrain", "pretrained")
            if getattr(self, key) is not None and getattr(self, key) is not False
        ]
        brings_its_own = self.factory is not None or self.model is not None
        if self.pretrained and (brings_its_own or not self.is_published):
            raise ValueError(
                "pretrained is for published networks, such as pytorchcv:resnet50, "
                f"got {self.model or self.factory or self.network}"
            )
        if len(given) > 1 or not (given or brings_its_own):
            raise ValueError(
                "give either checkpoint (a file of weights) or pretrain (a recipe), or "
                f"pretrained: true for a published network, got {' and '.join(given) or 'none'}"
            )

    def _keys_of_their_data(self) -> None:
        """Refuse keys that would be passed over."""
        if self.model is not None and (self.factory or self.detector):
            raise ValueError("model needs data or batches, got factory or detector: leave one out")
        if self.batches is not None and self.model is None:
            raise ValueError("batches needs model (package.module:name), got none")
        of_batches = [key for key in ("loss", "metric") if getattr(self, key) is not None]
        if of_batches and self.batches is None:
            raise ValueError(f"{of_batches[0]} is for batches, got none")
        keys = ("train_size", "test_size", "resolution", "cache")
        of_imagenet = [key for key in keys if getattr(self, key) is not None]
        if self.data != "imagenet":
            if of_imagenet:
                raise ValueError(f"{of_imagenet[0]} is for data: imagenet, got {self.data}")
            return
        if self.root is None or self.cache is None:
            raise ValueError("data: imagenet needs root (train/ and val/ in it) and cache")
        if self.model is None and not self.is_published:
            raise ValueError(
                "data: imagenet needs model, or a published network such as pytorchcv:resnet50, "
                f"got {self.network}"
            )
        if self.search_indices is not None:
            raise ValueError("search_indices is for digits and cifar10, got data: imagenet")
