"""Was it any good: metrics, floors, intervals, plots and the report."""
