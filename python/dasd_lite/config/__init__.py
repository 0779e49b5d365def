"""The options of a run: tables, TOML files and overrides, and mistakes explained in one line each."""
