"""One module a contender: its ``Adapter`` opens the loader as a user of that library would."""
