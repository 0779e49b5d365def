"""Distribution-Aligned Sequence Distillation (arXiv 2601.09088) on one workstation."""
