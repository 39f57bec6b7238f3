"""Layouts of columns, in the order in which they are tried; the first that fits the first row is the data set's."""

from lit_align.data.formats.layouts import candidates, chats, pairs, posts, ranked
from lit_align.data.formats.layouts.layout import Layout

LAYOUTS: tuple[Layout, ...] = (
    *posts.COMPARISONS,
    *ranked.NAMED,
    *pairs.LAYOUTS,
    *candidates.LAYOUTS,
    *ranked.FOUND,
    *chats.LAYOUTS,
    *posts.POSTS,
    *chats.TEXTS,
)
