"""Looking back at a run: the page, its tables and figures."""
