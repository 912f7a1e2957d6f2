"""Miniature public data sets, drawn: scenes of a few objects, with captions, questions and statements about them."""
