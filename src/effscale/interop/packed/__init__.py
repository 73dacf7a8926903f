"""Files of packed weights: what they have in common, and effscale's own layout."""
