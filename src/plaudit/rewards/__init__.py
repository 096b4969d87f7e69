"""Rewards: anything that scores completions, from a ten-line function to a trained model or a remote service."""
