"""The embedded checkpoint; this file only lets the wheel carry the folder as package data."""
