"""The method, as pure functions on arrays."""
