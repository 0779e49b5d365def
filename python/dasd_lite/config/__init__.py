"""What a run is told: tables of options, TOML files and overrides, and faults explained in one line."""
