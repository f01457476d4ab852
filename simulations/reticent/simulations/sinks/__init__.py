"""Optional places that a run's public figures also go to: TensorBoard and MLflow."""

from .feed import Feed
from .sink import Sink, require, values_of

__all__ = ["Feed", "Sink", "require", "values_of"]
