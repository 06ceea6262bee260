"""mini-VE: a drawn world in which visual entailment can be taught and measured in seconds."""

from clseave_cli.core.data.mini_ve.generation import MiniVE, Sizes, generate

__all__ = ["MiniVE", "Sizes", "generate"]
