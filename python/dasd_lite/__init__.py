"""Distribution-Aligned Sequence Distillation (arXiv 2601.09088) on one workstation."""

import os

# OpenMP threads that wait should soon sleep: where another process wants the cores, spinning ones make small models
# several times slower. GNU's OpenMP, which torch brings, reads this when torch is imported. Measured on two cores:
# 1000 keeps nine tenths of the speed of long spinning on free ones and has nearly twice its speed on shared ones.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
