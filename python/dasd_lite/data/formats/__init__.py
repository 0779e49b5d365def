"""Files of users: where they are, how their rows look, and what a row means. See `read.RowFiles`."""
