"""A search under way: what every stage reads."""

from dataclasses import dataclass, field

from torch import Tensor

from hawq.quantizers import Schemes
from hawq.reads import Reads
from hawq.space import Space
from hawq.task import Task
from search.artefacts import (
    Candidate,
    CandidatesArtefact,
    CurvatureArtefact,
    ModelArtefact,
    SeededTrial,
    StudyArtefact,
    TablesArtefact,
    TrialsArtefact,
)
from search.config import RecipeConfig, SearchConfig
from search.events import EventLog, Measures
from search.folder import RunFolder
from search.searched import SearchesArtefact, SearchRecord
from search.spaces import fixed_bits
from search.study import with_parameters
from search.tasks.checkpoint import read_state, save_state

__all__ = ["Search"]


@dataclass(slots=True)
class Search:
    """What the stages read, and the CPU time that their workers used.

    Attributes:
        config: As resolved.
        task: Built from it.
        reads: The network's layers and activation tensors, and who reads what.
        space: What may be chosen, layer by layer and, where searched, tensor by tensor.
        channels: The same by channels; None where no method needs it.
        checkpoint: Weights from the config's file; None where the network is trained here.
        folder: The run's folder, with what earlier stages left there.
        events: What happened.
        worker_cpu_seconds: Of the stage under way.
    """

    config: SearchConfig
    task: Task
    reads: Reads
    space: Space
    channels: Space | None
    checkpoint: dict[str, Tensor] | None
    folder: RunFolder
    events: EventLog
    worker_cpu_seconds: float = field(default=0.0)

    @property
    def layers(self) -> list[str]:
        """Names of the layers whose weights are searched."""
        return [layer.name for layer in self.reads.layers]

    @property
    def activations(self) -> list[str]:
        """Names of the activation tensors that those layers read."""
        return [activation.name for activation in self.reads.activations]

    @property
    def fixed_activations(self) -> dict[str, int]:
        """Bits of the activations that are not searched, as ``hawq.finetune.attach`` takes them."""
        return fixed_bits(self.config, self.reads)

    @property
    def study(self) -> StudyArtefact | None:
        """What the study stage left; None where the config asks for none."""
        return self.folder.load("study", StudyArtefact)[0] if self.config.study else None

    @property
    def training(self) -> tuple[RecipeConfig, Schemes]:
        """How all candidates are trained: as configured, or as the study found."""
        found = self.study
        own = (self.config.finetune, self.config.schemes)
        return with_parameters(*own, found.parameters) if found else own

    @property
    def weights(self) -> dict[str, Tensor]:
        """The network's weights before quantization."""
        return read_state(self.folder.path / "model.safetensors")

    def save_weights(self, state: dict[str, Tensor]) -> None:
        """Keep the weights that will be searched."""
        save_state(self.folder.path / "model.safetensors", state)

    @property
    def model(self) -> ModelArtefact:
        """What the model stage left."""
        return self.folder.load("model", ModelArtefact)[0]

    @property
    def curvature(self) -> CurvatureArtefact:
        """What the curvature stage left."""
        return self.folder.load("curvature", CurvatureArtefact)[0]

    @property
    def tables(self) -> TablesArtefact:
        """What the tables stage left."""
        return self.folder.load("tables", TablesArtefact)[0]

    @property
    def searches(self) -> list[SearchRecord]:
        """What the searches stage left; none where no method scores what it tries."""
        if not self.config.searching:
            return []
        return self.folder.load("searches", SearchesArtefact)[0].searches

    @property
    def candidates(self) -> list[Candidate]:
        """What the candidates stage left."""
        return self.folder.load("candidates", CandidatesArtefact)[0].candidates

    @property
    def trials(self) -> list[SeededTrial]:
        """What the trials stage left."""
        return self.folder.load("trials", TrialsArtefact)[0].trials

    def progress(
        self,
        stage: str,
        done: float,
        total: float,
        unit: str,
        message: str = "",
        measures: Measures | None = None,
    ) -> None:
        """Say how far a stage is."""
        self.events.emit(
            stage, "progress", message, done=done, total=total, unit=unit, measures=measures
        )
