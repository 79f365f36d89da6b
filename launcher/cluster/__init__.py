"""Hosts talking to hosts: wire format, authentication, and what hosts compare before they work together."""
