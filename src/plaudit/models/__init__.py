"""Backbones, packed attention, aggregation and the reward model."""
