"""mofo: open training for Modality Forcing."""

__version__ = "0.1.0"
