"""Shared services and one visible loop per job."""
