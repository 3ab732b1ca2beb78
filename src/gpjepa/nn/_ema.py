from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def ema_copy(student: Module) -> Module:
    """A frozen copy that only :func:`ema_update` changes."""
    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    return teacher.eval()


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's parameters to ``momentum * teacher + (1 - momentum) * student``."""
    for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
        old.lerp_(new, 1 - momentum)
    for buffer, current in zip(teacher.buffers(), student.buffers(), strict=True):
        buffer.copy_(current)
