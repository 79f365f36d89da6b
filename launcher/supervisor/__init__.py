"""One host: starting, watching, stopping and reaping its ranks."""
