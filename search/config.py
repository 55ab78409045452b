"""The config: one schema for the YAML file, the Python object and a request's body.

Unknown keys are refused with the nearest known one. Strings may name environment variables:
``${HAWQ_DATA}``, or ``${HAWQ_DATA:-fallback}``.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from hawq.cost import FLOAT_BITS, average_bits, compression, mib
from hawq.finetune import Recipe
from hawq.space import Space
from search.errors import InputError
from search.searchers import SEARCHERS

__all__ = ["Budget", "SearchConfig", "load_config", "template"]

Bits = Annotated[int, Field(ge=1, le=8)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RecipeConfig(_Section):
    """How to train: SGD with Nesterov momentum, a warm-up, then a cosine to zero."""

    epochs: Positive = Field(10, description="Passes over the training split.")
    batch_size: Positive = Field(128, description="Examples a step.")
    lr: float = Field(0.02, gt=0, description="Peak learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps with a rising rate.")
    scale_lr: float = Field(
        1.0, ge=0, description="Rate of quantization scales, as multiple of lr."
    )
    freeze_batch_norm: Share = Field(
        0.6, description="Share of the epochs after which batch-norm statistics stay fixed."
    )
    examples_per_epoch: Positive | None = Field(None, description="null: the whole split.")
    precision: Literal["fp32", "bf16"] = "fp32"

    def recipe(self) -> Recipe:
        """Return the same as the training loop takes it."""
        return Recipe(**self.model_dump())


class TaskConfig(_Section):
    """The network, its data and its splits."""

    data: Literal["digits", "cifar10"] | None = Field(None, description="A built-in image set.")
    root: str | None = Field(None, description="Folder of the image set's files.")
    network: str = Field(
        "resnet20",
        pattern=r"^resnet\d+$",
        description="resnet8, resnet14, resnet20, resnet32, resnet44, resnet56 (for small images).",
    )
    factory: str | None = Field(
        None, description="package.module:callable that returns your own Task, instead of data."
    )
    arguments: dict[str, JsonValue] = Field({}, description="Keyword arguments of the factory.")
    checkpoint: str | None = Field(None, description="safetensors or torch file of weights.")
    pretrain: RecipeConfig | None = Field(
        None, description="Train the network first, where there is no checkpoint."
    )
    search_size: Positive = Field(5000, description="Training images held out to rank candidates.")
    search_indices: str | None = Field(
        None, description="JSON list of training images to rank on that the checkpoint never saw."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "TaskConfig":
        if (self.data is None) == (self.factory is None):
            raise ValueError("give either data (digits, cifar10) or factory (package.module:name)")
        if self.data is not None and (self.checkpoint is None) == (self.pretrain is None):
            raise ValueError("give either checkpoint (a file of weights) or pretrain (a recipe)")
        depth = int(self.network.removeprefix("resnet"))
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"network must be resnet8, resnet14, resnet20 … (6n+2), got {depth}")
        return self


class CurvatureConfig(_Section):
    """Hessian traces: on how many examples, to what error."""

    estimator: Literal["auto", "exact_gauss_newton", "gauss_newton", "hutchinson"] = Field(
        "auto", description="auto: Gauss-Newton where it is the Hessian, else hutchinson."
    )
    examples: Positive = Field(512, description="Training examples.")
    pool: Positive | None = Field(
        16384,
        description="Draw them by importance from so many (exact_gauss_newton only); "
        "null: uniformly.",
    )
    batch_size: Positive = Field(32, description="Examples a unit of work.")
    probes_per_unit: int = Field(4, ge=2, description="Probes a unit; they share a forward pass.")
    rtol: float = Field(
        0.05, gt=0, description="Stop when every layer's probe error is at most this share of it."
    )
    max_probes: int = Field(200, ge=2, description="Probes an example at most.")

    @model_validator(mode="after")
    def _measurable(self) -> "CurvatureConfig":
        if self.examples <= self.batch_size:
            raise ValueError(
                "examples must be more than batch_size, for errors need two batches, "
                f"got {self.examples} and {self.batch_size}"
            )
        if self.max_probes < self.probes_per_unit:
            raise ValueError(
                "max_probes must be at least probes_per_unit, "
                f"got {self.max_probes} and {self.probes_per_unit}"
            )
        return self


class WeightsConfig(_Section):
    """What each layer's weight may receive."""

    bits: Annotated[list[Bits], Field(min_length=1)] = Field([1, 2, 3, 4, 5, 6, 7, 8])
    pin: dict[str, Bits] = Field({}, description="Layer name or glob to fixed bits.")


class ActivationsConfig(_Section):
    """Every quantized layer's input."""

    bits: Bits | None = Field(4, description="null leaves activations in floating point.")
    input_bits: Bits = Field(8, description="Where the input is the network's own.")


class Budget(_Section):
    """The size of all weights together; exactly one key."""

    weight_mib: float | None = Field(None, gt=0, description="MiB (2^20 bytes).")
    compression: float | None = Field(None, gt=0, description="Times smaller than 32-bit floats.")
    average_bits: float | None = Field(None, gt=0, description="Bits a weight.")

    @model_validator(mode="after")
    def _one(self) -> "Budget":
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("give exactly one of weight_mib, compression, average_bits")
        return self

    @property
    def label(self) -> str:
        """The budget in words."""
        if self.weight_mib is not None:
            return f"{self.weight_mib:g} MiB"
        if self.compression is not None:
            return f"{self.compression:g}×"
        return f"{self.average_bits:g} bits"

    def with_size(self, space: Space, bits: int) -> str:
        """Say in this budget's own unit what ``bits`` would be."""
        if self.weight_mib is not None:
            return f"{mib(bits):.4g} MiB"
        if self.compression is not None:
            return f"{compression(space, bits):.4g}×"
        return f"{average_bits(space, bits):.4g} bits"

    def limit_bits(self, space: Space) -> int:
        """Convert to whole bits for a space."""
        if self.weight_mib is not None:
            return int(self.weight_mib * (8 << 20))
        if self.compression is not None:
            return int(FLOAT_BITS * space.num_elements / self.compression)
        assert self.average_bits is not None
        return int(self.average_bits * space.num_elements)


class TrialsConfig(_Section):
    """Fine-tuning in parallel under Ray Tune."""

    cpus: float = Field(1, gt=0, description="CPUs (and threads) a trial.")
    gpus: float = Field(0, ge=0, description="GPUs a trial.")
    max_concurrent: Positive | None = Field(None, description="null: as many as fit.")
    max_failures: int = Field(3, ge=0, description="Restarts of a trial whose worker died.")
    asha: bool = Field(False, description="Stop poor trials early; they are then not comparable.")


class WorkersConfig(_Section):
    """Curvature in parallel on Ray workers."""

    count: Positive | None = Field(None, description="null: one for each CPU of the cluster.")
    cpus: float = Field(1, gt=0, description="CPUs (and threads) a worker.")
    gpus: float = Field(0, ge=0, description="GPUs a worker.")


class RayConfig(_Section):
    """The cluster."""

    address: str | None = Field(None, description="null starts Ray on this machine.")
    dashboard: bool = Field(True, description="Start the dashboard with a local Ray.")


class SearchConfig(_Section):
    """A search: the task, what may be chosen, within which budgets, by which methods."""

    seed: int = Field(0, ge=0)
    task: TaskConfig
    curvature: CurvatureConfig = CurvatureConfig()
    weights: WeightsConfig = WeightsConfig()
    activations: ActivationsConfig = ActivationsConfig()
    budgets: Annotated[list[Budget], Field(min_length=1)]
    methods: Annotated[list[str], Field(min_length=1)] = list(SEARCHERS)
    finetune: RecipeConfig = RecipeConfig()
    trials: TrialsConfig = TrialsConfig()
    workers: WorkersConfig = WorkersConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _known_methods(self) -> "SearchConfig":
        for method in self.methods:
            if method not in SEARCHERS:
                raise ValueError(
                    f"methods: {method!r} is not known{_suggestion(method, SEARCHERS)}; "
                    f"known are {', '.join(SEARCHERS)}"
                )
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> SearchConfig:
    """Read a YAML file and apply overrides.

    Args:
        path: The file.
        overrides: ``"curvature.rtol=0.02"``, each value in YAML.

    Raises:
        InputError: If the file cannot be read or a value is wrong, one line for each mistake.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: the config must be readable ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: must be YAML, got {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: must be a mapping of sections, got {type(raw).__name__}")
    for override in overrides:
        _override(raw, override)
    try:
        return SearchConfig.model_validate(_expanded(raw, str(path)))
    except ValidationError as error:
        raise InputError("\n".join(f"{path}: {line}" for line in _lines(error))) from error


def template() -> str:
    """Return a config for a first search of one's own, every key with its comment."""
    head = (
        "# A search for mixed-precision bits. Run it with: hawq run THIS_FILE\n"
        "# Commented keys show their defaults.\n\n"
        "seed: 0\n\n"
        "task:\n"
        "  data: digits  # digits, cifar10\n"
        "  network: resnet14\n"
        "  search_size: 287\n"
        "  pretrain:\n"
        "    epochs: 15\n"
        "    batch_size: 32\n"
        "    lr: 0.1\n\n"
        "budgets:  # each with exactly one of weight_mib, compression, average_bits\n"
        "  - average_bits: 3\n"
        "  - compression: 16\n\n"
        f"methods: [{', '.join(SEARCHERS)}]\n"
    )
    sections = []
    for name in ("task", "curvature", "weights", "activations", "finetune", "trials", "workers"):
        model = SearchConfig.model_fields[name].annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        lines = [f"\n# {name}:  # {(model.__doc__ or '').splitlines()[0]}"]
        for key, field in model.model_fields.items():
            default = yaml.safe_dump(
                field.get_default(call_default_factory=True), default_flow_style=True
            )
            note = f"  # {field.description}" if field.description else ""
            lines.append(f"#   {key}: {default.splitlines()[0]}{note}")
        sections.append("\n".join(lines) + "\n")
    return head + "".join(sections)


def _override(raw: dict[str, Any], text: str) -> None:
    path, separator, value = text.partition("=")
    if not separator or not path:
        raise InputError(f"--set must be KEY=VALUE, such as curvature.rtol=0.02, got {text!r}")
    keys = path.split(".")
    place: Any = raw
    for key in keys[:-1]:
        if isinstance(place, list) and key.isdigit() and int(key) < len(place):
            place = place[int(key)]
        elif isinstance(place, dict):
            place = place.setdefault(key, {})
        else:
            raise InputError(f"--set {text}: {key!r} must be inside a section, got {place!r}")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"--set {text}: the value must be YAML, got {value!r}") from error
    last = keys[-1]
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = parsed
    elif isinstance(place, dict):
        place[last] = parsed
    else:
        raise InputError(f"--set {text}: {last!r} must be inside a section, got {place!r}")


def _expanded(value: Any, where: str) -> Any:
    """Replace ${NAME} and ${NAME:-fallback} in every string."""
    if isinstance(value, dict):
        return {key: _expanded(inner, f"{where}: {key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [_expanded(inner, where) for inner in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        name, fallback = match["name"], match["fallback"]
        found = os.environ.get(name, fallback)
        if found is None:
            raise InputError(f"{where}: environment variable {name} must be set, got nothing")
        return found

    return re.sub(r"\$\{(?P<name>\w+)(?::-(?P<fallback>[^}]*))?\}", variable, value)


def _lines(error: ValidationError) -> list[str]:
    """Turn pydantic's errors into one line each: path, value, remedy."""
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            *parents, key = problem["loc"]
            known = _keys_at(SearchConfig, parents)
            lines.append(f"{path}: unknown key{_suggestion(str(key), known)}")
        elif problem["type"] == "missing":
            lines.append(f"{path}: must be given, got nothing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            plain = isinstance(problem["input"], str | int | float | bool | None)
            given = f", got {problem['input']!r}" if plain else ""
            lines.append(f"{path}: {message}{given}" if path else message)
    return lines


def _keys_at(model: type[BaseModel], path: Sequence[str | int]) -> Mapping[str, object]:
    """Return the keys that the schema knows at a path."""
    for part in path:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        inner = _model_in(field.annotation) if field is not None else None
        if inner is None:
            return {}
        model = inner
    return model.model_fields


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def _suggestion(key: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(key, known, 1, 0.5)
    return f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
