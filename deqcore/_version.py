"""The version of deqcore and lion_models: the one place where it is written."""

__version__ = "0.2.0"
