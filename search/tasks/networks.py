"""The residual networks of He et al. (2016) for small images.

ResNet-(6n+2): three stages of n blocks with 16, 32 and 64 channels; shortcuts without parameters
(option A: every second pixel, zero channels in front and behind). Names of parameters are those
of the widely used CIFAR-10 checkpoints (``layer1.0.conv1.weight``, ``linear.weight``).
"""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SmallResNet"]


class SmallResNet(nn.Module):
    """ResNet-(6n+2) for small images.

    Args:
        depth: 8, 14, 20, 32, 44, 56, …: 6n+2.
        in_channels: Of the images.
        num_classes: Outputs.

    Raises:
        ValueError: If ``depth`` is not 6n+2.
    """

    def __init__(self, depth: int, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        blocks, remainder = divmod(depth - 2, 6)
        if remainder or blocks < 1:
            raise ValueError(f"depth must be 6n+2, such as 20, got {depth}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (N, num_classes), of images, shape (N, in_channels, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.widening = channels - in_channels
        stride = 2 if self.widening else 1
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.widening:
            half = self.widening // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, self.widening - half))
        return F.relu(x + y)


def _stage(in_channels: int, channels: int, num_blocks: int) -> nn.Sequential:
    widths = [in_channels] + [channels] * (num_blocks - 1)
    return nn.Sequential(*(_Block(width, channels) for width in widths))
