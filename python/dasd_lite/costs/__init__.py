"""What a run will cost before it is spent: model shapes, FLOPs, hardware, memory, price and time."""
