"""Validated configuration, one file per job. Never imports torch."""
