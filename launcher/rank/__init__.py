"""What runs inside a rank. Importing this package costs nothing: every rank pays for it before its first line."""
