"""The paper's method over arrays: sentences, divergence, selection, weights, filters and packing."""
