"""reproval: language-model evaluation that somebody else can repeat."""

__version__ = "0.1.0"
