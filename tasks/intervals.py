"""How sure is a share that was counted on a few problems? Pure; standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z_95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def wilson(share: float, n: float, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share seen in n independent trials; (0, 1) for n = 0. n may be fractional."""
    if n <= 0:
        return 0.0, 1.0
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))  # at 0 and 1 rounding may cross it


def pass_interval(shares: Sequence[float], z: float = Z_95) -> tuple[float, float]:
    """95 % interval of the mean of `shares`: how many of a problem's answers were right, one value a problem.

    Answers to one problem are alike, so problems are the independent unit, not answers: the variance of the mean is
    that between problems, sum (x - mean)^2 / n^2. It is put into Wilson's interval as an effective number of trials,
    mean (1 - mean) / variance (Dean and Pagano 2015, for clustered surveys), at least n. With one answer a problem
    that number is n and the interval is Wilson's own. Where every answer is right, or none, it is n as well.
    It says what other problems would change; what another training would change is not in it.
    """
    n = len(shares)
    if n == 0:
        return 0.0, 1.0
    mean = sum(shares) / n
    variance = sum((share - mean) ** 2 for share in shares) / n**2
    effective = mean * (1 - mean) / variance if variance > 0 else n
    return wilson(min(1.0, max(0.0, mean)), max(n, effective), z)
