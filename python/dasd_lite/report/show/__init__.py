"""`dasd-lite show`: rows of one folder in the terminal."""
