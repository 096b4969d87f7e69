"""Plaudit: reward models from human rankings, alignment against them, and proof of whether it helped."""

__version__ = "0.1.0"
