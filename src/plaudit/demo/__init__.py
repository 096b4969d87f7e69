"""The built-in world, whose gold preferences are known."""
