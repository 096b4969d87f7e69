"""Records, readers, audit, splits, tokenising and packing."""
