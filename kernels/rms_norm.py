"""RMSNorm: x / sqrt(mean(x^2) + epsilon) * weight, the mean in fp32 (Zhang and Sennrich, 2019)."""

from torch import Tensor
from torch.nn import functional


def rms_norm(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    epsilon: float,
) -> Tensor:
    """Normalise the last dimension."""
    return functional.rms_norm(x, weight.shape, weight, epsilon)
