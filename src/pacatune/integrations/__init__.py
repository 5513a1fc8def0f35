"""Plug-ins for other libraries. Each is imported by that library, or by whoever uses it."""
