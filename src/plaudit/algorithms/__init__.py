"""Policy-gradient algorithms: one family for text, enumerable problems and control."""
