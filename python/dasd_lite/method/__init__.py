"""The paper's method on arrays: sentences, divergence, selection, weights, filters and packing."""
