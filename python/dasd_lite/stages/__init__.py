"""The stages, one module each; none imports another."""
