"""Tinyworld: the small town of Pebbleford, generated from a seed, as stories and as four kinds of task data."""

from minillm.data.tinyworld.stories import Story, stories

__all__ = ["Story", "stories"]
