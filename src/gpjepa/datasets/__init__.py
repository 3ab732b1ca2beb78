from ._simulate import simulate

__all__ = ["simulate"]
