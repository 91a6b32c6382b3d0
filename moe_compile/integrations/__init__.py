"""Doors to other libraries' registries; each module is imported by who wants it, and imports its library then."""
