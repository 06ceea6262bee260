"""Translation engines, and the memory of their answers."""
