"""Run StarChat Alpha, and models like it, in little memory."""

__version__ = "0.1.0"
