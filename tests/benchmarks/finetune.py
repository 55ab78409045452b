"""A step of quantization-aware training against the same step in floating point, and peers.

ResNet20, 128 images of 32×32, forward, backward and SGD; weights and activations quantized, ours
also with bits for each channel of both. Every variant is a network of its own, and they take turns
step by step, so that what else the machine does falls on all alike; ratios are of the same turn.

Peers, through the same parametrizations and hooks: torch.ao's FakeQuantize (fixed ranges, torch's
fused kernel), its learnable twin (LSQ's gradients, fused), and LSQ as one writes it down first, of
differentiable operators. CPU-seconds of one thread; on a GPU seconds between synchronizations.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hawq.finetune import attach, calibrate, fixed_activations
from hawq.quantizers import Scheme, Schemes, codes
from hawq.reads import Reads, read_network
from search.tasks.networks import SmallResNet
from tests.benchmarks.record import Row, record

BATCH, WIDTHS, ACTIVATION_BITS = 128, (2, 3, 4), 4

Quantize = Callable[[nn.Module, Reads, Tensor], None]


def main() -> None:
    """Measure every variant in both precisions."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.finetune")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for precision in ("fp32", "bf16"):
        seconds = measure(given.device, precision, given.turns)
        floor = seconds["floating point"]
        unit = "s" if given.device == "cuda" else "CPU s"
        for name, found in seconds.items():
            step = f"{name}, {precision}"
            rows.append(Row(step, "", statistics.median(found), f"{unit} a step"))
            if name != "floating point":
                ratio = statistics.median(a / b for a, b in zip(found, floor, strict=True))
                rows.append(Row(step, f"floating point, {precision}", ratio, "times"))
    record("finetune", rows)


def measure(device: str, precision: str, turns: int) -> dict[str, list[float]]:
    """Time every variant's steps, turn by turn, after two to warm up."""
    steps = {name: _step(quantize, device, precision) for name, quantize in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    clock = time.process_time if device == "cpu" else time.perf_counter
    for turn in range(turns + 2):
        for name, step in steps.items():
            started = clock()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[name].append(clock() - started)
    return seconds


def _step(quantize: Quantize, device: str, precision: str) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = SmallResNet(20, in_channels=3, num_classes=10).to(device)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(10, (BATCH,), generator=generator).to(device)
    quantize(model, read_network(model, images[:2]), images)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def _ours(
    schemes: Schemes, by_channel: bool, model: nn.Module, reads: Reads, images: Tensor
) -> None:
    bits = {f"w:{layer.name}": WIDTHS[i % 3] for i, layer in enumerate(reads.layers)}
    bits |= fixed_activations(reads, ACTIVATION_BITS, 8)
    if by_channel:
        sizes = {f"w:{layer.name}": layer.num_channels for layer in reads.layers}
        sizes |= {f"a:{tensor.name}": tensor.num_channels for tensor in reads.activations}
        bits = {
            f"{name}[{c}]": (WIDTHS if name[0] == "w" else (3, 4, 5))[c % 3]
            for name in bits
            for c in range(sizes[name])
        }
    attach(model, bits, images[:2], schemes)
    calibrate(model, [images])


def _peers(
    make: Callable[[Tensor, int, bool], nn.Module], model: nn.Module, reads: Reads, images: Tensor
) -> None:
    """Put a quantizer on every layer's weight and input."""
    device = images.device
    inputs: dict[str, Tensor] = {}

    def keep(layer: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[layer] = args[0].detach()

    handles = [
        model.get_submodule(layer.name).register_forward_pre_hook(partial(keep, layer.name))
        for layer in reads.layers
    ]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    for i, layer in enumerate(reads.layers):
        module = model.get_submodule(layer.name)
        weight, read = module.weight.detach(), inputs[layer.name]
        is_input = bool((read < 0).any())
        parametrize.register_parametrization(
            module, "weight", make(weight, WIDTHS[i % 3], True).to(device)
        )
        quantizer = make(read, 8 if is_input else ACTIVATION_BITS, is_input).to(device)
        module.add_module("own_quantizer", quantizer)
        module.register_forward_pre_hook(lambda m, args: (m.own_quantizer(args[0]),))


class _Naive(nn.Module):
    """LSQ of differentiable operators: a rounding and a scale, each with its gradient replaced."""

    def __init__(self, values: Tensor, bits: int, signed: bool) -> None:
        super().__init__()
        self.low, self.high = codes(max(bits, 3) if signed else bits, signed=signed)
        self.scale = nn.Parameter(2 * values.abs().mean() / self.high**0.5)
        self.factor = (values.numel() * self.high) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.scale * self.factor
        scale = scaled + (self.scale - scaled).detach()
        clipped = torch.clamp(x / scale, self.low, self.high)
        rounded = clipped + (clipped.round() - clipped).detach()
        return rounded * scale


def _torch_ao(learnable: bool, values: Tensor, bits: int, signed: bool) -> nn.Module:
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver  # noqa: PLC0415
    from torch.ao.quantization._learnable_fake_quantize import (  # noqa: PLC0415
        _LearnableFakeQuantize,
    )

    low, high = codes(max(bits, 3) if signed else bits, signed=signed)
    how = {
        "observer": MovingAverageMinMaxObserver,
        "quant_min": low,
        "quant_max": high,
        "dtype": torch.qint8 if signed else torch.quint8,
        "qscheme": torch.per_tensor_symmetric if signed else torch.per_tensor_affine,
        "reduce_range": False,
    }
    if learnable:
        module = _LearnableFakeQuantize(**how, use_grad_scaling=True)
        module(values.cpu())
        module.enable_param_learning()
        return module
    fixed = FakeQuantize(**how)
    fixed(values.cpu())
    fixed.disable_observer()
    return fixed


_DOREFA_PACT = Schemes(
    Scheme(learning="dorefa", per="tensor"), Scheme(learning="pact", per="tensor")
)
VARIANTS: dict[str, Quantize] = {
    "floating point": lambda *_: None,
    "ours, bits a layer": partial(_ours, Schemes(), False),
    "ours, bits a channel": partial(_ours, Schemes(), True),
    "ours, DoReFa and PACT": partial(_ours, _DOREFA_PACT, False),
    "torch.ao, fixed": partial(_peers, partial(_torch_ao, False)),
    "torch.ao, learnable": partial(_peers, partial(_torch_ao, True)),
    "naive LSQ": partial(_peers, _Naive),
}

if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        main()
