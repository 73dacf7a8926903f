"""Pruning: weights with masks, and models made smaller by what the masks leave out."""
