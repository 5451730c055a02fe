"""Tinyworld: the small town of Pebbleford, generated from a seed.

Stories to pre-train on, and instructions, reviews, articles and preferences to fine-tune on. All is
written for this project: no text comes from anywhere else, and the same seed gives the same text.
"""

from minillm.data.tinyworld.articles import articles
from minillm.data.tinyworld.instructions import instructions
from minillm.data.tinyworld.preferences import preferences
from minillm.data.tinyworld.reviews import reviews
from minillm.data.tinyworld.stories import Story, stories

__all__ = ["Story", "articles", "instructions", "preferences", "reviews", "stories"]
