"""Farthest-point selection: a custom op in C++ and CUDA, with a PyTorch fallback of the same
bits."""

from slap_ds.ops.farthest_point import FarthestPoints, active_path, farthest_point

__all__ = ["FarthestPoints", "active_path", "farthest_point"]
