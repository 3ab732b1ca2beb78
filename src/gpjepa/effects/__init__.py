from ._scales import SCALES

__all__ = ["SCALES"]
