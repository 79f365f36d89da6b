"""How ranks find each other: from a topology to the command and environment of each rank. One module per engine."""
