"""Means over samples, and how far to trust them.

With several samples per question the samples of one question are not independent, so the standard
error is clustered by question. For n samples x in G clusters with mean m

    SE^2 = G / (G - 1) / n^2 * sum over clusters (sum over its samples (x - m))^2

which for one sample per question is the usual s / sqrt(n). See E. Miller, "Adding error bars to
evals" (2024), section 2.2; the factor G / (G - 1) is the small-sample correction.
"""

import math
from collections.abc import Mapping, Sequence

Z_95 = 1.96
"""Half-width of a 95 % interval in standard errors, normal approximation."""


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN for nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def clustered_standard_error(clusters: Mapping[str, Sequence[float]]) -> float:
    """Standard error of the mean over all values, values of one key being dependent.

    NaN with fewer than two clusters: one question says nothing about another.
    """
    values = [value for cluster in clusters.values() for value in cluster]
    num_clusters = sum(1 for cluster in clusters.values() if cluster)
    if num_clusters < 2:
        return math.nan
    center = mean(values)
    sums = (math.fsum(value - center for value in cluster) for cluster in clusters.values())
    variance = math.fsum(total**2 for total in sums) / len(values) ** 2
    return math.sqrt(variance * num_clusters / (num_clusters - 1))


def quantile(values: Sequence[float], share: float) -> float:
    """The `share` quantile (0 to 1), linear between neighbours; NaN for nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])
