from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from gpjepa.perturbations import Perturbation


def library_shifts(
    library: np.ndarray, perturbations: Sequence[Perturbation], contexts: Sequence[str]
) -> dict[Perturbation, float]:
    """Shift of the mean log library size of each perturbation against its context's controls.

    Contexts are averaged, and each shift is shrunk by the positive-part factor 1 - variance/shift².
    """
    log_library = np.log(library)
    groups: dict[tuple[str, Perturbation], list[float]] = defaultdict(list)
    for size, context, perturbation in zip(log_library, contexts, perturbations, strict=True):
        groups[context, perturbation].append(size)
    pooled = np.std(log_library)
    shifts = defaultdict(list)
    for (context, perturbation), sizes in groups.items():
        if perturbation.is_control or (context, Perturbation()) not in groups:
            continue
        control = groups[context, Perturbation()]
        variance = pooled**2 * (1 / len(sizes) + 1 / len(control))
        shifts[perturbation].append((np.mean(sizes) - np.mean(control), variance))
    result = {}
    for perturbation, found in shifts.items():
        shift = float(np.mean([s for s, _ in found]))
        variance = float(np.sum([v for _, v in found])) / len(found) ** 2
        result[perturbation] = shift * max(0.0, 1 - variance / shift**2) if shift else 0.0
    return result


def library_shift(shifts: Mapping[Perturbation, float], perturbation: Perturbation) -> float:
    """Shift of one perturbation: its own, or the sum of its singles', 0 where nothing is known."""
    if perturbation in shifts:
        return shifts[perturbation]
    return sum(shifts.get(single, 0.0) for single in perturbation.singles)
