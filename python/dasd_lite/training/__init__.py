"""One model learns: loop, schedule, rows, ranks, checkpoints, export and objectives."""
