"""The conformance check passes a sound task and catches each broken one, by name."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from oracles import TinyTask
from torch import nn

from hawq.task import Factor
from hawq.testing import TaskContractError, check_task

NO_GENERATOR = None


def test_a_sound_task_passes():
    check_task(TinyTask())


def test_a_task_without_factors_passes():
    check_task(TinyTask(factored=False))


@pytest.mark.parametrize("num_examples", [1, 2, 3])
def test_splits_may_be_small(num_examples):
    check_task(TinyTask(num_examples=num_examples))


def test_checking_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    check_task(TinyTask())
    assert torch.equal(torch.get_rng_state(), state)


class Unpicklable(TinyTask):
    def __reduce__(self):
        raise TypeError("cannot pickle an open file")


class Forgetful(TinyTask):
    """Its fingerprint is of the object, not of what it describes."""

    @property
    def fingerprint(self):
        return str(id(self))


class Gone(TinyTask):
    def batch(self, split, indices):
        raise OSError("no such disk\nat all")


class TwoSplits(TinyTask):
    def size(self, split):
        return {"train": 12, "test": 12}[split]


class Fixed(TinyTask):
    def augment(self, batch):
        return batch


class Unbuilt(TinyTask):
    def model(self):
        raise StopIteration


class Unpacked(TinyTask):
    def scores(self, model, batch):
        return model(batch)


class Uncurved(TinyTask):
    def curvature(self, model, batch):
        raise RuntimeError


class Nameless(TinyTask):
    fingerprint = ""


class WithoutSearchSplit(TinyTask):
    def size(self, split):
        return 0 if split == "search" else 12


class Restless(TinyTask):
    """Augments where it should not."""

    def batch(self, split, indices):
        images, labels = super().batch(split, indices)
        return images + torch.rand(()), labels


class Sorted(TinyTask):
    """Reads its examples in the file's order."""

    def batch(self, split, indices):
        return super().batch(split, indices.sort().values)


class Sequential(TinyTask):
    """Draws noise by the place in the batch, not by the example."""

    def batch(self, split, indices):
        images, labels = super().batch(split, indices)
        return images + torch.arange(len(images))[:, None, None, None], labels


class HalfInputs(TinyTask):
    def inputs(self, batch):
        return batch[0][0]


class GloballyAugmented(TinyTask):
    def augment(self, batch, generator):
        return super().augment(batch, NO_GENERATOR)


class Cropping(TinyTask):
    def augment(self, batch, generator):
        return batch[0][:, :, :4], batch[1]


class RandomWeights(TinyTask):
    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(50, 4))


class DoubleWeights(TinyTask):
    def model(self):
        return super().model().double()


class MeanLoss(TinyTask):
    def losses(self, model, batch):
        return super().losses(model, batch).mean()


class NormalizedByBatch(TinyTask):
    """As detection losses are, by the positives of the batch."""

    def losses(self, model, batch):
        return super().losses(model, batch) / len(batch[1])


class Centred(TinyTask):
    """Batch-norm that stays in training mode does this and more."""

    def losses(self, model, batch):
        outputs = model(batch[0])
        return F.cross_entropy(outputs - outputs.mean(0), batch[1], reduction="none")


class Overflowing(TinyTask):
    def losses(self, model, batch):
        return super().losses(model, batch) * float("inf")


class Detached(TinyTask):
    def losses(self, model, batch):
        return super().losses(model, batch).detach()


class HalfTheFactor(TinyTask):
    def curvature(self, model, batch):
        outputs, (factor,) = super().curvature(model, batch)
        return outputs, [Factor(factor.rank, lambda s: factor.apply(s) / 2)]


class WrongSign(TinyTask):
    def curvature(self, model, batch):
        outputs, (factor,) = super().curvature(model, batch)
        return outputs, [Factor(factor.rank, factor.apply, sign=-1.0)]


class NoSign(TinyTask):
    def curvature(self, model, batch):
        outputs, (factor,) = super().curvature(model, batch)
        return outputs, [Factor(factor.rank, factor.apply, sign=0.5)]


class FlatFactor(TinyTask):
    def curvature(self, model, batch):
        outputs, (factor,) = super().curvature(model, batch)
        return outputs, [Factor(factor.rank, lambda s: factor.apply(s).flatten())]


class PooledOutputs(TinyTask):
    def curvature(self, model, batch):
        outputs, factors = super().curvature(model, batch)
        return outputs.mean(0, keepdim=True), factors


class OneScore(TinyTask):
    def scores(self, model, batch):
        return super().scores(model, batch).mean()


class NanScore(TinyTask):
    def scores(self, model, batch):
        return super().scores(model, batch) / 0 * 0


class NoNetwork(TinyTask):
    def model(self):
        return None


class OfTwo(nn.Linear):
    def forward(self, images, weights):
        return super().forward(images.flatten(1) * weights)


class TwoInputs(TinyTask):
    """Its losses know how to call its network, but nobody else does."""

    def model(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return OfTwo(50, 4)

    def losses(self, model, batch):
        return F.cross_entropy(model(batch[0], 2.0), batch[1], reduction="none")


class NoFactors(TinyTask):
    def curvature(self, model, batch):
        return model(batch[0])


@dataclass
class NoTask:
    score_name: str = "accuracy"


BROKEN = {
    Unpicklable: "a task must be picklable, got cannot pickle an open file",
    Forgetful: "must rebuild to the same fingerprint",
    Nameless: "fingerprint must be a string that is not empty, got ''",
    WithoutSearchSplit: "split 'search' must hold examples, got size 0",
    Restless: "must return the same examples for the same indices",
    Sorted: r"must hold the examples of \[i\] and of \[j\] in that order",
    Sequential: r"must hold the examples of \[i\] and of \[j\] in that order",
    HalfInputs: r"inputs must be a tensor of 4 examples, got \(2, 5, 5\)",
    GloballyAugmented: "augment must draw from its generator alone",
    Cropping: r"augment must keep the inputs' shape, \(4, 2, 5, 5\), got \(4, 2, 4, 5\)",
    RandomWeights: "must build the same weights each time",
    DoubleWeights: "must be float32 on the CPU, got conv1.weight in torch.float64 on cpu",
    MeanLoss: r"losses must have shape \(4,\), got \(\)",
    NormalizedByBatch: "an example's loss must not depend on the others of its batch",
    Centred: "an example's loss must not depend on the others of its batch",
    Overflowing: "losses must be finite, got .* on split 'train'",
    Detached: "losses must be differentiable",
    HalfTheFactor: "must equal the Hessian of each example's loss in the outputs",
    WrongSign: "must equal the Hessian of each example's loss in the outputs",
    NoSign: "factors of sign",
    FlatFactor: r"a factor must map \(N, R\) to the outputs' shape \(4, 4\), got \(16,\)",
    PooledOutputs: r"outputs must hold 4 examples, got shape \(1, 4\)",
    OneScore: r"scores must have shape \(4,\), got \(\)",
    NanScore: "scores must be finite",
    NoNetwork: r"model\(\) must return an nn\.Module, got NoneType",
    TwoInputs: "must take what inputs returns, one tensor, got TypeError: .*'weights'",
    NoFactors: r"curvature must return outputs and factors, or None, got \(4, 4\)",
    Gone: r"size, batch and inputs of split 'train' must not fail, got OSError: no such disk$",
    TwoSplits: r"inputs of split 'search' must not fail, got KeyError: 'search'",
    Fixed: r"augment must not fail, got TypeError: .* takes 2 positional arguments",
    Unbuilt: r"model\(\) must not fail, got StopIteration: $",
    Unpacked: r"losses and scores of split 'train' must not fail, got [A-Z]\w+Error",
    Uncurved: r"curvature must not fail, got RuntimeError: $",
    NoTask: r"every member of hawq.task.Task, got no \['augment', 'batch', ",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda task: task.__name__)
def test_a_broken_task_is_caught_by_the_rule_that_it_breaks(broken):
    with pytest.raises(TaskContractError, match=BROKEN[broken]) as caught:
        check_task(broken())
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


class Listed(TinyTask):
    """Keeps its images in a list, as detectors with pictures of several sizes do."""

    def batch(self, split, indices):
        images, labels = super().batch(split, indices)
        return {"images": list(images), "labels": labels}

    def augment(self, batch, generator):
        images, labels = super().augment(self._stacked(batch), generator)
        return {"images": list(images), "labels": labels}

    def inputs(self, batch):
        return torch.stack(batch["images"])

    def losses(self, model, batch):
        return super().losses(model, self._stacked(batch))

    def curvature(self, model, batch):
        return super().curvature(model, self._stacked(batch))

    def scores(self, model, batch):
        return super().scores(model, self._stacked(batch))

    def _stacked(self, batch):
        return self.inputs(batch), batch["labels"]


def test_batches_may_be_nested_and_need_not_stack():
    check_task(Listed())


class Indefinite(TinyTask):
    """A loss that is concave in one output: it needs a factor of each sign."""

    def losses(self, model, batch):
        outputs = model(batch[0])
        return (3 * outputs[:, 0].square() - outputs[:, 1].square()) / 2

    def curvature(self, model, batch):
        outputs = model(batch[0])
        plus, minus = (
            Factor(1, lambda s, j=j, c=c: F.one_hot(torch.tensor(j), 4) * c * s, sign=sign)
            for j, c, sign in ((0, 3**0.5, 1.0), (1, 1.0, -1.0))
        )
        return outputs, [plus, minus]


def test_factors_of_both_signs_are_added_up():
    check_task(Indefinite())
