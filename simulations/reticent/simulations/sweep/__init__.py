"""Sweeps: many runs of one plan, over a grid of settings and over seeds."""

from .manifest import Manifest, read_manifest
from .points import Grid, Point, parse_grid, points_of
from .results import Results, collect_results
from .running import Sweep, open_sweep, run_sweep
from .writing import write_results

__all__ = [
    "Grid",
    "Manifest",
    "Point",
    "Results",
    "Sweep",
    "collect_results",
    "open_sweep",
    "parse_grid",
    "points_of",
    "read_manifest",
    "run_sweep",
    "write_results",
]
